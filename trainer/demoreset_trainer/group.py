"""The members that train together, as the loop sees them: one small interface.

At every update the loop asks the group who its members are. Every member plays some of the run's
slots; tensors are summed over the members, what they know is gathered, and where a member is lost
in between ONE error is raised: the loop goes back to its copy and asks again.
"""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from demoreset_api.errors import DemoResetError

ALONE = "alone"
_UPDATE_BITS = 40


class MemberLost(DemoResetError):
    """A member is gone, or none answers: what was summed since the last quorum is void."""


class Leaving(DemoResetError):
    """This member was told to stop, and the end of its update would be too late."""


def first_line(error: BaseException) -> str:
    """What an error says, for a note: others' errors may have many lines."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


@dataclass(frozen=True)
class Quorum:
    """Who trains now. Every change of members makes a new generation.

    members: their ids; the first one, rank 0, writes checkpoints. source: the rank whose state the
    others take, None where all have the same. roster: id, pid, host, and update of each member.
    outage: seconds that the coordinator was away while this member asked. cut_off: whether it has
    been away for longer since the latest quorum than it needs to be started again.
    """

    generation: int
    rank: int
    members: tuple[str, ...]
    source: int | None = None
    roster: list[dict[str, Any]] = field(default_factory=list)
    outage: float = 0.0
    cut_off: bool = False

    @property
    def me(self) -> str:
        """This member's id."""
        return self.members[self.rank]

    @property
    def first(self) -> bool:
        """Whether this member is the first."""
        return self.rank == 0


def step_of(life: int, update: int) -> int:
    """Orders the states of a run: one of an earlier life is behind, whatever its update is."""
    return life << _UPDATE_BITS | update


def update_of(step: int) -> int:
    """The update of a `step_of`."""
    return step & ((1 << _UPDATE_BITS) - 1)


def deal(owners: Sequence[str], members: Sequence[str]) -> list[str]:
    """Who plays each slot: equal shares, and as few slots as possible change hands.

    `owners`: who played it until now. Whoever holds most may keep one more than others.
    """
    held = Counter(owner for owner in owners if owner in members)
    share, extra = divmod(len(owners), len(members))
    order = sorted(members, key=lambda member: -held[member])
    room = {member: share + (place < extra) for place, member in enumerate(order)}
    dealt = []
    for owner in owners:
        stays = room.get(owner, 0) > 0
        dealt.append(owner if stays else "")
        if stays:
            room[owner] -= 1
    free = (member for member in members for _ in range(room[member]))
    return [owner or next(free) for owner in dealt]


class Group(Protocol):
    """A member's view of the others."""

    def quorum(self, step: int) -> Quorum:
        """Agree on the members of this update; `step` orders states, 0 is none at all.

        Raises:
            Leaving: this member is to stop.
            TryAgain: it is to begin anew, as a new member.
        """

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the members, in place.

        Raises:
            MemberLost: not every member took part.
        """

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every member, in the order of their ranks.

        Raises:
            MemberLost: not every member took part.
        """

    def hand_over(self, quorum: Quorum, state: bytes) -> bytes:
        """The state of the source; what the others give is not looked at.

        Raises:
            MemberLost: not every member took part.
        """

    def alive(self, patience: float = 0.0) -> None:
        """The loop moves; whoever does not say so for seconds is taken for dead.

        `patience`: it waits for something that takes so many seconds at most.
        """

    def event(self, name: str, **facts: Any) -> None:
        """Something happened that a measurement of faults wants to know."""


class Alone:
    """A group of one process: no network."""

    def quorum(self, step: int) -> Quorum:
        """Only this process, for ever."""
        me = {"id": ALONE, "pid": os.getpid(), "host": socket.gethostname()}
        roster = [{**me, "update": update_of(step)}]
        return Quorum(0, 0, (ALONE,), source=None if step else 0, roster=roster)

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, value: Any) -> list[Any]:
        """Nothing to add."""
        return [value]

    def hand_over(self, quorum: Quorum, state: bytes) -> bytes:
        """Nobody to take it."""
        return state

    def alive(self, patience: float = 0.0) -> None:
        """Nobody asks."""

    def event(self, name: str, **facts: Any) -> None:
        """Nobody measures."""
