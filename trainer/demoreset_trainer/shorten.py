"""Making a found way shorter, smoother and safer: local search on its actions.

Random exploration dawdles and twitches. A change of the way is kept when the wanted score is still
reached, no later and without losing a life: decisions are cut out, odd ones replaced by their
neighbours. Of several ways the one that survives small disturbances is preferred, since a policy
that learns from it will be disturbed by its own mistakes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from ale_py import ALEState

from demoreset_trainer.emulator import Emulator
from demoreset_trainer.explore import FRAME_SKIP

NOOP = 0
LONGEST_CUT = 8  # decisions
TRIED = 4  # candidates
SAFER = 1.15  # a safer way may be so much longer than the shortest


class Course:
    """One game in which ways are tried; `actions` are indices into the game's own actions."""

    def __init__(self, game: str, wanted: int) -> None:
        self._emulator = Emulator(game)
        self._codes = self._emulator.minimal_actions
        self._wanted = wanted
        self._marks: list[tuple[ALEState, int]] = []  # state and score before each decision
        self._emulator.reset()
        at_power_on = self._emulator.lives()  # in some games fewer than the first frame gives
        self._emulator.act(NOOP)
        self._lives = max(at_power_on, self._emulator.lives())
        self.tried = 0  # decisions

    def walk(self, actions: Sequence[int], begin: int = 0) -> int | None:
        """Decisions until the wanted score, trying `actions` from `begin` on; None: not reached.

        What lies before `begin` must be as in the latest way that was `mark`ed.
        """
        emulator = self._emulator
        if begin:
            state, score = self._marks[begin]
            emulator.restore_clone(state)
        else:
            emulator.reset()
            score = 0
        for number in range(begin, len(actions)):
            score += self._act(actions[number])
            if emulator.game_over() or emulator.lives() < self._lives:
                return None
            if score >= self._wanted:
                return number + 1
        return None

    def _act(self, action: int) -> int:
        self.tried += 1
        code, act = self._codes[action], self._emulator.act
        return sum(act(code) for _ in range(FRAME_SKIP))

    def mark(self, actions: Sequence[int]) -> None:
        """Remember the states along a way, so that what follows can be tried from the middle."""
        self._marks = []
        self._emulator.reset()
        score = 0
        for action in actions:
            self._marks.append((self._emulator.clone(), score))
            score += self._act(action)

    def survival(self, actions: Sequence[int]) -> float:
        """Share of disturbances after which the rest of the way still succeeds.

        One at each decision: it is done twice, or not at all.
        """
        self.mark(actions)
        survived = 0
        for number in range(1, len(actions) - 1):
            late = [*actions[:number], actions[number], *actions[number:]]
            early = [*actions[:number], *actions[number + 1 :]]
            survived += self.walk(late, number) is not None
            survived += self.walk(early, number) is not None
        return survived / max(1, 2 * (len(actions) - 2))


def shorten(
    course: Course, way: Sequence[int], watch: Callable[[int, float], None] = lambda *_: None
) -> list[int]:
    """Cut out and smooth, place by place, until a whole pass finds nothing.

    `watch` is told the way's length, and the share of the pass that is done.
    """
    best = list(way)
    course.mark(best)
    while True:
        before = best
        for size in range(LONGEST_CUT, -1, -1):  # cuts, and with size 0 replacements
            place = 0
            while place < len(best):
                watch(len(best), (LONGEST_CUT - size + place / len(best)) / (LONGEST_CUT + 1))
                for changed in _changes(best, place, size):
                    reached = course.walk(changed, place)
                    if reached is not None and _better(changed[:reached], best):
                        best = changed[:reached]
                        course.mark(best)
                        break
                else:
                    place += 1
        if best == before:
            return best


def _changes(way: list[int], place: int, size: int) -> Iterator[list[int]]:
    """A way without the `size` actions at a place, or with a neighbour's action there."""
    if size:
        if place + size < len(way):
            yield way[:place] + way[place + size :]
        return
    for neighbour in (place - 1, place + 1):
        if 0 <= neighbour < len(way) and way[neighbour] != way[place]:
            yield [*way[:place], way[neighbour], *way[place + 1 :]]


def _better(new: Sequence[int], old: Sequence[int]) -> bool:
    return (len(new), _turns(new)) < (len(old), _turns(old))


def _turns(way: Sequence[int]) -> int:
    """How often the action changes."""
    return int(np.count_nonzero(np.diff(way)))


def choose(
    course: Course,
    candidates: Sequence[Sequence[int]],
    watch: Callable[[int, int, float], None] = lambda *_: None,
) -> tuple[list[int], float]:
    """The best way made from the candidates: the safest of those that are nearly the shortest.

    `watch` is told a candidate's place and what `shorten` tells of it.
    """
    ways = [
        shorten(course, way, partial(watch, place)) for place, way in enumerate(candidates[:TRIED])
    ]
    shortest = min(len(way) for way in ways)
    near = [way for way in ways if len(way) <= SAFER * shortest]
    rated = [(course.survival(way), -len(way), -_turns(way), way) for way in near]
    survival, _, _, way = max(rated)
    return way, survival
