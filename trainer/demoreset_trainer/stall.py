"""What is tried when a run no longer learns: pure code.

atari-reset told its users to lower the learning rate and the entropy term by hand when training
stops making progress. Here a plateau does that: each rung of the ladder lowers both, progress goes
back to the ground, and after the last rung the run says that it is stalled.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from demoreset_api.spec import Stall


@dataclass(frozen=True)
class Remedy:
    """What the coefficients of the spec are multiplied with."""

    learning_rate: float = 1.0
    entropy: float = 1.0


@dataclass
class _State:
    best_start: int | None = None  # the earliest frontier so far
    best_goal_rate: float = 0.0  # success from the game's own start at the latest progress
    since: int = 0  # frames at the latest progress or rung
    rung: int = 0
    stalled: bool = False
    # Where the run stands: kept with every checkpoint, to tell which is the best.
    began: int = 0  # frames at which what is judged became what it is
    start: int | None = None
    goal_rate: float = 0.0


class Ladder:
    """Watches the frontier, and once it is the game's own start, the success from there."""

    MIN_GAIN = 0.05  # of success from the game's own start that counts as progress

    def __init__(self, spec: Stall, frames: int = 0) -> None:
        self._spec = spec
        self._state = _State(since=frames, began=frames)

    @property
    def rung(self) -> int:
        """How many remedies are in force."""
        return self._state.rung

    @property
    def stalled(self) -> bool:
        """Whether all of them were tried in vain."""
        return self._state.stalled

    @property
    def remedy(self) -> Remedy:
        """What is in force."""
        spec, rung = self._spec, self._state.rung
        return Remedy(spec.learning_rate_factor**rung, spec.entropy_factor**rung)

    def watch(self, *, frames: int, start: int, goal_rate: float | None) -> str | None:
        """Look at the run after an update; a sentence where something changed."""
        state, spec = self._state, self._spec
        rate = goal_rate or 0.0
        state.start, state.goal_rate = start, rate
        if self._took_progress(start, rate):
            relieved = state.rung
            state.since, state.rung, state.stalled = frames, 0, False
            return "progress again: the spec's own learning rate and entropy" if relieved else None
        if not spec.rungs or frames - state.since < spec.patience_frames or state.stalled:
            return None
        waited = frames - state.since
        state.since = frames
        if state.rung >= spec.rungs:
            state.stalled = True
            tried = "1 remedy" if spec.rungs == 1 else f"{spec.rungs} remedies"
            return (
                f"stalled at frame {start}: no progress after {tried}, the last of {waited:,} "
                "frames; `demoreset video` from a little behind it shows what happens"
            )
        state.rung += 1
        return (
            f"no progress for {waited:,} frames: learning rate x {self.remedy.learning_rate:g}, "
            f"entropy x {self.remedy.entropy:g} (remedy {state.rung} of {spec.rungs})"
        )

    def relieve(self) -> None:
        """Take all remedies back."""
        self._state.rung, self._state.stalled = 0, False

    def restart(self, frames: int) -> None:
        """Wait for progress from now on, as nobody watched for a while."""
        self._state.since, self._state.best_goal_rate = frames, 0.0

    def _took_progress(self, start: int, goal_rate: float) -> bool:
        """Remember the best so far; whether this is better."""
        state = self._state
        earlier = state.best_start is None or start < state.best_start
        better = start == 0 and goal_rate >= state.best_goal_rate + self.MIN_GAIN
        if earlier:
            state.best_start = start
        if better:
            state.best_goal_rate = goal_rate
        return earlier or better

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as JSON."""
        return asdict(self._state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, perhaps with another number of rungs."""
        known = {field.name for field in fields(_State)}
        kept = _State(**{name: value for name, value in state.items() if name in known})
        rungs = self._spec.rungs
        kept.stalled = kept.stalled and kept.rung >= rungs > 0
        kept.rung = min(kept.rung, rungs)
        self._state = kept


def better(now: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether a checkpoint is at least as good as the one that is kept as the best.

    That one, and not the best of all updates: most of them are never saved.

    Args:
        now: The run's state in it, a `RunState.state`.
        kept: That in the other.
    """
    if now["goal"]["met"]:
        return True
    ours, theirs = _State(**now["stall"]), kept["stall"]
    if theirs.get("start") is None or ours.start is None or theirs.get("began") != ours.began:
        return True
    if ours.start != theirs["start"]:
        return bool(ours.start < theirs["start"])
    return ours.start > 0 or bool(ours.goal_rate >= theirs["goal_rate"])
