"""A member's beat: while its loop moves, and to its supervisor also while it saves in the end."""

import sys
import threading
from typing import NoReturn

import pytest

if sys.platform != "linux":
    pytest.skip("torchft is for Linux", allow_module_level=True)

from demoreset_trainer import heart
from demoreset_trainer.heart import Heart


def nobody(*_: object) -> NoReturn:
    """The coordinator, which is away: a thread in torchft's own code would outlive the test."""
    raise OSError


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    monkeypatch.setattr(heart, "TELL_EVERY", 0.01)
    monkeypatch.setattr(heart, "STANDSTILL", 0.2)
    monkeypatch.setattr(heart, "LighthouseClient", nobody)
    return threading.Semaphore(0)


def test_a_loop_that_stands_still_is_not_heard(beats: threading.Semaphore) -> None:
    mine = Heart("http://127.0.0.1:1", "me", beats.release)
    mine.moved()
    mine.start()
    assert beats.acquire(timeout=10)
    while beats.acquire(timeout=1):  # they go on for STANDSTILL
        pass
    assert not mine.beating
    mine.moved()
    assert mine.beating
    assert beats.acquire(timeout=10)
    mine.moved(60)  # it waits for something that has a limit of its own
    for _ in range(100):
        assert beats.acquire(timeout=10)
    mine.stop()


def test_who_has_left_the_group_is_still_heard_by_its_supervisor(
    beats: threading.Semaphore,
) -> None:
    mine = Heart("http://127.0.0.1:1", "me", beats.release)
    mine.start()
    mine.stop()
    mine.moved(60)
    for _ in range(100):
        assert beats.acquire(timeout=10)
