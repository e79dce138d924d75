"""What a run takes with it from a checkpoint, where what is wanted has changed meanwhile."""

from pathlib import Path
from typing import Any

import pytest

from demoreset_api.spec import RunSpec
from demoreset_trainer import run_folder
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.curriculum import Result
from demoreset_trainer.demo import Demo
from demoreset_trainer.run_state import RunState


def spec(**changes: Any) -> RunSpec:
    return RunSpec.model_validate({"demo": {"name": "freeway-crossing"}, **changes})


def learned(demo: Demo) -> dict[str, Any]:
    """The state of a run that has met its goal."""
    state = RunState(spec(), demo)
    state.counters.frames = 1000
    state.ladder.watch(frames=1000, start=0, goal_rate=0.95)
    state.goal.confirm([True] * 95 + [False] * 5, 7)
    return state.state()


@pytest.mark.parametrize(
    ("changes", "met", "same_rules"),
    [
        ({}, True, True),
        ({"environment": {"processes": 3}}, True, True),
        ({"ppo": {"learningRate": 1e-4}}, True, True),
        ({"curriculum": {"guide": 0, "startShare": 0.6}}, True, True),
        ({"curriculum": {"lagFrames": 240, "extraFrames": 80}}, True, True),  # as by default
        ({"goal": {"successRate": 0.99}}, False, True),
        ({"environment": {"stickyProbability": 0.25}}, False, False),
        ({"curriculum": {"lagFrames": 60}}, False, False),
        ({"curriculum": {"horizonFrames": 400}}, False, False),
    ],
)
def test_what_was_reached_under_other_rules_says_nothing(
    freeway: Demo, changes: dict[str, Any], met: bool, same_rules: bool
) -> None:
    before, wanted = learned(freeway), spec(**changes)
    assert run_folder.goal_met(before, wanted) is met
    said = run_folder.going_on(Path("x"), Snapshot(1, 7, 1000, 1, {}, {}, before), wanted)
    assert ("the goal is confirmed anew" not in said) is same_rules
    state = RunState(wanted, freeway)
    state.resume(before, life=1)
    assert state.goal.met is met
    assert (state.goal.evaluation is not None) is met
    assert (state.goal.rate is not None) is same_rules
    assert (state.ladder.state()["best_start"] == 0) is same_rules
    assert state.ladder.state()["began"] == (0 if same_rules else 1000)
    assert state.counters.frames == 1000


@pytest.mark.parametrize("after", ["PlayOn", "Stop"])
def test_what_follows_the_goal_is_no_part_of_it(freeway: Demo, after: str) -> None:
    met = learned(freeway) | {"playing_on": True}
    wanted = spec(goal={"after": after})
    assert run_folder.goal_met(met, wanted) is (after == "Stop")
    state = RunState(wanted, freeway)
    state.resume(met, life=1)
    assert state.goal.met
    assert state.playing_on


def test_another_goal_after_playing_on_is_judged_by_what_comes(freeway: Demo) -> None:
    state = RunState(spec(goal={"successRate": 0.99, "after": "PlayOn"}), freeway)
    state.resume(learned(freeway) | {"playing_on": True}, life=1)
    assert not state.goal.met
    assert not state.playing_on
    assert state.goal.rate is None, "the record is of a policy that has played for score since"
    frames = 1000 + state._spec.stall.patience_frames - 1
    assert state.ladder.watch(frames=frames, start=0, goal_rate=0.0) is None
    assert state.ladder.state()["began"] == 0, "the best is the best still"


@pytest.mark.parametrize(
    ("episodes", "best"),  # each its start and score
    [
        ([], None),
        ([(4, 7)], None),  # what the demo had earned before is not this run's
        ([(0, 3), (4, 7), (0, 2)], 3),
        ([(0, 3), (0, 5)], 5),
        ([(0, -5)], -5),
        ([(0, -5), (0, -3), (0, -9)], -3),
    ],
)
def test_the_best_score_is_of_episodes_from_the_games_own_start(
    freeway: Demo, episodes: list[tuple[int, int]], best: int | None
) -> None:
    state = RunState(spec(), freeway)
    for number, (start, score) in enumerate(episodes):
        state.record([Result(0, number, start, True, score, 10, 1)], 64)
    assert state.counters.score_max == best
