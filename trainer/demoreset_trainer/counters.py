"""What a run has done, over all its lives: part of its state, the same for all members."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class Cause(StrEnum):
    """What a group recovers from."""

    COLLECTIVE = "collective"  # a member was lost while gradients were summed
    LEFT = "left"  # one was gone at the quorum
    JOINED = "joined"  # one came
    COORDINATOR = "coordinator"  # it was away


def losses(recoveries: Mapping[str, int]) -> int:
    """How many of a group's changes (by `Cause`) were losses: who joins is none."""
    return sum(count for cause, count in recoveries.items() if cause != Cause.JOINED)


@dataclass
class Counters:
    """Totals of a run."""

    update: int = 0
    frames: int = 0
    episodes: int = 0
    seconds: float = 0.0
    score_max: float | None = None
    rejected: int = 0
    start_reached_frames: int | None = None  # when the frontier first was the game's own start
    start_reached_seconds: float | None = None
    # Where its latest life began, and the life of the checkpoint that it began with; 0: with
    # nothing, None: with no checkpoint, but among members that went on
    resumed_life: int | None = 0
    resumed_update: int = 0
    resumed_frames: int = 0
    # The group's faults: as the member saw them whose state went on
    recoveries: dict[str, int] = field(default_factory=dict)  # by `Cause`
    recovery_seconds: dict[str, float] = field(default_factory=dict)
    rolled_back: int = 0
    frames_discarded: int = 0

    def resumed(self, life: int | None) -> None:
        """A life begins here: with a checkpoint of this life, or, with None, among members."""
        self.resumed_life = life
        self.resumed_update, self.resumed_frames = self.update, self.frames

    def recovered(self, cause: str, since: float) -> None:
        """Something was lost, or came, and has cost the time since then (time.monotonic)."""
        seconds = time.monotonic() - since
        self.recoveries[cause] = self.recoveries.get(cause, 0) + 1
        self.recovery_seconds[cause] = self.recovery_seconds.get(cause, 0.0) + seconds

    def seen(self) -> dict[str, Any]:
        """What members see differently: the outage of a coordinator, or how long a loss took."""
        return {
            "recoveries": self.recoveries,
            "recovery_seconds": self.recovery_seconds,
            "rolled_back": self.rolled_back,
        }

    def agree(self, seen: Iterable[dict[str, Any]]) -> None:
        """Take the most that any member has `seen`: a total must not fall with who tells it."""
        for theirs in seen:
            self.rolled_back = max(self.rolled_back, theirs["rolled_back"])
            for ours, others in (
                (self.recoveries, theirs["recoveries"]),
                (self.recovery_seconds, theirs["recovery_seconds"]),
            ):
                ours.update({cause: max(ours.get(cause, 0), n) for cause, n in others.items()})

    @property
    def goodput(self) -> float:
        """Share of the training's time that was not spent on recoveries."""
        lost = sum(self.recovery_seconds.values())
        return max(0.0, 1 - lost / self.seconds) if self.seconds else 1.0

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    @classmethod
    def load(cls, state: dict[str, Any]) -> Self:
        """From a `state`, also one of a version that counted other things."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in known})
