"""A member's beat: it stops when the member's loop stands still, not only when its process dies."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from torchft.coordination import LighthouseClient

EVERY = 0.1  # seconds between beats
TELL_EVERY = 0.5  # seconds between those for the supervisor
ANSWERED = 1.0  # seconds that a beat's answer, or a connection to the coordinator, may take
CUT_OFF = 4.0  # seconds without an answered beat: cut off or frozen, and not only far away
STANDSTILL, STANDSTILL_GAPS = 5.0, 20.0  # seconds, or usual gaps, after which the loop stands still


class Heart:
    """Beats in a thread while the loop moves.

    Args:
        url: Of the coordinator.
        id: Of the member. It is the first `name` under which it beats.
        beat: Called now and then as well, for those who are not the coordinator.
    """

    def __init__(self, url: str, id: str, beat: Callable[[], None]) -> None:
        self._url, self._beat = url, beat
        self.name = id
        self._moved = self._excused = time.monotonic()
        self._gaps: deque[float] = deque([0.0], maxlen=200)
        self._failing: float | None = None  # since when beats fail
        self._answering: float | None = None  # since when they are answered
        self._silence = 0.0  # seconds: the longest without an answer, until somebody asks
        self._back = float("-inf")  # when they were answered again after it was cut off
        self.connects = True  # the coordinator's machine takes connections, as far as is known
        self._started, self._stopped = threading.Event(), threading.Event()
        self._stopped.set()
        threading.Thread(target=self._tell, daemon=True, name="beat").start()

    def moved(self, patience: float = 0.0) -> None:
        """The loop moves; or waits for something that has a limit of its own, in seconds."""
        now = time.monotonic()
        self._gaps.append(now - self._moved)
        self._moved, self._excused = now, now + patience

    def start(self) -> None:
        """Be counted as a member from now on."""
        self._started.set()
        if self._stopped.is_set():
            self._stopped = threading.Event()
            self._failing = self._answering = None
            run = partial(self._run, self._stopped)
            threading.Thread(target=run, daemon=True, name="heart").start()

    def stop(self) -> None:
        """Be counted as a member no longer, or not for now; the supervisor is told as before."""
        self._stopped.set()

    @property
    def beating(self) -> bool:
        """Whether the loop moves."""
        patience = max(STANDSTILL, STANDSTILL_GAPS * statistics.median(self._gaps.copy()))
        now = time.monotonic()
        return now - self._moved < patience or now < self._excused

    @property
    def unheard(self) -> float:
        """Seconds for which the coordinator has answered no beat; 0 where it answers."""
        since = self._failing
        return time.monotonic() - since if since is not None else 0.0

    @property
    def heard(self) -> float:
        """Seconds for which the coordinator has answered every beat; 0 where it does not."""
        since = self._answering
        return time.monotonic() - since if since is not None else 0.0

    def silence(self) -> float:
        """Seconds: the longest for which no beat was answered since this was asked last."""
        longest, self._silence = max(self._silence, self.unheard), 0.0
        return longest

    @property
    def back(self) -> float:
        """Seconds since beats are answered again after this member was cut off, or frozen."""
        return time.monotonic() - self._back

    def _run(self, stopped: threading.Event) -> None:
        client: LighthouseClient | None = None
        answered = time.monotonic()
        while not stopped.wait(EVERY):
            if not self.beating:
                continue
            begun = time.monotonic()
            try:
                if client is None:
                    client = LighthouseClient(self._url, timedelta(seconds=ANSWERED))
                client.heartbeat(self.name, timeout=timedelta(seconds=ANSWERED))
                before, answered = answered, time.monotonic()
                self._silence = max(self._silence, answered - before)
                if answered - before > CUT_OFF:
                    self._back = answered
                self._failing, self.connects = None, True
                self._answering = self._answering or answered
            except (RuntimeError, OSError) as error:
                # Silence on a connection is a frozen coordinator, unless no other can be made.
                self.connects = isinstance(error, TimeoutError)
                client = None  # the question for a quorum says so
                self._failing, self._answering = self._failing or begun, None

    def _tell(self) -> None:
        self._started.wait()  # what comes before is not of the loop, and may take its time
        while True:
            time.sleep(TELL_EVERY)
            if self.beating:
                self._beat()
