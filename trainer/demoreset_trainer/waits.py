"""How a member waits: it says that it lives, and leaves when it is told to."""

import queue
import time
from collections.abc import Callable
from typing import Any

from demoreset_trainer.group import Leaving
from demoreset_trainer.heart import Heart

POLL = 0.05  # seconds between looks at a wish to stop while others are waited for
FAREWELL = 5.0  # seconds that who is told to stop waits for one more update with the others


class Waits:
    """What a member does while it waits.

    Args:
        heart: Told that the loop moves.
        stopping: Whether this member is to leave.
        hurry: Seconds from then on after which it leaves in the middle of an update.
    """

    def __init__(self, heart: Heart, stopping: Callable[[], bool], hurry: float) -> None:
        self._heart, self._stopping, self._hurry = heart, stopping, hurry
        self._asked_to_stop: float | None = None  # when it noticed

    def alive(self, patience: float = 0.0) -> None:
        """The loop moves, or waits for something that takes so many seconds at most.

        Raises:
            Leaving: the end of the update would be too late for a last checkpoint.
        """
        self._heart.moved(patience)
        if self._told_to_stop() > self._hurry:
            raise Leaving("told to stop, and the update takes too long")

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds.

        Raises:
            Leaving: told to stop.
        """
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            self._heart.moved()
            if self._stopping():
                raise Leaving("told to stop while it waited")
            time.sleep(min(left, POLL))

    def wait_for(self, answer: "queue.Queue[Any]", waiting: Callable[[], None]) -> Any:
        """What comes; an exception that comes is raised.

        Args:
            answer: Where it comes.
            waiting: Called every `POLL`; may raise as well.

        Raises:
            Leaving: told to stop, and nothing came within `FAREWELL`.
        """
        begun = time.monotonic()
        while True:
            told = self._told_to_stop()
            if told > self._hurry or min(told, time.monotonic() - begun) > FAREWELL:
                raise Leaving("told to stop while it waited for the others")
            self._heart.moved()
            try:
                result = answer.get(timeout=POLL)
            except queue.Empty:
                waiting()
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def _told_to_stop(self) -> float:
        """Seconds for which it has known that it is to leave; 0 where it is to stay."""
        if not self._stopping():
            return 0.0
        now = time.monotonic()
        self._asked_to_stop = self._asked_to_stop or now
        return now - self._asked_to_stop
