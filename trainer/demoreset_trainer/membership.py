"""This member among the others: who trains now, from which state, and that all have the same.

The group (`group.py`) says who its members are and carries bytes; here is what they agree about.
"""

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from demoreset_api.errors import TryAgain
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot, pack, unpack
from demoreset_trainer.counters import Cause
from demoreset_trainer.fence import Fence
from demoreset_trainer.group import Group, MemberLost, Quorum
from demoreset_trainer.lives import NOBODY, TakenOver
from demoreset_trainer.ppo import Ppo
from demoreset_trainer.run_state import RunState

DISK = 120.0  # seconds that reading or writing a checkpoint may take
MAX_APART = 3  # times in a row that a member differs from the others, before it gives up


class Membership:
    """What a member has in common with the others, and how it comes by it.

    Args:
        group: The others.
        state: Where the run stands, as this member knows it.
        ppo: Its weights and optimiser.
        burn_in: Made anew where those came from another member.
        find: Asked for the life and, if there is one, the checkpoint to go on from; only the first
            of members that all are new is asked.
        take_life: Takes the run's next life on the disk, as `Saver` has it.
        note: Told what a person wants to know.
    """

    def __init__(
        self,
        group: Group,
        state: RunState,
        ppo: Ppo,
        burn_in: BurnIn,
        *,
        find: Callable[[], tuple[int, Snapshot | None]],
        take_life: Callable[[], int | None],
        note: Callable[[str], None],
    ) -> None:
        self._group, self._state, self._ppo, self._burn_in = group, state, ppo, burn_in
        self._find, self._note = find, note
        self._fence = Fence(take_life, note)
        self.rank = 0  # of the latest quorum
        self.staying: list[str] = []  # members that have not said that they leave
        self._members: tuple[str, ...] = ()  # of the latest quorum
        self._apart = 0  # updates in a row at which it differed from the others
        self._apart_at = -1  # the latest of them
        self._lost_at: float | None = None  # when what a lost member interrupted began
        self._began: float | None = None  # the run, as if it had been one life; time.monotonic

    # State

    def snapshot(self) -> Snapshot:
        """All that is needed to go on. Tensors are the live ones, not copies."""
        state, (model, optimizer) = self._state, self._ppo.state()
        return Snapshot(
            life=state.life,
            update=state.counters.update,
            frames=state.counters.frames,
            members=max(1, len(self._members)),
            model=model,
            optimizer=optimizer,
            state=state.state(),
        )

    def load(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint: every slot begins anew."""
        self._ppo.load(snapshot.model, snapshot.optimizer)
        self._state.resume(snapshot.state, snapshot.life)

    def digest(self) -> int | None:
        """A checksum of the weights; None where one is not finite."""
        digest = 0
        for tensor in self._ppo.policy.state_dict().values():
            values = tensor.detach().cpu().contiguous().numpy()
            if not np.isfinite(values).all():
                return None
            digest = zlib.crc32(values, digest)
        return digest

    @property
    def seconds(self) -> float:
        """How long the run has been trained, over all its lives."""
        began = self._began
        return self._state.counters.seconds if began is None else time.monotonic() - began

    # Agreeing

    def agree(self) -> tuple[Quorum, bool]:
        """Agree on the members, all with one state; whether this member's own has stayed."""
        stayed = True
        while True:
            begun = time.monotonic()
            quorum = self._group.quorum(self._state.step)
            self._fence.lose(quorum, self.staying)
            cause, since = self._cause(quorum), self._lost_at or begun
            try:
                if quorum.source is not None:
                    own, cause, since = self._hand_over(quorum, cause, since)
                    stayed = own and stayed
            except MemberLost as error:
                self.lost(since, error)
                continue
            if cause is not None:
                self._state.counters.recovered(cause, since)
            if self._began is None:
                self._began = time.monotonic() - self._state.counters.seconds
            self._members, self.rank, self._lost_at = quorum.members, quorum.rank, None
            self._fence.build(first=quorum.first)
            return quorum, stayed

    def lost(self, begun: float, error: MemberLost) -> None:
        """A member was lost, and what was begun then (time.monotonic) is void."""
        self._lost_at = self._lost_at or begun
        self._group.event("lost", update=self._state.counters.update, reason=str(error))

    def _cause(self, quorum: Quorum) -> str | None:
        """What was lost or joined since the latest quorum: a `Cause`."""
        before, now = set(self._members), set(quorum.members)
        if self._lost_at is not None:
            return Cause.COLLECTIVE
        if before - now:
            return Cause.LEFT
        if quorum.outage:
            return Cause.COORDINATOR
        return Cause.JOINED if before and now - before else None

    def _hand_over(
        self, quorum: Quorum, cause: str | None, since: float
    ) -> tuple[bool, str | None, float]:
        """All take the state of one member; whether it was this one's own.

        And why the group has changed, and since when that has cost the others time: a member that
        is new, or was away, cannot know it, and takes it from the source.
        """
        state, own = self._state, quorum.rank == quorum.source
        if own and not state.life:
            self._begin_life()
        if len(quorum.members) == 1:
            return own, cause, since
        sent = b""
        if own:
            spent = time.monotonic() - since
            told = {"owners": state.owners, "cause": cause, "spent": spent, "seconds": self.seconds}
            sent = pack(self.snapshot(), told)
        received = self._group.hand_over(quorum, sent)
        if not own:
            snapshot, extra = unpack(received)
            if (snapshot.life, snapshot.update) == (state.life, state.counters.update):
                return True, cause, since  # another was behind
            if snapshot.life > state.life:
                self._fence.stands()
            state.check_alike(snapshot.state)
            self._ppo.load(snapshot.model, snapshot.optimizer)
            state.load(snapshot.state)
            state.life, state.owners = snapshot.life, list(extra["owners"])
            self._began = time.monotonic() - extra["seconds"]
            self._burn_in.refresh()
            cause, since = extra["cause"], time.monotonic() - extra["spent"]
        return own, cause, since

    def _begin_life(self) -> None:
        """All members are new: this one, the first, looks at the disk for what to go on from."""
        self._group.alive(DISK)
        life, snapshot = self._find()
        if snapshot is not None:
            self.load(snapshot)
            self._began = None
        self._state.life = life

    def exchange(self, quorum: Quorum, share: dict[str, Any], *, leaving: bool) -> list[Any]:
        """What every member brings to this update, in the order of their ranks.

        Args:
            quorum: The members.
            share: What this one brings, as JSON.
            leaving: Whether this one is told to stop; afterwards all know who stays.

        Raises:
            MemberLost: also where states have drifted apart: those that differ go on as new ones.
            TakenOver: others train the run in a later life.
            TryAgain: this one's differs however often it is given that of the others.
        """
        weights = self.digest() if len(quorum.members) > 1 else 0
        digest = None if weights is None else self._state.digest(weights)
        seen = self._state.counters.seen()
        told = {**share, "digest": digest, "leaving": leaving, "seen": seen}
        told["life"] = max(self._state.life, self._fence.life)
        shares = self._group.gather(told)
        if self._state.go_on_in(max(theirs.get("life", 0) for theirs in shares)):
            self._fence.stands()
        self._check_owner(*max(tuple(theirs.get("overtaken", NOBODY)) for theirs in shares))
        both = zip(quorum.members, shares, strict=True)
        self.staying = [member for member, theirs in both if not theirs["leaving"]]
        self._check_alike(digest, [theirs["digest"] for theirs in shares])
        return shares

    def _check_owner(self, overtaken: int, why: str) -> None:
        """All begin anew where one of them has found that others have taken a later life than this.

        One after the other would take the state from those that are left, for ever.
        """
        if self._state.life <= overtaken:
            raise TakenOver(why)

    def _check_alike(self, own: int | None, digests: list[int | None]) -> None:
        update = self._state.counters.update
        if len(set(digests)) == 1:
            if update != self._apart_at:  # else they have only just been made equal
                self._apart = 0
            return
        self._apart_at = update
        finite = [one for one in digests if one is not None]  # one at least: they differ
        if own is None or own != max(finite, key=finite.count):
            self._state.life = 0
            self._apart += 1
            if self._apart == MAX_APART:  # the others must not be held up for ever
                raise TryAgain(
                    f"this member's state differs from that of the others after it was made equal "
                    f"{MAX_APART - 1} times; are all of one version, and all on GPUs or none?"
                )
        else:
            self._apart = 0
        self._note(f"update {update}: the members' states differ; made equal again")
        raise MemberLost("the members' states differ")
