"""When a run is done: only the confirmation decides, and only honest episodes lead to one."""

import json

import pytest

from demoreset_api.spec import Goal
from demoreset_trainer.curriculum import Result
from demoreset_trainer.goal import EVIDENCE, WINDOW, Evaluation, GoalWatch


def results(wins: int, losses: int, *, start: int = 0, explored: bool = False) -> list[Result]:
    """First the losses, then the wins."""
    return [
        Result(0, number, start, number >= losses, 0, 10, 1, explored)
        for number in range(wins + losses)
    ]


def watch(rate: float = 0.9) -> GoalWatch:
    return GoalWatch(Goal(success_rate=rate))


@pytest.mark.parametrize(
    ("played", "rate", "promising"),
    [
        ([], None, False),
        (results(EVIDENCE - 1, 0), 1.0, False),  # all good, but too few
        (results(EVIDENCE, 0), 1.0, True),
        (results(45, 5), 0.9, True),  # a tie with the goal is enough
        (results(44, 6), 0.88, False),
        (results(50, 50), 0.5, True),  # the latest decide: it has learned in between
        (results(10, 0) + results(0, 40), 0.2, False),
        (results(100, 0, start=4), None, False),  # from inside the demo
        (results(100, 0, explored=True), None, False),  # with flattened probabilities
        (results(50, 0) + results(0, 100, start=4) + results(0, 9, explored=True), 1.0, True),
    ],
)
def test_a_confirmation_is_worth_its_time_after_a_good_record(
    played: list[Result], rate: float | None, promising: bool
) -> None:
    goal = watch()
    goal.record(played)
    assert goal.rate == rate
    assert goal.promising == promising
    assert not goal.met


def test_a_rate_of_a_few_episodes_is_not_sound() -> None:
    goal = watch()
    goal.record(results(EVIDENCE - 1, 0))
    assert (goal.rate, goal.sound_rate) == (1, None)
    goal.record(results(0, 1))
    assert goal.rate == goal.sound_rate == (EVIDENCE - 1) / EVIDENCE


def test_the_record_is_of_the_latest_episodes_of_all_updates() -> None:
    goal = watch()
    for _ in range(WINDOW):
        goal.record(results(0, 1))
    for wins in range(1, WINDOW + 1):
        goal.record(results(1, 0))
        assert goal.rate == wins / WINDOW


@pytest.mark.parametrize(
    ("rate", "wins", "losses", "met"),
    [(0.9, 90, 10, True), (0.9, 89, 11, False), (1.0, 100, 0, True), (0.5, 1, 1, True)],
)
def test_the_confirmation_decides(rate: float, wins: int, losses: int, met: bool) -> None:
    goal = watch(rate)
    goal.record(results(100, 0))
    assert goal.promising
    assert goal.confirm([True] * wins + [False] * losses, 7) is met
    assert goal.met is met
    assert not goal.promising  # it is over, or needs new evidence


def test_a_confirmation_is_evidence_itself() -> None:
    goal = watch()
    goal.record(results(100, 0))
    goal.confirm([True] * 40 + [False] * 10, 7)
    assert goal.evaluation == Evaluation(update=7, episodes=50, successes=40)
    assert goal.evaluation.rate == 0.8
    assert goal.rate == 0.9  # the latest 100 episodes: 50 and 40 of 50


def test_after_a_failed_confirmation_new_episodes_are_needed() -> None:
    goal = watch()
    goal.record(results(100, 0))
    goal.confirm([True] * 80 + [False] * 20, 7)
    goal.record(results(EVIDENCE - 1, 0))
    assert not goal.promising
    goal.record(results(5, 0, start=8))
    assert not goal.promising
    goal.record(results(1, 0))
    assert goal.promising


def test_it_goes_on_from_its_state() -> None:
    goal, other = watch(), watch()
    goal.record(results(30, 20))
    other.load(json.loads(json.dumps(goal.state())))
    assert (other.rate, other.met) == (0.6, False)
    for one in (goal, other):
        one.record(results(50, 0))
    assert other.state() == goal.state()
    assert other.promising is goal.promising is True
    goal.confirm([True] * 100, 7)
    other.load(json.loads(json.dumps(goal.state())))
    assert other.met
    assert other.evaluation == Evaluation(update=7, episodes=100, successes=100)
    other.record(results(0, 2 * WINDOW))
    assert other.rate == 0


def test_a_state_of_an_early_version_knows_of_no_confirmation() -> None:
    goal = watch()
    goal.load({"latest": [True] * 60, "since": 10, "met": True})
    assert goal.met
    assert goal.evaluation is None


@pytest.mark.parametrize(("rate", "wins", "of"), [(0.55, 55, 100), (0.56, 56, 100), (0.14, 7, 50)])
def test_a_tie_with_the_goal_meets_it_whatever_its_last_binary_digit(
    rate: float, wins: int, of: int
) -> None:
    watch = GoalWatch(Goal(success_rate=rate))
    assert not watch.confirm([True] * (wins - 1) + [False] * (of - wins + 1), 7)
    assert watch.confirm([True] * wins + [False] * (of - wins), 7)
