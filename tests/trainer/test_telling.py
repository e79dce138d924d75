"""What an update tells that was worked out for it: of which episodes, and at which pace."""

from collections.abc import Sequence
from contextlib import suppress

import pytest

from demoreset_api.spec import RunSpec
from demoreset_trainer.curriculum import Result
from demoreset_trainer.demo import Demo
from demoreset_trainer.group import Quorum
from demoreset_trainer.ppo import Statistics
from demoreset_trainer.progress import Progress
from demoreset_trainer.run_state import RunState
from demoreset_trainer.telling import Telling
from small_run import Diary


class Story:
    """A run whose start stands where it is put, at the time that is said."""

    def __init__(self, demo: Demo) -> None:
        spec = RunSpec.model_validate({"demo": {"name": "x"}, "curriculum": {"mode": "Original"}})
        self._state, self._diary = RunState(spec, demo), Diary()
        self._telling = Telling(spec, len(demo), self._diary)

    def tell(self, seconds: float, frontier: int, results: Sequence[Result] = ()) -> Progress:
        curriculum = self._state.curriculum
        curriculum.load(curriculum.state() | {"maximum": frontier // 4})
        self._state.counters.seconds = seconds
        quorum = Quorum(1, 0, ("a",))
        self._telling.update(
            self._state,
            Statistics(),
            results,
            quorum,
            learning_rate=1e-4,
            entropy_coefficient=0.0,
            checkpoint={},
        )
        return self._diary.progress[-1]


@pytest.mark.parametrize(
    ("moves", "eta"),  # seconds and frontier of each update
    [
        ([(10, 100)], None),
        ([(10, 100), (30, 60)], 30.0),
        ([(10, 100), (20, 100), (30, 60)], 30.0),
        ([(10, 100), (30, 60), (40, 76)], 95.0),  # it went back a little, but moves on the whole
        ([(10, 40), (20, 0)], 0.0),
        ([(10, 60), (30, 100)], None),
        ([(10, 60), (30, 60)], None),
        ([(10, 100), (10, 60)], None),
        ([(0, 80), *((1000 + update, 40) for update in range(200))], None),  # lately it stands
    ],
)
def test_when_the_start_will_be_reached(
    freeway: Demo, moves: list[tuple[float, int]], eta: float | None
) -> None:
    story = Story(freeway)
    told = [story.tell(seconds, frontier) for seconds, frontier in moves]
    assert told[-1].start_frame == moves[-1][1]
    assert told[-1].eta_seconds == (None if eta is None else pytest.approx(eta))


@pytest.mark.parametrize(
    ("episodes", "mean"),  # each its start and score
    [([], None), ([(4, 7)], None), ([(0, 0)], 0.0), ([(0, 2), (4, 90), (0, 3)], 2.5)],
)
def test_scores_are_told_of_all_episodes_and_of_those_from_the_games_own_start(
    freeway: Demo, episodes: list[tuple[int, int]], mean: float | None
) -> None:
    results = [
        Result(0, number, start, True, score, 10, 1)
        for number, (start, score) in enumerate(episodes)
    ]
    told = Story(freeway).tell(1, 40, results)
    assert told.score_mean == mean
    scores = [score for _, score in episodes]
    assert told.episode_score_max == max(scores, default=None)
    assert told.episode_score_mean == (sum(scores) / len(scores) if scores else None)


def test_an_attempt_that_failed_took_its_time_too() -> None:
    telling = Telling(RunSpec.model_validate({"demo": {"name": "x"}}), 100, Diary())
    with suppress(ValueError), telling.phase("optimise"):
        raise ValueError
    assert telling._phases["optimise"] >= 0
