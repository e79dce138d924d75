"""The ladder of remedies: what a plateau changes, and what undoes it."""

import json
from typing import Any

import pytest

from demoreset_api.spec import Stall
from demoreset_trainer.stall import Ladder, Remedy, better

PATIENCE = 1_000_000


def ladder(rungs: int = 2, patience: int = PATIENCE) -> Ladder:
    return Ladder(
        Stall(
            patience_frames=patience,
            rungs=rungs,
            learning_rate_factor=0.5,
            entropy_factor=0.25,
        )
    )


# Millions of frames, the frontier, success from the game's own start; then the rung, and a word of
# what is said.
Event = tuple[float, int, float | None, int, str | None]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(
            [
                (0.0, 100, None, 0, None),
                (0.9, 100, None, 0, None),
                (1.0, 100, None, 1, "remedy 1 of 2"),
                (1.9, 100, None, 1, None),
                (2.0, 100, None, 2, "remedy 2 of 2"),
                (3.0, 100, None, 2, "stalled at frame 100"),
                (4.0, 100, None, 2, None),  # said once
                (9.0, 100, None, 2, None),
                (9.1, 96, None, 0, "progress again"),
                (10.0, 96, None, 0, None),
                (10.1, 96, None, 1, "remedy 1 of 2"),
            ],
            id="one rung after the other, down to the ground at progress",
        ),
        pytest.param(
            [
                (0.0, 100, None, 0, None),
                (0.5, 120, None, 0, None),
                (0.9, 100, None, 0, None),
                (1.0, 104, None, 1, "no progress for 1,000,000 frames"),
                (1.1, 100, None, 1, None),
                (1.2, 99, None, 0, "progress again"),
            ],
            id="to go back and come again is no progress",
        ),
        pytest.param(
            [
                (0.0, 8, None, 0, None),
                (0.9, 4, None, 0, None),
                (1.8, 0, None, 0, None),
                (2.7, 0, 0.05, 0, None),
                (3.6, 0, 0.12, 0, None),
                (4.5, 0, 0.16, 0, None),  # 0.04 more than the best: not enough
                (4.6, 0, 0.16, 1, "remedy 1"),
                (4.7, 0, 0.17, 0, "progress again"),
                (5.7, 4, 0.9, 1, "remedy 1"),  # the rate counts at the game's own start only
                (5.8, 0, 0.9, 0, "progress again"),
            ],
            id="at the game's own start, success is progress",
        ),
    ],
)
def test_the_ladder(events: list[Event]) -> None:
    watched = ladder()
    for millions, start, rate, rung, said in events:
        note = watched.watch(frames=round(millions * 1e6), start=start, goal_rate=rate)
        assert watched.rung == rung, millions
        if said is None:
            assert note is None, millions
        else:
            assert note is not None, millions
            assert said in note


def test_each_rung_multiplies_both_coefficients() -> None:
    watched = ladder(rungs=3)
    remedies = []
    for step in range(6):
        watched.watch(frames=step * PATIENCE, start=50, goal_rate=None)
        remedies.append(watched.remedy)
    assert remedies == [
        Remedy(1, 1),
        Remedy(0.5, 0.25),
        Remedy(0.25, 0.0625),
        Remedy(0.125, 0.015625),
        Remedy(0.125, 0.015625),
        Remedy(0.125, 0.015625),
    ]
    assert watched.stalled
    watched.watch(frames=6 * PATIENCE, start=49, goal_rate=None)
    assert not watched.stalled
    assert watched.remedy == Remedy()


def test_all_remedies_can_be_taken_back() -> None:
    watched = ladder(rungs=1)
    for step in range(3):
        said = watched.watch(frames=step * PATIENCE, start=50, goal_rate=None)
    assert watched.stalled
    assert "no progress after 1 remedy, the last" in str(said)
    watched.relieve()
    assert (watched.stalled, watched.remedy) == (False, Remedy())


def test_without_rungs_nothing_is_tried_and_nothing_said() -> None:
    watched = ladder(rungs=0)
    for step in range(20):
        assert watched.watch(frames=step * PATIENCE, start=50, goal_rate=None) is None
    assert not watched.stalled
    assert watched.remedy == Remedy()


def state(start: int, rate: float | None, *, met: bool = False, began: int = 0) -> dict[str, Any]:
    """A run's state, as far as it tells which of two checkpoints is better."""
    watched = Ladder(Stall(), began)
    watched.watch(frames=began, start=start, goal_rate=rate)
    return {"stall": watched.state(), "goal": {"met": met}}


@pytest.mark.parametrize(
    ("now", "kept", "is_better"),
    [
        (state(60, None), state(100, None), True),
        (state(100, None), state(100, None), True),  # the newer of two
        (state(104, None), state(100, None), False),
        (state(0, 0.1), state(4, None), True),
        (state(4, 1.0), state(0, 0.1), False),
        (state(0, 0.5), state(0, 0.5), True),
        (state(0, 0.49), state(0, 0.5), False),
        (state(0, 0.2), state(0, 0.9, began=7), True),  # other rules: nothing to compare
        (state(0, 0.5, met=True), state(0, 0.9), True),
        (state(0, 0.5), {"stall": {}, "goal": {}}, True),  # of a version that did not tell it
    ],
)
def test_which_checkpoint_is_the_best(
    now: dict[str, Any], kept: dict[str, Any], is_better: bool
) -> None:
    assert better(now, kept) is is_better


@pytest.mark.parametrize(
    ("rungs", "rung", "stalled", "then"),
    [
        (3, 3, True, None),
        (6, 3, False, "remedy 4 of 6"),
        (1, 1, True, None),
        (0, 0, False, None),
    ],
)
def test_the_number_of_rungs_may_change(
    rungs: int, rung: int, stalled: bool, then: str | None
) -> None:
    before = ladder(rungs=3)
    for step in range(6):
        before.watch(frames=step * PATIENCE, start=50, goal_rate=None)
    assert before.stalled
    watched = ladder(rungs=rungs)
    watched.load(before.state())
    assert (watched.rung, watched.stalled) == (rung, stalled)
    note = watched.watch(frames=9 * PATIENCE, start=50, goal_rate=None)
    assert (note is None) if then is None else (note is not None and then in note)


def test_it_goes_on_from_its_state() -> None:
    watched, other = ladder(), ladder()
    for step in range(3):
        watched.watch(frames=step * PATIENCE, start=50, goal_rate=None)
    other.load(json.loads(json.dumps(watched.state())))
    assert other.remedy == watched.remedy == Remedy(0.25, 0.0625)
    said = [one.watch(frames=3 * PATIENCE, start=50, goal_rate=None) for one in (watched, other)]
    assert said[0] == said[1]
    assert other.stalled
