"""When a run is done: pure code. A good record from the game's own start, then a confirmation.

The record is of a policy that changes while it is made. So once it is good enough the policy is
held still and plays the goal's number of episodes; only these decide.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from demoreset_api.spec import Goal
from demoreset_trainer.curriculum import Result

WINDOW = 100  # latest episodes from the game's own start that are remembered
EVIDENCE = 50  # episodes that say something: as many must be good before a confirmation


@dataclass(frozen=True)
class Evaluation:
    """A confirmation: so many of the episodes of one update's policy tied the demo."""

    update: int
    episodes: int
    successes: int

    @property
    def rate(self) -> float:
        """Success, 0 to 1."""
        return self.successes / self.episodes


class GoalWatch:
    """The latest episodes from the game's own start."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._latest: deque[bool] = deque(maxlen=WINDOW)
        self._since = 0  # episodes since the latest confirmation
        self.met = False
        self.evaluation: Evaluation | None = None  # the latest; only told

    def record(self, results: Iterable[Result]) -> None:
        """Take in an update's results."""
        new = [result.success for result in results if result.start == 0 and not result.explored]
        self._latest.extend(new)
        self._since += len(new)

    @property
    def rate(self) -> float | None:
        """Success from the game's own start, 0 to 1; None before any episode."""
        return sum(self._latest) / len(self._latest) if self._latest else None

    @property
    def sound_rate(self) -> float | None:
        """As `rate`, but None before there is evidence: of a few episodes it says little."""
        return self.rate if len(self._latest) >= EVIDENCE else None

    @property
    def promising(self) -> bool:
        """Whether a confirmation is worth its time."""
        latest = list(self._latest)[-EVIDENCE:]
        return (
            not self.met
            and self._since >= EVIDENCE
            and sum(latest) / EVIDENCE >= self._goal.success_rate
        )

    def enough(self, successes: Sequence[bool]) -> bool:
        """Whether these episodes meet the goal."""
        # The quotient, since 0.55 * 100 is a little more than 55.
        return sum(successes) / len(successes) >= self._goal.success_rate

    def confirm(self, successes: Sequence[bool], update: int) -> bool:
        """Decide by the episodes of one update's policy; after a failure it needs new evidence."""
        self.met = self.enough(successes)
        self.evaluation = Evaluation(update, len(successes), sum(successes))
        self._latest.extend(successes)
        self._since = 0
        return self.met

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as JSON."""
        evaluation = asdict(self.evaluation) if self.evaluation else None
        return self.decisive() | {"evaluation": evaluation}

    def decisive(self) -> dict[str, Any]:
        """What of it decides how a run goes on, as JSON."""
        return {"latest": list(self._latest), "since": self._since, "met": self.met}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._latest = deque(state["latest"], maxlen=WINDOW)
        self._since = int(state["since"])
        self.met = bool(state["met"])
        told = state.get("evaluation")  # not in the checkpoints of early versions
        self.evaluation = Evaluation(**told) if told else None

    def forget(self) -> None:
        """The confirmation was of another goal; the record stays."""
        self.met, self.evaluation = False, None
