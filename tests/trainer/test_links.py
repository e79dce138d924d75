"""Whose links are slow is found by fetching over them, and one sits out."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import combinations, permutations

import pytest

if sys.platform != "linux":
    pytest.skip("torchft is for Linux", allow_module_level=True)

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from demoreset_trainer import links
from demoreset_trainer.links import GIVEN_UP, Links, fetch, outcast, quick, slow

PATIENCE = 30.0
ALL = ("a", "b", "c", "d")


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a look at each address takes; one that is slow is looked at again soon, for ever."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(links, "EVERY", 0.05)
    monkeypatch.setattr(links, "LOOKS", 10**9)
    monkeypatch.setattr(links, "fetch", seconds.get)
    return seconds


def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def until(mine: Links, met: Callable[[dict[str, float]], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met(mine.seconds):
        assert time.monotonic() < deadline, mine.seconds
        time.sleep(0.01)


def test_a_link_is_quick_or_slow_or_has_no_end(silent: str) -> None:
    theirs = store()
    Links(theirs)
    seconds = fetch(f"127.0.0.1:{theirs.port}")
    assert seconds is not None
    assert 0 < seconds < GIVEN_UP
    assert fetch(silent) == GIVEN_UP
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert fetch(address) is None  # a member that has died is no slow link


def test_a_link_is_looked_at_until_it_is_quick(takes: dict[str, float]) -> None:
    takes |= {"host:1": 2.0, "host:2": 0.01}
    mine = Links(store())
    mine.look({"far": "host:1", "near": "host:2", "dead": "host:3"})
    until(mine, lambda seconds: seconds == {"far": 2.0, "near": 0.01})
    takes["host:1"] = 0.5
    until(mine, lambda seconds: seconds == {"far": 0.5, "near": 0.01})
    takes["host:1"] = 1.5
    mine.look({"far": "host:1"})  # another failure; who is no more is forgotten
    until(mine, lambda seconds: seconds == {"far": 1.5})


def test_a_link_that_stays_slow_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "EVERY", 0.01)
    monkeypatch.setattr(links, "fetch", lambda _address: GIVEN_UP)
    mine = Links(store())
    mine.look({"far": "host:1"})
    until(mine, lambda seconds: seconds == {"far": GIVEN_UP})
    until(mine, lambda seconds: not seconds)


def test_what_was_under_way_says_nothing_after_all_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began, ends = threading.Semaphore(0), threading.Event()

    def slow(_address: str) -> float:
        began.release()
        assert ends.wait(PATIENCE)
        return GIVEN_UP

    monkeypatch.setattr(links, "fetch", slow)
    mine = Links(store())
    mine.look({"far": "host:1"})
    assert began.acquire(timeout=PATIENCE)
    old = next(thread for thread in threading.enumerate() if thread.name == "link")
    mine.forget()
    monkeypatch.setattr(links, "fetch", lambda _address: 0.25)
    mine.look({"far": "host:1"})
    until(mine, lambda seconds: seconds == {"far": 0.25})
    ends.set()
    old.join(PATIENCE)
    assert mine.seconds == {"far": 0.25}


def test_what_is_known_of_one_is_forgotten(takes: dict[str, float]) -> None:
    takes |= {"host:1": 2.0, "host:2": 1.5}
    mine = Links(store())
    mine.look({"cut": "host:1", "far": "host:2"})
    until(mine, lambda seconds: seconds == {"cut": 2.0, "far": 1.5})
    mine.forget({"cut", "unknown"})
    takes["host:2"] = 0.5  # the other is looked at still
    until(mine, lambda seconds: seconds == {"far": 0.5})


def test_whose_links_take_longest_sits_out_and_all_agree() -> None:
    assert outcast(ALL, {}) is None
    assert outcast(ALL, {"a": {"gone": 2.0, "b": 0.9}, "gone": {"c": 2.0}}) is None
    for culprit in ALL:
        others = [member for member in ALL if member != culprit]
        # Two who have found it slow are enough, or that it has found two to be so.
        for some in combinations(others, 2):
            assert outcast(ALL, {member: {culprit: 1.5} for member in some}) == culprit
            assert outcast(ALL, {culprit: dict.fromkeys(some, 1.5)}) == culprit
        # One, where the other found it not quite so slow.
        one, other = others[:2]
        assert outcast(ALL, {one: {culprit: 1.1, other: 0.01}, other: {culprit: 0.9}}) == culprit
    # Who was cut off a moment ago has found everybody slow, and they have found it so.
    cut = {"d": dict.fromkeys("abc", GIVEN_UP), "a": {"d": GIVEN_UP}, "b": {"d": GIVEN_UP}}
    assert outcast(ALL, cut) == "d"
    assert outcast(ALL, cut, back={"d"}) is None
    assert outcast(ALL, {**cut, "c": {"b": 1.5}}, back={"d"}) == "c"
    for one, other in permutations("ab"):  # of one bad link the later member, whoever told it
        assert outcast(("a", "b"), {one: {other: 1.5}}) == "b"
        assert outcast(("a", "b"), {one: {other: 1.5}, other: {one: 2.0}}) == "b"


def test_who_has_few_slow_links_may_train() -> None:
    assert not slow([0.9, 0.01])
    assert slow([0.01, 1.5])
    assert not slow([])
    assert not quick([])
    assert not quick([1.5])
    assert not quick([1.5, 2.0, 0.01])
    assert quick([0.01])
    assert quick([2.0, 0.01])  # of two others one is far away, or gone
