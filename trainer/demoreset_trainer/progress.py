"""What one update tells the world: plain values, made by `loop`, shown by `report` and `screen`."""

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """A run after one update. Frames are emulator frames; totals are over all its lives."""

    # Where it is
    update: int
    frames: int  # of the whole run, over all its lives
    seconds: float  # of training, over all its lives
    episodes: int
    # The curriculum
    start_frame: int  # the frontier; 0 is the game's own start
    demo_frames: int
    success_rate: float  # of the starts around the frontier
    goal_rate: float | None  # of the latest episodes from the game's own start; None before any
    goal: float
    # The episodes that ended in this update
    ended: int
    outcomes: dict[str, int] = field(default_factory=dict)  # by how they ended
    episode_score_mean: float | None = None  # from whatever start; None where none ended
    episode_score_max: float | None = None
    score_mean: float | None = None  # of those from the game's own start
    score_max: float | None = None  # best score from there, of the whole run
    # The latest confirmation: the goal's episodes, played by a policy that was held still
    evaluation_update: int | None = None
    evaluation_episodes: int | None = None
    evaluation_rate: float | None = None
    # The optimisation
    learning_rate: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0
    guide_loss: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    clip_share: float = 0.0
    explained_variance: float = 0.0
    gradient_norm: float = 0.0
    entropy_coefficient: float = 0.0
    stall_rung: int = 0  # of the ladder of remedies; 0: none needed
    stalled: bool = False  # every rung was tried
    # The machine
    frames_per_second: float = 0.0  # over the latest updates
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of this update
    rejected_updates: int = 0  # of the whole run: not finite, gone back to the copy
    # The group
    members: int = 1
    generation: int = 0
    rank: int = 0  # of the member that tells this; the first one, 0, writes checkpoints
    roster: list[dict[str, Any]] = field(default_factory=list)  # each: id, pid, host, update
    recoveries: dict[str, int] = field(default_factory=dict)  # by cause
    recovery_seconds: dict[str, float] = field(default_factory=dict)  # by cause
    rolled_back: int = 0  # updates that a lost member interrupted; done again by the others
    frames_discarded: int = 0  # played by members before they were lost, and never learned from
    goodput: float = 1.0  # share of the time that was not spent on recoveries
    life: int = 0
    # Where its latest life began, and of which life its checkpoint was: see `Counters`
    resumed_life: int | None = 0
    resumed_update: int = 0
    resumed_frames: int = 0
    # What lies ahead
    budget_frames: int | None = None
    eta_seconds: float | None = None  # until the start is reached; None while unknown
    # The latest checkpoint; None before the first
    checkpoint_update: int | None = None
    checkpoint_age_seconds: float | None = None
    checkpoint_bytes: int | None = None
    checkpoint_seconds: float | None = None  # that writing it took
    checkpoint_error: str | None = None  # why the latest attempt failed

    @property
    def update_seconds(self) -> float:
        """Time that this update took, with its rollout and its confirmation, if any."""
        return sum(self.phase_seconds.values())

    @property
    def progress_ratio(self) -> float:
        """Share of the demo that the start has moved back over, 0 to 1."""
        return 1 - self.start_frame / self.demo_frames


class Watch(Protocol):
    """Who is told how the run goes."""

    def phase(self, name: str) -> None:
        """The loop has entered a phase."""

    def update(self, progress: Progress) -> None:
        """An update is done."""

    def note(self, text: str) -> None:
        """Something happened that a person wants to know."""
