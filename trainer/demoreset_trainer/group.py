"""The members that train together, as the loop sees them: one small interface.

At every update the loop asks the group who its members are. Every member holds a block of the
run's slots; tensors are summed over the members, results are gathered from them, and where a
member is lost in between ONE error is raised: the loop goes back to its copy and asks again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from demoreset_api.errors import DemoResetError

Item = TypeVar("Item")


class MemberLost(DemoResetError):
    """A member is gone, or none answers: what was summed since the last quorum is void."""


@dataclass(frozen=True)
class Quorum:
    """Who trains now. Every change of members makes a new generation."""

    generation: int
    rank: int
    members: int

    def block(self, slots: int) -> range:
        """The slots of this member, out of all of the run's."""
        return range(self.rank * slots // self.members, (self.rank + 1) * slots // self.members)


class Group(Protocol):
    """A member's view of the others."""

    def quorum(self, update: int) -> Quorum:
        """Agree on the members of this update."""

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the members, in place.

        Raises:
            MemberLost: not every member took part.
        """

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all members, in the order of their ranks.

        Raises:
            MemberLost: not every member took part.
        """


class Alone:
    """A group of one process: no network."""

    def quorum(self, update: int) -> Quorum:
        """Only this process, for ever."""
        return Quorum(generation=0, rank=0, members=1)

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Nothing to add."""
        return list(items)
