"""A member's beat: while its loop moves, and to its supervisor also while it saves in the end."""

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import pytest

if sys.platform != "linux":
    pytest.skip("torchft is for Linux", allow_module_level=True)

from demoreset_trainer import heart
from demoreset_trainer.heart import Heart

PATIENCE = 30.0


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


def test_a_silence_is_told_once_and_while_it_lasts(
    beats: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()

    class Coordinator:
        def __init__(self, url: str, timeout: timedelta) -> None:
            pass

        def heartbeat(self, name: str, timeout: timedelta) -> None:
            if away.is_set():
                raise RuntimeError

    monkeypatch.setattr(heart, "LighthouseClient", Coordinator)
    mine = Heart("http://127.0.0.1:1", "me", beats.release)
    mine.moved(60)
    mine.start()
    until(lambda: mine.heard > 0)
    away.set()
    until(lambda: mine.silence() > 1.0)
    away.clear()
    until(lambda: mine.heard > 0)
    assert mine.silence() > 1.0
    assert mine.silence() < 1.0
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


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_was_cut_off_is_back_when_a_beat_is_answered(
    beats: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart, "CUT_OFF", PATIENCE)
    answers = threading.Event()
    answered = threading.Semaphore(0)

    class Coordinator:
        def __init__(self, *_: object) -> None:
            pass

        def heartbeat(self, *_: object, **__: object) -> None:
            if not answers.is_set():
                raise OSError
            answered.release()

    monkeypatch.setattr(heart, "LighthouseClient", Coordinator)
    mine = Heart("http://127.0.0.1:1", "me", beats.release)
    mine.moved(PATIENCE)
    mine.start()
    until(lambda: mine.unheard > 0)
    answers.set()
    assert answered.acquire(timeout=PATIENCE)
    until(lambda: not mine.unheard)
    assert mine.back == float("inf")  # a moment of silence is none
    monkeypatch.setattr(heart, "CUT_OFF", 0.3)
    answers.clear()
    until(lambda: mine.unheard > 0.6)
    answers.set()
    until(lambda: not mine.unheard)
    assert 0 <= mine.back < PATIENCE
    mine.stop()


def test_who_was_frozen_is_back_though_no_beat_had_failed(
    beats: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart, "CUT_OFF", 0.5)
    frozen, answered = threading.Event(), threading.Semaphore(0)

    class Coordinator:
        def __init__(self, *_: object) -> None:
            pass

        def heartbeat(self, *_: object, **__: object) -> None:
            while frozen.is_set():  # as SIGSTOP does it to all of a process
                time.sleep(0.01)
            answered.release()

    monkeypatch.setattr(heart, "LighthouseClient", Coordinator)
    mine = Heart("http://127.0.0.1:1", "me", beats.release)
    mine.moved(PATIENCE)
    mine.start()
    assert answered.acquire(timeout=PATIENCE)
    assert mine.back == float("inf")
    frozen.set()
    time.sleep(1)
    frozen.clear()
    until(lambda: mine.back < PATIENCE)
    assert not mine.unheard
    mine.stop()
    time.sleep(1)  # it sits out, say: that is no cut
    since = time.monotonic()
    mine.start()
    while answered.acquire(blocking=False):
        pass
    assert answered.acquire(timeout=PATIENCE)
    assert mine.back > time.monotonic() - since
    mine.stop()
