"""Whose network is too slow to train with: found by members whose group failed.

A sum that fails, or a group that cannot be formed, does not say who is to blame. One that lives
behind a link that carries next to nothing (losses, a wrong MTU, another continent) fails all the
others, again and again, or makes an update last a minute. So members fetch some data from each of
the others after a failure, and where sums take longer than all else, beside the training, until
that is quick; what it took is told to all with the next question for a quorum, and the group agrees
who sits out.
"""

import queue
import socket
import statistics
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import permutations

from torch.distributed import TCPStore  # type: ignore[attr-defined]

SIZE = 256 << 10  # bytes that are fetched
SLOW = 1.0  # seconds for them, with which a link is slow: sums of 1 MB would take too long
GIVEN_UP = 2.0  # seconds after which they are not waited for
EVERY, LOOKS = 5.0, 12  # seconds between looks at a link that is slow, and how many
OLDEST = EVERY + GIVEN_UP  # seconds since what is known of a slow link was looked at, at most
KEY = "/link"


class Links:
    """This member's links to others, of which it knows what it has looked at.

    Args:
        store: This member's own, from which others fetch.
    """

    def __init__(self, store: TCPStore) -> None:
        store.set(KEY, "-" * SIZE)
        self._seconds: dict[str, float] = {}
        self._looks: dict[str, object] = {}  # those under way
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """What the latest look at each link took."""
        with self._lock:
            return dict(self._seconds)

    def look(self, others: Mapping[str, str]) -> None:
        """Look at the links to others, at the slow ones until they are quick, in the background.

        Args:
            others: host:port of the store of each member.
        """
        with self._lock:
            self._seconds = {id: self._seconds[id] for id in others if id in self._seconds}
            for id in others.keys() - self._looks.keys():
                look = self._looks[id] = object()
                watch = partial(self._watch, id, others[id], look)
                threading.Thread(target=watch, daemon=True, name="link").start()

    def forget(self, others: Iterable[str] | None = None) -> None:
        """What is known of the links to these, or of all; looks under way say nothing any more."""
        with self._lock:
            for id in {*self._looks, *self._seconds} if others is None else others:
                self._looks.pop(id, None)
                self._seconds.pop(id, None)

    def _watch(self, id: str, address: str, look: object) -> None:
        for _ in range(LOOKS):
            seconds = fetch(address)
            with self._lock:
                if self._looks.get(id) is not look:
                    return
                if seconds is None:
                    break
                self._seconds[id] = seconds
                if seconds < SLOW:
                    del self._looks[id]
                    return
            time.sleep(EVERY)
        with self._lock:  # it is gone, or far, for longer than that; another failure looks again
            if self._looks.get(id) is look:
                del self._looks[id]
                self._seconds.pop(id, None)  # another look may have forgotten it


def fetch(address: str) -> float | None:
    """Seconds to fetch from a member's store, `GIVEN_UP` at most; None where nobody is there."""
    taken: queue.Queue[float | None] = queue.Queue()
    host, _, port = address.rpartition(":")
    begun = time.monotonic()

    def take() -> None:
        try:
            socket.create_connection((host, int(port)), GIVEN_UP).close()
            TCPStore(host, int(port), timeout=timedelta(seconds=GIVEN_UP)).get(KEY)
        except ConnectionRefusedError:
            taken.put(None)
        except (OSError, RuntimeError):
            taken.put(GIVEN_UP)
        else:
            taken.put(time.monotonic() - begun)

    threading.Thread(target=take, daemon=True, name="fetch").start()  # its reads have no limit
    try:
        return taken.get(timeout=GIVEN_UP)
    except queue.Empty:
        return GIVEN_UP


def outcast(
    members: Sequence[str],
    seconds: Mapping[str, Mapping[str, float]],
    back: Collection[str] = (),
) -> str | None:
    """Who is to sit out: at an end of a slow link, the one whose links take longest altogether.

    Args:
        members: Those that would train together, the most senior first; of equals the last is out.
        seconds: Of each of them, what its links to others take.
        back: Those that were cut off a moment ago: what was found meanwhile says nothing.
    """
    took: dict[tuple[str, str], float] = {}
    for one, other in permutations([member for member in members if member not in back], 2):
        link = min(one, other), max(one, other)
        took[link] = max(took.get(link, 0.0), seconds.get(one, {}).get(other, 0.0))
    ends = {member for link, took_it in took.items() if took_it >= SLOW for member in link}
    if not ends:
        return None
    total = {end: sum(took_it for link, took_it in took.items() if end in link) for end in ends}
    return max(ends, key=lambda end: (total[end], members.index(end)))


def slow(seconds: Iterable[float]) -> bool:
    """Whether one of these links is slow."""
    return max(seconds, default=0.0) >= SLOW


def quick(seconds: Sequence[float]) -> bool:
    """Whether a member may train with others: at least half of its links are quick."""
    return bool(seconds) and statistics.median_low(seconds) < SLOW
