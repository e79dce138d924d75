"""What a run tells after each update: where it stands, how fast it is, where its time goes."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from demoreset_api.spec import RunSpec
from demoreset_trainer.curriculum import Result
from demoreset_trainer.env import End
from demoreset_trainer.group import Quorum
from demoreset_trainer.ppo import Statistics
from demoreset_trainer.progress import Progress, Watch
from demoreset_trainer.run_state import RunState


class Telling:
    """Times the phases of the loop, and makes a `Progress` of each update for the watch."""

    def __init__(self, spec: RunSpec, demo_frames: int, watch: Watch) -> None:
        self._spec, self._demo_frames, self._watch = spec, demo_frames, watch
        self._phases: dict[str, float] = {}
        self._speed: deque[tuple[float, int]] = deque(maxlen=30)
        self._moves: deque[tuple[float, int]] = deque(maxlen=200)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The loop is in a phase; its time counts to the next update that is told."""
        self._watch.phase(name)
        begun = time.monotonic()
        try:
            yield
        finally:  # what is done again because a member was lost took its time, too
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - begun

    def update(
        self,
        state: RunState,
        statistics: Statistics,
        results: Sequence[Result],
        quorum: Quorum,
        *,
        learning_rate: float,
        entropy_coefficient: float,
        checkpoint: dict[str, Any],
    ) -> None:
        """An update is done."""
        spec, counters = self._spec, state.counters
        frontier, evaluation = state.curriculum.frontier, state.goal.evaluation
        self._speed.append((counters.seconds, counters.frames))
        self._moves.append((counters.seconds, frontier))
        scores = [result.score for result in results]
        from_start = [result.score for result in results if result.start == 0]
        self._watch.update(
            Progress(
                life=state.life,
                update=counters.update,
                frames=counters.frames,
                seconds=counters.seconds,
                episodes=counters.episodes,
                start_frame=frontier,
                demo_frames=self._demo_frames,
                success_rate=state.curriculum.success_rate(),
                goal_rate=state.goal.rate,
                goal=spec.goal.success_rate,
                evaluation_update=evaluation.update if evaluation else None,
                evaluation_episodes=evaluation.episodes if evaluation else None,
                evaluation_rate=evaluation.rate if evaluation else None,
                ended=len(results),
                outcomes=dict(Counter(End(result.end).name for result in results)),
                episode_score_mean=float(np.mean(scores)) if scores else None,
                episode_score_max=max(scores, default=None),
                score_mean=float(np.mean(from_start)) if from_start else None,
                score_max=counters.score_max,
                learning_rate=learning_rate,
                entropy_coefficient=entropy_coefficient,
                stall_rung=state.ladder.rung,
                stalled=state.ladder.stalled,
                **asdict(statistics),
                frames_per_second=_slope(self._speed),
                phase_seconds=self._phases,
                rejected_updates=counters.rejected,
                members=len(quorum.members),
                generation=quorum.generation,
                rank=quorum.rank,
                roster=quorum.roster,
                recoveries=dict(counters.recoveries),
                recovery_seconds=dict(counters.recovery_seconds),
                rolled_back=counters.rolled_back,
                frames_discarded=counters.frames_discarded,
                resumed_life=counters.resumed_life,
                resumed_update=counters.resumed_update,
                resumed_frames=counters.resumed_frames,
                goodput=counters.goodput,
                budget_frames=spec.budget.frames,
                eta_seconds=self._eta(frontier),
                **checkpoint,
            )
        )
        self._phases = {}

    def _eta(self, frontier: int) -> float | None:
        """Seconds until the start is reached, at the pace of the latest updates."""
        pace = -_slope(self._moves)
        return frontier / pace if pace > 0 else None


def _slope(points: deque[tuple[float, int]]) -> float:
    """Change per second between the first and the last of the points."""
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return 0.0
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
