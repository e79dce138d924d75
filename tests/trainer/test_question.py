"""A question that a member gave up must not count as one for which it waits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

os.environ.setdefault("RUST_LOG", "error")
pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

from torchft.coordination import LighthouseClient

from demoreset_api.errors import TryAgain
from demoreset_api.names import ASIDE, QUORUM
from demoreset_trainer import elastic
from demoreset_trainer.elastic import Elastic
from demoreset_trainer.group import Quorum
from demoreset_trainer.links import KEY
from demoreset_trainer.question import BROKEN, KNOWN

PATIENCE = 30.0  # seconds for anything; never what is measured
SOON = 3.0  # seconds; a group with who does not come costs 5
Make = Callable[..., Elastic]


@pytest.fixture
def coordinator() -> Iterator[tuple[int, int]]:
    """Its process, which may be frozen, and its port."""
    command = [sys.executable, "-m", "demoreset_trainer.cli", "coordinator"]
    command += ["--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    yield process.pid, int(line.partition("on port ")[2].partition(":")[0])
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def member(coordinator: tuple[int, int]) -> Iterator[Make]:
    members = []

    def make(id: str, together: int = 1) -> Elastic:
        members.append(_member(id, coordinator[1], together))
        return members[-1]

    yield make
    for each in members:
        each.close()
    while any(thread.name == "heart" for thread in threading.enumerate()):
        time.sleep(0.05)  # a thread in torchft's own code must not outlive the tests


def _member(id: str, port: int, together: int = 1) -> Elastic:
    return Elastic(
        f"127.0.0.1:{port}",
        together=together,
        id=id,
        host="127.0.0.1",
        stopping=lambda: False,
        hurry=PATIENCE,
        begun=lambda: False,
        note=lambda _text: None,
        beat=lambda: None,
        phase=lambda _name: None,
    )


def together(one: "Future[Quorum]", other: "Future[Quorum]") -> float:
    """Seconds until both are in one group."""
    begun = time.monotonic()
    assert one.result(PATIENCE).members == other.result(PATIENCE).members == ("one", "other")
    return time.monotonic() - begun


def pair(member: Make, threads: ThreadPoolExecutor) -> tuple[Elastic, Elastic]:
    """Two that are in one group."""
    one, other = member("one"), member("other")
    one._heart.start()
    other._heart.start()
    time.sleep(0.5)  # both beat: each waits for the other
    together(threads.submit(one.quorum, 1), threads.submit(other.quorum, 1))
    return one, other


def test_a_question_outlives_a_frozen_coordinator(
    coordinator: tuple[int, int], member: Make, threads: ThreadPoolExecutor
) -> None:
    pid, _ = coordinator
    one, other = member("one"), member("other")
    other._heart.start()  # it plays: `one` waits for it
    time.sleep(0.5)
    first = threads.submit(one.quorum, 1)
    time.sleep(0.5)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * BROKEN)
    other.alive()
    os.kill(pid, signal.SIGCONT)
    assert together(first, threads.submit(other.quorum, 1)) < SOON
    assert one._heart.name == "one"  # nothing was given up


def test_those_that_were_started_together_begin_together_and_do_not_wait_for_ever(
    member: Make, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = member("one", together=2), member("other", together=2)
    first = threads.submit(one.quorum, 0)
    time.sleep(1)
    assert not first.done()
    together(first, threads.submit(other.quorum, 0))
    monkeypatch.setattr(elastic, "GATHER", 0.0)
    other.close()  # as one that died before it came
    assert one.quorum(0).members == ("one",)


def test_a_coordinator_that_was_away_is_asked_when_all_have_beaten(
    coordinator: tuple[int, int], member: Make, threads: ThreadPoolExecutor
) -> None:
    pid, _ = coordinator
    one = member("one")
    one._heart.start()
    while not one._heart.heard:
        one.alive()
    os.kill(pid, signal.SIGSTOP)
    while not one._heart.unheard:
        one.alive()
    waits = threads.submit(one._question._pause, 0.1, "no answer")
    time.sleep(1)
    assert not waits.done()
    os.kill(pid, signal.SIGCONT)
    waits.result(PATIENCE)
    assert one._heart.heard > KNOWN  # the others have beaten, too: it is not grouped alone
    begun = time.monotonic()
    one._question._pause(1.0, "no answer")  # it answers beats, and no questions: it goes slowly
    assert time.monotonic() - begun >= 1.0


def test_nobody_is_grouped_with_who_has_given_its_question_up(
    member: Make, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = member("one"), member("other")
    goes_on = threading.Event()

    def give_up(*_: float) -> None:
        raise ConnectionError

    def sleep(_seconds: float) -> None:
        while not goes_on.wait(0.1):
            one.alive()

    other._heart.start()  # it plays
    time.sleep(0.5)
    with monkeypatch.context() as harm:
        harm.setattr(one._question, "_waiting", give_up)
        harm.setattr(one._waits, "sleep", sleep)  # it comes back late
        first = threads.submit(one.quorum, 1)
        time.sleep(2)  # what beats no longer is out after 0.7 s
        other.alive()
        second = threads.submit(other.quorum, 1)
        time.sleep(1)
        assert not second.done()
    goes_on.set()
    assert together(first, second) < SOON


def test_who_is_counted_twice_asks_again(
    coordinator: tuple[int, int], member: Make, threads: ThreadPoolExecutor
) -> None:
    _, port = coordinator
    one = member("one")
    client = LighthouseClient(f"http://127.0.0.1:{port}", timedelta(seconds=5))
    one._heart.name = "one~2"
    for name in ("one", "one~2"):  # the first quorum waits for both
        client.heartbeat(name)
    first = threads.submit(one.quorum, 1)
    client.quorum("one", timedelta(seconds=PATIENCE), data={"id": "one"})
    assert first.result(SOON).members == ("one",)


def test_who_sat_out_is_back_when_its_links_are_quick(
    member: Make, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair(member, threads)
    takes = iter([2.0, 0.01])
    trained = threading.Event()

    def fetch(_address: str) -> float:
        assert trained.wait(PATIENCE)
        return next(takes)

    monkeypatch.setattr(elastic, "fetch", fetch)
    monkeypatch.setattr(elastic, "MIN_REST", 0.1)
    phases: list[str] = []
    monkeypatch.setattr(other, "_phase", phases.append)
    one._links._seconds["other"] = 2.0
    first, second = threads.submit(one.quorum, 1), threads.submit(other.quorum, 1)
    assert first.result(PATIENCE).members == ("one",)
    assert other._heart._stopped.is_set()
    trained.set()
    while other._heart._stopped.is_set():
        time.sleep(0.05)
    time.sleep(0.5)  # it beats: `one` waits for it
    together(threads.submit(one.quorum, 2), second)
    assert next(takes, None) is None
    assert phases == [ASIDE, QUORUM]


@pytest.mark.parametrize(
    ("gap", "seconds"), [(0, 5), (1, 5), (10, 30), (25, 60), (45, 90), (70, 140)]
)
def test_a_sum_is_waited_for_by_the_runs_pace_however_slow_it_is(gap: int, seconds: int) -> None:
    assert elastic.sum_timeout(gap) == seconds


def test_who_joins_a_slow_group_waits_by_its_pace(
    member: Make, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that has just come has nothing to compute, and is at the next sum at once."""
    monkeypatch.setattr(elastic, "MIN_TIMEOUT", 0.5)
    one, other = member("one"), member("other")

    def update(group: Elastic, step: int, seconds: float) -> None:
        quorum = group.quorum(step)
        if quorum.source is not None and len(quorum.members) > 1:
            group.hand_over(quorum, b"state" if quorum.rank == quorum.source else b"")
        for _ in range(2):
            group.sum(torch.ones(1))
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                group.alive()
                time.sleep(0.02)
            group.sum(torch.ones(1))

    update(one, 1, 1.0)
    second = threads.submit(update, other, 0, 0.0)  # it waits for `one`, which beats
    time.sleep(1)
    first = threads.submit(update, one, 2, 1.0)
    first.result(PATIENCE)
    second.result(PATIENCE)
    assert one._members == other._members == ("one", "other")


def test_a_process_group_of_gloos_that_does_not_end_is_left_to_itself(
    member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ends = member("one"), threading.Event()
    monkeypatch.setattr(elastic, "ABORT_TIMEOUT", 0.1)
    monkeypatch.setattr(one._pg, "abort", lambda errored: ends.wait(PATIENCE))
    one._abort()  # it once cost the life of its process
    assert one.quorum(1).members == ("one",)
    ends.set()


def test_what_a_group_left_in_a_members_store_goes_with_the_next(
    member: Make, threads: ThreadPoolExecutor
) -> None:
    """Else it would grow with every member that is lost, for days."""
    one, other = pair(member, threads)
    store, groups = one._store, [one._formed]
    assert [key for key in store.list_keys() if groups[0] in key]  # of the first member is used
    for step in (2, 3):
        for each in (one, other):
            each._give_up()
        together(threads.submit(one.quorum, step), threads.submit(other.quorum, step))
        groups.append(one._formed)
    assert len(set(groups)) == 3
    kept = [key for key in store.list_keys() if key != KEY]
    assert kept
    assert all(groups[-1] in key for key in kept), kept
    assert KEY in store.list_keys()  # by which others try the link to it


def test_who_sat_out_while_all_others_went_does_not_go_on_from_what_it_knows(
    member: Make, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = pair(member, threads)
    monkeypatch.setattr(elastic, "fetch", lambda _address: None)
    with pytest.raises(TryAgain):
        other._sit_out("other")
