"""Ctrl-C, SIGTERM and a closed terminal as a wish to stop; what is said to who pressed keys."""

import queue
import signal
import threading
from collections.abc import Callable
from typing import Self

SAVED_FIRST = "this update is finished, then a checkpoint is written"
AT_ONCE = "press it once more to end at once, with the checkpoint that is there"


class Signals:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a wish to stop; a second Ctrl-C ends all at once.

    Under nohup a closed terminal stops nothing.

    To be made before anything that takes time. As a context it gives the signals back at its end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # Its `put` may be called from a signal handler: it takes no lock that we may hold.
        self._first: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN or number is not signal.SIGHUP
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._first.put(None)

    def _receive(self, number: int, _frame: object) -> None:
        if self.received == signal.SIGINT == number:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if self.received is None:
            self._first.put(number)
        self.received = number

    def __call__(self) -> int | None:
        """The latest signal that was received; None before the first."""
        return self.received

    def acknowledge(self, note: Callable[[str], None]) -> None:
        """Say at once that the first signal was heard, though an update may take seconds.

        A thread says it: the handler runs in the middle of whatever the main thread does, which
        may be writing to the very screen.
        """
        threading.Thread(target=self._acknowledge, args=(note,), daemon=True).start()

    def _acknowledge(self, note: Callable[[str], None]) -> None:
        number = self._first.get()
        if number == signal.SIGINT:
            note(f"Ctrl-C: {SAVED_FIRST}; {AT_ONCE}")
        elif number is not None:
            note(f"{signal.Signals(number).name}: {SAVED_FIRST}")
