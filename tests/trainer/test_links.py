"""Whose links are slow is found by fetching over them, and one sits out."""

import socket
import sys
import time
from collections.abc import Iterator
from itertools import combinations, permutations

import pytest

if sys.platform != "linux":
    pytest.skip("torchft is for Linux", allow_module_level=True)

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from demoreset_trainer import links
from demoreset_trainer.links import GIVEN_UP, Links, fetch, outcast

PATIENCE = 30.0
ALL = ("a", "b", "c", "d")


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def until(mine: Links, slow: set[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while set(mine.slow) != slow:
        assert time.monotonic() < deadline, mine.slow
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


def test_a_link_is_looked_at_until_it_is_quick(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "EVERY", 0.05)
    seconds = {"host:1": 2.0, "host:2": 0.01}
    monkeypatch.setattr(links, "fetch", seconds.__getitem__)
    mine = Links(store())
    mine.look({"far": "host:1", "near": "host:2"})
    until(mine, {"far"})
    assert mine.slow == {"far": 2.0}
    seconds["host:1"] = 0.5
    until(mine, set())
    seconds["host:1"] = 1.5
    mine.look({"far": "host:1"})  # another sum failed
    until(mine, {"far"})
    mine.forget()
    assert mine.slow == {}


def test_who_has_most_slow_links_sits_out_and_all_agree() -> None:
    assert outcast(ALL, {}) is None
    assert outcast(ALL, {"a": ["gone"], "b": ["b"], "gone": ["c"]}) is None
    for culprit in ALL:
        others = [member for member in ALL if member != culprit]
        # It takes no more than two who have found it slow, or that it has found two to be so.
        for some in combinations(others, 2):
            assert outcast(ALL, {member: [culprit] for member in some}) == culprit
            assert outcast(ALL, {culprit: some}) == culprit
    for one, other in permutations("ab"):  # of one bad link the later member, whoever told it
        assert outcast(("a", "b"), {one: [other]}) == "b"
        assert outcast(("a", "b"), {one: [other], other: [one]}) == "b"
