"""What a worker's /status says, checked where it comes in: nothing that a pod says may do harm."""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import Field

from demoreset_api import pace
from demoreset_api.names import ASIDE, CONFIRM
from demoreset_api.status import StatusModel

Text = Annotated[str, Field(max_length=100_000)]


class Curriculum(StatusModel):
    """Where in the demonstration the start is."""

    start_frame: int
    demo_frames: int
    progress: float
    success_rate: float | None = None
    goal_rate: float | None = None


class Training(StatusModel):
    """How the worker learns."""

    frames_per_second: float | None = None
    score_mean: float | None = None
    score_max: float | None = None
    entropy: float | None = None
    learning_rate: float | None = None
    stalled: bool = False
    eta_seconds: float | None = None


class Checkpoint(StatusModel):
    """The latest checkpoint."""

    update: int | None = None
    age_seconds: float | None = None
    bytes: int | None = None
    error: Text | None = None


class Evaluation(StatusModel):
    """The latest confirmation of the goal."""

    update: int | None = None
    episodes: int | None = None
    success_rate: float | None = None


class Resumed(StatusModel):
    """Where the run's latest life began, and the life of the checkpoint that it began with.

    life: 0 where it began with nothing; None where with no checkpoint, but among members that
        went on.
    """

    life: int | None = 0
    update: int = 0
    frames: int = 0


class WorkerStatus(StatusModel):
    """A worker's status; that of its first update and later has all parts."""

    world_size: int
    rank: int = 0  # of its first member in the group; who has 0 writes checkpoints
    phase: str = ""
    generation: int = 0
    life: int = 0
    resumed: Resumed = Resumed()
    update: int | None = None
    frames: int = 0
    seconds: float = 0
    curriculum: Curriculum | None = None
    evaluation: Evaluation = Evaluation()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()


@dataclass(frozen=True)
class Answer:
    """A worker's status, when it came, until when it holds, and when its update last moved.

    before: when the answer came that showed the update before that one; None where there is none.

    Only an answer that shows the same update once more tells that it stands: between two questions
    nothing is known, and with many workers minutes lie between them.
    """

    at: datetime
    until: datetime
    moved: datetime
    status: WorkerStatus
    before: datetime | None = None

    def trains(self, now: datetime) -> bool:
        """Whether the worker learns: it says so, and its updates go on."""
        learns = bool(self.status.update) and self.status.phase != ASIDE
        return learns and now <= self.until and self.stood <= self.patience

    @property
    def stood(self) -> timedelta:
        """For how long its answers have shown the same update."""
        return self.at - self.moved

    @property
    def patience(self) -> timedelta:
        """How long its updates may stand; some questions, where it is seldom asked.

        What it does between two questions, as a confirmation of the goal, is not seen.
        """
        usual = timedelta(seconds=pace.patience(self.status.update or 0, self.status.seconds))
        return max(usual, self.until - self.at)


def read(raw: bytes) -> WorkerStatus:
    """A worker's status.

    Raises:
        ValueError: it is none. (pydantic's ValidationError is one.)
        RecursionError: it is meant to do harm.
    """
    # What is not a number yet, JSON has no word for.
    content = json.loads(raw, parse_constant=lambda _: None)
    status = WorkerStatus.model_validate(content)
    if status.update is not None and status.curriculum is None:
        raise ValueError("an update without a curriculum")
    return status


def next_answer(
    before: Answer | None, status: WorkerStatus, at: datetime, holds: timedelta
) -> Answer:
    """A new answer, with what is known from the earlier ones.

    Args:
        before: The same worker's latest answer until now.
        status: What it says now.
        at: When that came.
        holds: For how long it is believed.
    """
    # The goal's episodes are played between two updates, and may take as long as they like; so may
    # a network that is slow; and who was not heard for long may have been cut off, or all of us
    # stopped.
    busy = status.phase in (CONFIRM, ASIDE)
    if before is None:
        return Answer(at, at + holds, at, status)
    if before.status.update != status.update:
        return Answer(at, at + holds, at, status, before.at)
    moved = at if busy or at > before.until else before.moved
    return Answer(at, at + holds, moved, status, before.before)
