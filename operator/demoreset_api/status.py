"""The status of a DemoResetRun: what the operator tells, and what it must not forget."""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import ConfigDict, Field

from demoreset_api.spec import ApiModel

MAX_MESSAGE = 1024  # characters of what a worker or a pod said
KEPT_ATTEMPTS = 20


class StatusModel(ApiModel):
    """The status or a part of it: what a later version has added is passed over."""

    model_config = ConfigDict(extra="ignore")


class Phase(StrEnum):
    """A run in one word, for people; made from the conditions."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """What machines ask for."""

    RUNNING = "Running"  # a worker trains
    COMPLETE = "Complete"  # the goal is met
    FAILED = "Failed"  # it will not be met without a person
    SUSPENDED = "Suspended"  # spec.suspend, and no pods are left
    STALLED = "Stalled"  # all remedies against a plateau were tried
    CHECKPOINT_READY = "CheckpointReady"  # what was learned is on the volume


class Condition(StatusModel):
    """As Kubernetes has it (metav1.Condition)."""

    type: ConditionType = Field(description="What is, or is not, so.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: str = Field(max_length=1024, description="Why, in a word.")
    message: str = Field(max_length=32768, description="Why, for people.")
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int = Field(default=0, description="Of the spec that it speaks of.")


class Cause(StrEnum):
    """Why a worker's pod ended."""

    CRASHED = "Crashed"
    OUT_OF_MEMORY = "OutOfMemory"
    TRY_AGAIN = "TryAgain"  # the coordinator or the volume was away
    DRAINED = "Drained"  # SIGTERM; the state was saved
    EVICTED = "Evicted"  # by the kubelet, a drain or the scheduler
    NODE_LOST = "NodeLost"
    HUNG = "Hung"  # no update for long; replaced by the operator
    DELETED = "Deleted"
    REPLACED = "Replaced"  # by the operator: its template has changed
    DONE = "Done"
    BUDGET_SPENT = "BudgetSpent"
    WRONG_RUN = "WrongRun"
    NO_VALID_CHECKPOINT = "NoValidCheckpoint"
    NO_PROGRESS = "NoProgress"


class CurriculumStatus(StatusModel):
    """Where in the demonstration the start is."""

    start_frame: int = Field(description="The earliest start mastered; 0 is the game's own.")
    demo_frames: int = Field(description="Length of what is learned.")
    progress: str = Field(description="Share of the demo that the start has moved back over.")
    success_rate: float | None = Field(default=None, description="Around the frontier.")
    goal_rate: float | None = Field(default=None, description="From the game's own start.")
    last_move: datetime | None = Field(default=None, description="When the start last moved.")


class TrainingStatus(StatusModel):
    """How it learns."""

    frames: int = Field(default=0, description="Emulator frames.")
    update: int = Field(default=0, description="Updates done.")
    seconds: float = Field(default=0, description="Spent on training.")
    life: int = Field(
        default=0,
        description="Which of the run's lives: it begins one when it is read from disk, or loses "
        "members together with the coordinator.",
    )
    frames_per_second: float | None = Field(default=None, description="Lately.")
    score_mean: float | None = Field(default=None, description="From the game's own start.")
    score_max: float | None = Field(default=None, description="Best from the game's own start.")
    entropy: float | None = Field(default=None, description="Of the policy, in nats.")
    learning_rate: float | None = Field(
        default=None, description="With remedies; less near the goal."
    )
    eta_seconds: float | None = Field(default=None, description="Until the start is reached.")


class WorkersStatus(StatusModel):
    """The group's pods and members."""

    wanted: int = Field(default=0, description="Pods that there should be.")
    current: int = Field(default=0, description="Pods that there are.")
    ready: int = Field(default=0, description="Pods whose worker trains.")
    shown: str = Field(default="", description="Ready of wanted.")
    selector: str = Field(default="", description="Finds the pods.")
    members: int = Field(default=0, description="Members that train together.")
    generation: int = Field(default=0, description="Number of the group's composition.")


class CheckpointStatus(StatusModel):
    """The latest checkpoint."""

    update: int | None = Field(default=None, description="Of which update.")
    time: datetime | None = Field(default=None, description="When it was written.")
    bytes: int | None = Field(default=None, description="Its size.")
    error: str | None = Field(
        default=None, max_length=MAX_MESSAGE, description="Why none is written."
    )


class EvaluationStatus(StatusModel):
    """The goal's episodes, played by a policy that was held still."""

    update: int = Field(description="Whose policy.")
    episodes: int = Field(description="Played from the game's own start.")
    success_rate: float = Field(description="Share of them that tied the demonstration.")


class Attempt(StatusModel):
    """One incarnation of a worker that has ended."""

    worker: int = Field(description="Which worker.")
    attempt: int = Field(description="Which incarnation of it.")
    pod: str = Field(description="The pod's name.")
    node: str | None = Field(default=None, description="Where it ran.")
    cause: Cause = Field(description="Why it ended.")
    counts: bool = Field(default=False, description="Whether it counts against a limit.")
    exit_code: int | None = Field(default=None, description="Of the worker.")
    message: str = Field(default="", max_length=MAX_MESSAGE, description="The worker's last words.")
    update: int | None = Field(default=None, description="Where the run was then.")
    frames: int | None = Field(default=None, description="Emulator frames of the run then.")
    life: int | None = Field(default=None, description="Which of the run's lives that was.")
    started: datetime | None = Field(default=None, description="When the container began.")
    ended: datetime = Field(
        description="When it ended, or was told to, by the pod itself; where that says nothing, "
        "when it was found."
    )
    found: datetime | None = Field(
        default=None, description="When that was found, where the pod itself says when it ended."
    )
    recovery_seconds: float | None = Field(
        default=None,
        description="From its end until the run was seen to learn again: of workers that went on, "
        "by two answers, which are seconds apart.",
    )
    resumed_from: int | None = Field(
        default=None,
        description="The update whose checkpoint the run went on from, where nobody else went on.",
    )
    lost_frames: int | None = Field(
        default=None,
        description="Of the run, that were told of and are not in that checkpoint; the same number "
        "for all that were lost together.",
    )

    @property
    def found_at(self) -> datetime:
        """When the operator found that it had ended: by its own clock, as all that it hears."""
        return self.found or self.ended


class Place(StatusModel):
    """What is known of a worker over all its attempts."""

    worker: int = Field(description="Which worker.")
    attempt: int = Field(default=0, description="Its latest incarnation that was seen.")
    ended: int = Field(default=0, description="Its latest incarnation that has ended.")
    failures: int = Field(default=0, description="In a row.")
    ran: bool = Field(default=False, description="Whether the container of one ever began.")
    replaced: bool = Field(
        default=False, description="Whether the operator replaced the latest that ran."
    )
    not_before: datetime | None = Field(default=None, description="When the next may start.")


class Restarts(StatusModel):
    """How often workers were started again."""

    total: int = Field(default=0, description="All.")
    counted: int = Field(default=0, description="Those that count against a limit.")
    out_of_memory: int = Field(default=0, description="Of these, for want of memory.")
    hung: int = Field(default=0, description="Of these, for a hang.")

    @property
    def crashed(self) -> int:
        """Restarts that count, and were not for want of memory nor for a hang."""
        return self.counted - self.out_of_memory - self.hung


class RunStatus(StatusModel):
    """How a run is."""

    observed_generation: int = Field(default=0, description="Of the spec that this speaks of.")
    phase: Phase = Field(default=Phase.PENDING, description="For people.")
    conditions: list[Condition] = Field(
        default=[], max_length=8, description="For machines.", json_schema_extra={"key": "type"}
    )
    curriculum: CurriculumStatus | None = Field(default=None, description="Where the start is.")
    training: TrainingStatus | None = Field(default=None, description="How it learns.")
    workers: WorkersStatus = Field(default=WorkersStatus(), description="The group.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The latest one.")
    evaluation: EvaluationStatus | None = Field(
        default=None, description="The latest confirmation of the goal, met or not."
    )
    restarts: Restarts = Field(default=Restarts(), description="How often workers came again.")
    attempts: list[Attempt] = Field(
        default=[], max_length=KEPT_ATTEMPTS, description="Workers that ended, the latest last."
    )
    places: list[Place] = Field(
        default=[], max_length=1024, description="What the operator remembers of each worker."
    )
    started: datetime | None = Field(default=None, description="When its pods were first made.")
    active_since: datetime | None = Field(
        default=None, description="When they were last made after a pause."
    )
    begun: datetime | None = Field(
        default=None, description="When a worker's container first began since then."
    )
    finished: datetime | None = Field(default=None, description="When it completed or failed.")

    @property
    def saved(self) -> bool:
        """Whether there was ever a checkpoint."""
        return self.checkpoint is not None and self.checkpoint.update is not None
