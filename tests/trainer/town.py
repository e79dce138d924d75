"""Members in threads: real loops with real slots, whose group is a table in memory.

A `Town` does what the coordinator and the network do: it waits until every member that lives has
asked, adds up, and lets members die at a given moment, in the middle of a sum or of a rollout.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from demoreset_trainer.group import MemberLost, Quorum

PATIENCE = 60.0


class Dead(BaseException):
    """A member was killed; nothing of it may go on."""


class Town:
    """Knows who lives, and lets them meet."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.living: list[str] = []  # by seniority
        self.asked: dict[str, int] = {}
        self.answer: dict[str, Quorum] = {}
        self.generation = 0
        self.given: dict[str, Any] = {}
        self.taken: dict[str, list[Any]] = {}
        self.broken: set[str] = set()  # members that must be told of a loss at their next sum
        self.group: tuple[str, ...] = ()
        self.cut_off = False  # whether the coordinator is away for long before the next quorum

    def enter(self, id: str) -> "Citizen":
        with self.condition:
            self.living.append(id)
        return Citizen(self, id)

    def leave(self, id: str) -> None:
        """Dead, or gone."""
        with self.condition:
            if id in self.living:
                self.living.remove(id)
                if id in self.group:
                    self.broken |= set(self.group) & set(self.living)
                self.asked.pop(id, None)
                self.given.pop(id, None)
                self._vote()
                self.condition.notify_all()

    def quorum(self, id: str, step: int) -> Quorum:
        with self.condition:
            self.broken.discard(id)
            self.given.pop(id, None)
            self.asked[id] = step
            self._vote()
            self._wait(lambda: id in self.answer)
            return self.answer.pop(id)

    def _vote(self) -> None:
        if not self.living or set(self.asked) < set(self.living):
            return
        members = tuple(self.living)
        steps = [self.asked[member] for member in members]
        self.generation += members != self.group
        self.group = members
        self.broken.clear()
        self.given.clear()
        self.taken.clear()
        best = max(steps)
        same = best > 0 and min(steps) == best
        self.answer = {
            member: Quorum(
                self.generation,
                rank,
                members,
                None if same else steps.index(best),
                cut_off=self.cut_off,
            )
            for rank, member in enumerate(members)
        }
        self.cut_off = False
        self.asked = {}
        self.condition.notify_all()

    def exchange(self, id: str, value: Any) -> list[Any]:
        """What every member of the group gives, in the order of their ranks."""
        with self.condition:
            self.given[id] = value
            if set(self.given) == set(self.group):
                all_given = [self.given[member] for member in self.group]
                self.taken = {member: all_given for member in self.group}
                self.given = {}
                self.condition.notify_all()
            self._wait(lambda: id in self.taken or id in self.broken)
            if id in self.taken:
                return self.taken.pop(id)
            raise MemberLost("a member is gone")

    def _wait(self, met: Callable[[], bool]) -> None:
        if not self.condition.wait_for(met, PATIENCE):
            raise TimeoutError(f"{self.living} {self.asked} {list(self.given)} {self.broken}")


class Citizen:
    """The group as one member sees it; `doom` says whether it dies now, at its n-th sum."""

    def __init__(self, town: Town, id: str) -> None:
        self.town, self.id = town, id
        self.sums = 0
        self.commits: list[tuple[int, int, int, int]] = []  # life, update, frames, digest
        self.doom: Callable[[str, int], bool] = lambda what, count: False

    def quorum(self, step: int) -> Quorum:
        self._fate("quorum", 0)
        return self.town.quorum(self.id, step)

    def sum(self, tensor: Tensor) -> None:
        self.sums += 1
        self._fate("sum", self.sums)
        tensor.copy_(torch.stack(self.town.exchange(self.id, tensor.clone())).sum(0))

    def gather(self, value: Any) -> list[Any]:
        self.sums = 0
        self._fate("gather", 0)
        return self.town.exchange(self.id, json.loads(json.dumps(value)))

    def hand_over(self, quorum: Quorum, state: bytes) -> bytes:
        return bytes(self.town.exchange(self.id, state)[quorum.source or 0])

    def alive(self, patience: float = 0.0) -> None:
        pass

    def event(self, name: str, **facts: Any) -> None:
        if name == "commit":
            update, digest = facts["update"], facts["digest"]()
            self.commits.append((facts["life"], update, facts["frames"], digest))
            self._fate("commit", facts["update"])

    def _fate(self, what: str, count: int) -> None:
        if self.doom(what, count):
            self.town.leave(self.id)
            raise Dead(self.id)
