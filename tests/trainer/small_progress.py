"""What a run tells, for tests of those who show it."""

from dataclasses import fields, replace
from typing import Any

from demoreset_trainer.progress import Progress

PROGRESS = Progress(
    update=7,
    frames=57_344,
    seconds=65.4,
    episodes=300,
    start_frame=89,
    demo_frames=356,
    success_rate=0.25,
    goal_rate=None,
    goal=0.9,
    ended=3,
    outcomes={"SUCCESS": 2, "LIFE_LOST": 1},
    learning_rate=4e-4,
    entropy=1.25,
    frames_per_second=9000.0,
    phase_seconds={"rollout": 0.5},
    eta_seconds=120.0,
)

# Every number of it is another, so that two fields that were mixed up are seen.
_NUMBERS: dict[str, Any] = {
    field.name: number
    for number, field in enumerate(fields(Progress), 101)
    if field.type in (int, float, int | None, float | None)
}
DISTINCT = replace(PROGRESS, **_NUMBERS, stalled=True, checkpoint_error="no space left")
