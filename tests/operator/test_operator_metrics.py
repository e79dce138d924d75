"""What the operator's metrics tell of its runs, and what is left of a run that is gone."""

from typing import Any

import pytest

from demoreset_api.status import Attempt, Cause, CurriculumStatus, Phase, Restarts, RunStatus
from demoreset_operator.metrics import Metrics
from world import BEGIN

KEY = {"namespace": "games", "run": "key"}
OF_A_RUN = ("run_failed", "run_training", "run_restarts", "run_start_frame")


def tell(metrics: Metrics, uid: str = "u-1", name: str = "key", **status: Any) -> None:
    metrics.run(uid, "games", name, RunStatus(**status))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"demoreset_operator_{name}", labels or KEY)


def ends(*causes: Cause) -> list[Attempt]:
    """Ends of a worker."""
    return [
        Attempt(worker=0, attempt=number, pod=f"key-worker-0-{number}", cause=cause, ended=BEGIN)
        for number, cause in enumerate(causes, 1)
    ]


def ended(metrics: Metrics) -> dict[Cause, float]:
    """The causes that were counted, and how often."""
    found = {cause: value(metrics, "restarts_total", cause=cause.value) for cause in Cause}
    return {cause: count for cause, count in found.items() if count}


def test_a_run_has_failed_while_its_phase_says_so() -> None:
    metrics = Metrics()
    for phase, failed in ((Phase.RUNNING, 0), (Phase.FAILED, 1), (Phase.PENDING, 0)):
        tell(metrics, phase=phase)
        assert value(metrics, "run_failed") == failed


def test_what_was_there_at_first_sight_is_shown_and_not_counted_as_new() -> None:
    metrics = Metrics()
    tell(metrics, attempts=ends(Cause.CRASHED, Cause.EVICTED), restarts=Restarts(total=2))
    assert value(metrics, "run_restarts") == 2
    assert ended(metrics) == {}


def test_ends_are_counted_once_each_by_their_causes() -> None:
    metrics = Metrics()
    metrics.lost(ends(Cause.HUNG, Cause.REPLACED, Cause.EVICTED, Cause.DONE, Cause.HUNG))
    assert ended(metrics) == {Cause.HUNG: 2, Cause.EVICTED: 1}


def test_every_cause_that_is_counted_is_there_before_it_happens() -> None:
    metrics = Metrics()
    for cause in (Cause.CRASHED, Cause.OUT_OF_MEMORY, Cause.HUNG, Cause.NODE_LOST, Cause.DRAINED):
        assert value(metrics, "restarts_total", cause=cause.value) == 0
    assert value(metrics, "restarts_total", cause=Cause.DONE.value) is None


def test_a_run_shows_where_it_starts_once_that_is_known() -> None:
    metrics = Metrics()
    tell(metrics)
    assert value(metrics, "run_start_frame") is None
    place = CurriculumStatus(start_frame=200, demo_frames=356, progress="44 %")
    tell(metrics, curriculum=place)
    assert value(metrics, "run_start_frame") == 200
    tell(metrics)
    assert value(metrics, "run_start_frame") == 200, "it was not told anew"


def test_only_a_run_that_should_train_can_be_one_that_does_not() -> None:
    metrics = Metrics()
    told = []
    for phase in (Phase.PENDING, Phase.RUNNING, Phase.SUSPENDED, Phase.PENDING, Phase.COMPLETE):
        tell(metrics, phase=phase)
        told.append(value(metrics, "run_training"))
    assert told == [0, 1, None, 0, None]
    metrics.forget("u-1")


@pytest.mark.parametrize("name", OF_A_RUN)
def test_nothing_is_left_of_a_run_that_is_gone(name: str) -> None:
    metrics = Metrics()
    place = CurriculumStatus(start_frame=200, demo_frames=356, progress="44 %")
    tell(metrics, curriculum=place)
    tell(metrics, uid="u-2", name="door", curriculum=place)
    metrics.forget("u-1")
    assert value(metrics, name) is None
    assert value(metrics, name, namespace="games", run="door") is not None
    metrics.forget("never seen")


def test_a_new_run_of_the_same_name_keeps_its_series_when_the_old_one_goes() -> None:
    metrics = Metrics()
    tell(metrics, uid="u-1", phase=Phase.FAILED)
    tell(metrics, uid="u-2", phase=Phase.RUNNING)
    place = CurriculumStatus(start_frame=200, demo_frames=356, progress="44 %")
    tell(metrics, uid="u-2", phase=Phase.RUNNING, curriculum=place)
    tell(metrics, uid="u-3", phase=Phase.PENDING)
    assert value(metrics, "run_start_frame") is None, "that is where the earlier one was"
    metrics.forget("u-3")
    metrics.forget("u-1")
    assert value(metrics, "run_failed") == 0
    metrics.forget("u-2")
    assert value(metrics, "run_failed") is None


def test_runs_are_counted_by_their_phases() -> None:
    metrics = Metrics()

    def phases() -> dict[str, float | None]:
        found = {phase.value: value(metrics, "runs", phase=phase.value) for phase in Phase}
        return {phase: count for phase, count in found.items() if count != 0}

    assert phases() == {}, "all of them are there, and 0"
    tell(metrics, uid="u-1", phase=Phase.PENDING)
    tell(metrics, uid="u-2", name="door", phase=Phase.PENDING)
    assert phases() == {"Pending": 2}
    tell(metrics, uid="u-1", phase=Phase.RUNNING)
    assert phases() == {"Pending": 1, "Running": 1}
    metrics.forget("u-1")
    assert phases() == {"Pending": 1}
