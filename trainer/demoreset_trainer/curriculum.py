"""Where episodes begin, and when that moves: pure code. Results in, starts out.

Every slot of every member asks the same table, so the rule is the same for any size of the group.
Starts are frames of the demo, multiples of the frame skip; the curriculum knows nothing of games.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from demoreset_api.spec import CurriculumMode, CurriculumSpec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """How an episode ended: its slot, where it began, whether it tied the demo at its goal."""

    slot: int
    episode: int
    start: int
    success: bool
    score: int
    frames: int
    end: int
    explored: bool = False  # its first decisions were made with flattened probabilities


@dataclass(frozen=True)
class Guidance:
    """Which demo decisions guide the policy: those around the frontier, and all after them.

    first: The first one.
    after: The first after those around the frontier.
    weights: Of all from `first` on.
    """

    first: int
    after: int
    weights: Floats


class Curriculum(Protocol):
    """The rule that moves the start."""

    @property
    def frontier(self) -> int:
        """The earliest start that the policy is good enough at, in frames."""

    def choose(self, slot: int, random: np.random.Generator) -> int:
        """The start of the slot's next episode, in frames."""

    def record(self, results: Sequence[Result]) -> None:
        """Take in the results of one update, of all members, in the order of their slots."""

    def success_rate(self) -> float:
        """Success at the frontier, 0 to 1."""

    def guidance(self) -> Guidance:
        """Decisions of the demo from the frontier on, weighted by 1 - success."""

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""


class Adaptive:
    """A table of success with memory.

    Each start keeps its wins and its count, both worn down at each of its results. Neighbours
    lend each other evidence (a Gaussian over starts), so that the frontier, the earliest start
    whose success reaches the threshold, does not run ahead on one lucky start. It moves both ways.

    Most episodes begin in a window around the frontier; the rest after it, where success is
    neither sure nor hopeless; and once the frontier is the game's own start, half of all there.
    """

    SMOOTHING = 1.5  # standard deviation over starts
    MIN_COUNT = 2.5  # evidence that a start needs to be the frontier
    AHEAD = 2 / 3  # part of the window that lies after the frontier, on mastered ground
    GUIDE_BACK, GUIDE_AHEAD = 8, 24  # decisions around the frontier that guide

    def __init__(self, spec: CurriculumSpec, *, last_start: int, frame_skip: int) -> None:
        self._spec = spec
        self._skip = frame_skip
        self._starts = last_start // frame_skip + 1
        width = spec.in_force.window_frames // frame_skip
        self._ahead = max(1, round(width * self.AHEAD))
        self._back = max(1, width - self._ahead)
        self._window_share = spec.in_force.window_share
        # With a horizon the game's own start alone is judged by all of the demo: what others reach
        # is no evidence for it, and it is practised as soon as its neighbour is good enough.
        self._whole = int(spec.horizon_frames is not None)
        self._needed = np.full(self._starts, self.MIN_COUNT)
        # Its own count, to which no neighbour adds, tends to 1 / (1 - memory).
        self._needed[: self._whole] = min(self.MIN_COUNT, 0.9 / (1 - spec.memory))
        self._wins = np.zeros(self._starts)
        self._counts = np.zeros(self._starts)
        self._recompute()

    @property
    def frontier(self) -> int:
        return self._frontier * self._skip

    def _recompute(self) -> None:
        """Work out, once per update, all that `choose` needs."""
        wins, counts = self._shared(self._wins), self._shared(self._counts)
        self.success = wins / np.maximum(counts, 1e-9)
        good = (self.success >= self._spec.threshold) & (counts >= self._needed)
        reached = np.flatnonzero(good)
        self._frontier = int(reached[0]) if len(reached) else self._starts - 1
        low = max(0, self._frontier - self._back)
        high = min(self._starts, self._frontier + self._ahead)
        self._window = low, high
        p = self.success[high:]
        unsure = np.sqrt(p * (1 - p)) + 0.02
        self._rehearsal = np.cumsum(unsure)

    def _shared(self, table: Floats) -> Floats:
        """A table in which neighbours lend each other what they know."""
        lent = table.copy()
        lent[: self._whole] = 0
        shared = _smooth(lent, self.SMOOTHING)
        shared[: self._whole] = table[: self._whole]
        return shared

    def choose(self, slot: int, random: np.random.Generator) -> int:
        if self._frontier <= self._whole and random.random() < self._spec.start_share:
            return 0
        low, high = self._window
        if len(self._rehearsal) and random.random() >= self._window_share:
            ticket = random.random() * self._rehearsal[-1]
            return (high + int(np.searchsorted(self._rehearsal, ticket))) * self._skip
        return int(random.integers(low, high)) * self._skip

    def record(self, results: Sequence[Result]) -> None:
        for result in results:
            if result.explored:  # flattened logits lower the success at places of exact timing
                continue
            start = result.start // self._skip
            self._wins[start] = self._wins[start] * self._spec.memory + result.success
            self._counts[start] = self._counts[start] * self._spec.memory + 1
        self._recompute()

    def success_rate(self) -> float:
        low, high = self._window
        counts = self._counts[low:high].sum()
        return float(self._wins[low:high].sum() / counts) if counts else 0.0

    def guidance(self) -> Guidance:
        first = max(0, self._frontier - self.GUIDE_BACK)
        after = min(self._starts, self._frontier + self.GUIDE_AHEAD)
        return Guidance(first, after, 1 - self.success[first:])

    def state(self) -> dict[str, Any]:
        return {"wins": self._wins.tolist(), "counts": self._counts.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        self._wins = np.array(state["wins"])
        self._counts = np.array(state["counts"])
        self._recompute()


class Original:
    """The rule of openai/atari-reset, less its known defects.

    Every slot owns a point in a window below the maximum; it begins there, or with a small chance
    anywhere after it. Success per start is overwritten by each period's results; the new maximum
    is the first start at which the success accumulated from the demo's beginning, divided by the
    window's width, reaches the threshold; if there is none, it goes back 100 frames towards the
    end. Mended: the width counts the points (theirs was one too small, and 0 for one slot), and of
    them those that there are between the maximum and the game's own start: divided by all of them
    the maximum comes no nearer to it than a fifth of the window, with every success. And points
    that reached the start move away from it again with the others.
    """

    PERIOD_STEPS = 1024  # vector steps between two moves
    RETREAT = 100  # frames towards the demo's end when the threshold is never reached

    def __init__(
        self,
        spec: CurriculumSpec,
        *,
        last_start: int,
        frame_skip: int,
        slots: int,
        rollout_length: int,
    ) -> None:
        self._threshold = spec.threshold
        self._share = spec.in_force.window_share
        self._skip = frame_skip
        self._starts = last_start // frame_skip + 1
        window = max(1, spec.in_force.window_frames // frame_skip)
        per_point = -(-slots // window)
        self._point = np.arange(slots) // per_point  # decisions below the maximum
        self._width = int(self._point[-1]) + 1
        self._period = max(1, self.PERIOD_STEPS // rollout_length)
        self._rollout = rollout_length
        self._maximum = self._starts - 1
        self._success = np.zeros(self._starts)
        self._wins = np.zeros(self._starts)
        self._counts = np.zeros(self._starts)
        self._updates = 0
        self._rate = 0.0

    @property
    def frontier(self) -> int:
        return self._maximum * self._skip

    def choose(self, slot: int, random: np.random.Generator) -> int:
        point = max(0, self._maximum - int(self._point[slot]))
        if random.random() >= self._share:
            point = int(random.integers(point, self._starts))
        return point * self._skip

    def record(self, results: Sequence[Result]) -> None:
        for result in results:
            self._wins[result.start // self._skip] += result.success
            self._counts[result.start // self._skip] += 1
        self._updates += 1
        warm = self._updates * self._rollout > (self._starts - 1 - self._maximum) * self._skip / 2
        if self._updates % self._period == 0 and warm:
            self._move()

    def _move(self) -> None:
        seen = self._counts > 0
        self._success[seen] = self._wins[seen] / self._counts[seen]
        self._rate = self._success_now(0.0)
        points = min(self._width, self._maximum + 1)
        reached = np.flatnonzero(np.cumsum(self._success) / points >= self._threshold)
        if len(reached):
            self._maximum = int(reached[0])
        else:
            self._maximum = min(self._starts - 1, self._maximum + self.RETREAT // self._skip)
        self._wins[:] = 0
        self._counts[:] = 0

    def success_rate(self) -> float:
        return self._success_now(self._rate)

    def _success_now(self, otherwise: float) -> float:
        """Share of successes around the frontier since the latest move, if any episode ended."""
        window = slice(max(0, self._maximum - self._width + 1), self._maximum + 1)
        counts = self._counts[window].sum()
        return float(self._wins[window].sum() / counts) if counts else otherwise

    def guidance(self) -> Guidance:
        first = max(0, self._maximum - self._width + 1)
        return Guidance(first, self._maximum + 1, 1 - self._success[first : self._maximum + 1])

    def state(self) -> dict[str, Any]:
        return {
            "maximum": self._maximum,
            "success": self._success.tolist(),
            "wins": self._wins.tolist(),
            "counts": self._counts.tolist(),
            "updates": self._updates,
            "rate": self._rate,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._maximum = int(state["maximum"])
        self._success = np.array(state["success"])
        self._wins = np.array(state["wins"])
        self._counts = np.array(state["counts"])
        self._updates = int(state["updates"])
        self._rate = float(state["rate"])


def make_curriculum(
    spec: CurriculumSpec, *, last_start: int, frame_skip: int, slots: int, rollout_length: int
) -> Curriculum:
    """The curriculum of a spec; `last_start`: the latest frame that an episode may begin at."""
    if spec.mode is CurriculumMode.ORIGINAL:
        return Original(
            spec,
            last_start=last_start,
            frame_skip=frame_skip,
            slots=slots,
            rollout_length=rollout_length,
        )
    return Adaptive(spec, last_start=last_start, frame_skip=frame_skip)


def _smooth(table: Floats, deviation: float) -> Floats:
    reach = np.arange(-int(4 * deviation), int(4 * deviation) + 1)
    kernel = np.exp(-0.5 * (reach / deviation) ** 2)
    # The kernel's middle is 1: a start's own evidence counts in full, its neighbours' adds to it.
    padded: Floats = np.convolve(table, kernel)
    return padded[-reach[0] : len(padded) + reach[0]]
