"""Whose network is too slow to train with: found by members whose group failed.

A sum that fails, or a group that cannot be formed, does not say who is to blame. One that lives
behind a link that carries next to nothing (losses, a wrong MTU, another continent) fails all the
others, again and again. So members that are left after a failure fetch some data from each of the
others, beside the training, until that is quick; those for whom it is not are told to all with the
next question for a quorum, and the group agrees who sits out.
"""

import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

SIZE = 256 << 10  # bytes that are fetched
SLOW = 1.0  # seconds for them with which a link counts as slow: a sum of 2 MB would take its limit
GIVEN_UP = 2.0  # seconds after which they are not waited for
EVERY, LOOKS = 5.0, 12  # seconds between looks at a link that is slow, and how many
KEY = "/link"


class Links:
    """This member's links to others, of which it knows what it has looked at.

    Args:
        store: This member's own, from which others fetch.
    """

    def __init__(self, store: TCPStore) -> None:
        store.set(KEY, "-" * SIZE)
        self._looked_at: dict[str, str] = {}
        self._slow: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def slow(self) -> dict[str, float]:
        """Members to which the link is slow, and the seconds that it took."""
        with self._lock:
            return dict(self._slow)

    def look(self, others: Mapping[str, str]) -> None:
        """Look at the links to others until they are quick, in the background.

        Args:
            others: host:port of the store of each member.
        """
        for id, address in others.items():
            with self._lock:
                if self._looked_at.get(id) == address:
                    continue
                self._looked_at[id] = address
            threading.Thread(
                target=self._watch, args=(id, address), daemon=True, name="link"
            ).start()

    def forget(self) -> None:
        """All that is known; what is under way says nothing any more."""
        with self._lock:
            self._looked_at.clear()
            self._slow.clear()

    def _watch(self, id: str, address: str) -> None:
        for _ in range(LOOKS):
            seconds = fetch(address)
            with self._lock:
                if self._looked_at.get(id) != address:
                    return
                if seconds is None or seconds < SLOW:
                    break
                self._slow[id] = seconds
            time.sleep(EVERY)
        with self._lock:
            if self._looked_at.get(id) == address:
                del self._looked_at[id]
                self._slow.pop(id, None)


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


def outcast(members: Sequence[str], slow: Mapping[str, Collection[str]]) -> str | None:
    """Who is to sit out: the one with the most slow links to others, the last of several.

    Args:
        members: Those that would train together, the most senior first.
        slow: To whom each of them finds its link slow; others do not count.
    """
    links = {
        frozenset((one, other))
        for one in members
        for other in slow.get(one, ())
        if other in members and other != one
    }
    ends = Counter(member for link in links for member in link)
    if not ends:
        return None
    return max(members, key=lambda member: (ends[member], members.index(member)))
