"""The sequence of a run: agree on the members, learn from what they played, save, play.

    play ──▶ quorum ──▶ a member behind? state from one ahead ──▶ gather, optimise ──▶ commit
              ▲                                                      │ not finite, or
              └──────────────────── back to the copy ◀───────────────┘ a member was lost

Nothing of an update is kept before it has succeeded as a whole: up to the commit the members only
play and add up; the commit itself asks nobody.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from demoreset_api.errors import NoProgress
from demoreset_api.spec import After, CurriculumMode, RunSpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot, pack, unpack
from demoreset_trainer.counters import Counters
from demoreset_trainer.curriculum import Curriculum, Result, make_curriculum
from demoreset_trainer.demo import Demo
from demoreset_trainer.episode import last_start
from demoreset_trainer.goal import GoalWatch
from demoreset_trainer.group import Group, Leaving, MemberLost, Quorum, deal
from demoreset_trainer.guide import Guide
from demoreset_trainer.play import play
from demoreset_trainer.policy import Policy
from demoreset_trainer.ppo import NotFinite, Ppo, Rollout, Statistics
from demoreset_trainer.progress import Watch
from demoreset_trainer.rollout import Collector, Start
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.stall import Ladder
from demoreset_trainer.states import StartStates
from demoreset_trainer.telling import Telling

_UPDATE_BITS = 40  # of the number that orders a run's states; above them its life
MOST_ATTEMPTS = 3  # of one update, before the run gives up
CALM = 0.25  # of the learning rate is left when every episode from the game's own start succeeds
CONFIRMING = 32  # slots that play a confirmation


class Saver(Protocol):
    """Who keeps the run's state."""

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""

    def save(self, snapshot: Snapshot, *, best: bool) -> None:
        """Write a checkpoint without holding up the loop."""

    def facts(self) -> dict[str, Any]:
        """The checkpoint fields of `Progress`."""


@dataclass(frozen=True)
class Take:
    """What a member has played since the latest update: nothing yet, when it is new.

    columns: the slots of the rollout. successes: of the goal's episodes, when one is confirmed.
    """

    rollout: Rollout
    columns: npt.NDArray[np.int64]
    results: list[Result]
    successes: list[bool]


@dataclass(frozen=True)
class Stopped:
    """Whether the loop is to end, and why."""

    ended: bool = True
    goal_met: bool = False
    budget_spent: bool = False


class Loop:
    """One member's run.

    Args:
        spec: What is wanted.
        demo: Its demonstration, cut to what is learned.
        states: The demo's start states.
        policy: On its device.
        make_slots: Makes so many environments.
        codes: The joystick codes of the policy's actions.
        group: The members.
        watch: Told how it goes.
        saver: Keeps its state.
        find: Asked for the life and, if there is one, the checkpoint to go on from; only the first
            of members that all are new is asked.
    """

    def __init__(
        self,
        spec: RunSpec,
        demo: Demo,
        states: StartStates,
        policy: Policy,
        make_slots: Callable[[int], Slots],
        codes: tuple[int, ...],
        *,
        group: Group,
        watch: Watch,
        saver: Saver,
        find: Callable[[], tuple[int, Snapshot | None]],
    ) -> None:
        self.spec, self.demo = spec, demo
        self.life = 0  # none yet: this member has no state of its own
        self._find = find
        self._group, self._watch, self._saver = group, watch, saver
        self._make_slots, self._policy = make_slots, policy
        self._skip = spec.environment.frame_skip
        self.counters = Counters()
        self.goal = GoalWatch(spec.goal)
        self.ladder = Ladder(spec.stall)
        self.curriculum: Curriculum = make_curriculum(
            spec.curriculum,
            last_start=last_start(demo, self._skip),
            frame_skip=self._skip,
            slots=spec.environment.slots,
            rollout_length=spec.ppo.rollout_length,
        )
        original = spec.curriculum.mode is CurriculumMode.ORIGINAL
        self.ppo = Ppo(policy, spec.ppo, success_is_neutral=original)
        burn_in_decisions = spec.ppo.burn_in if policy.shape.hidden else 0
        self._burn_in = BurnIn(policy, states, burn_in_decisions, group.alive)
        # A long demo costs more than a rollout to watch: then it is watched less often.
        per_update = spec.environment.slots * spec.ppo.rollout_length
        self._refresh_every = max(1, len(states) // per_update)
        self._guide = Guide(demo, states, policy.shape.view, self._burn_in, codes)
        default_guide = 0.0 if original else 0.1
        guide = spec.curriculum.guide
        self.guide_weight = default_guide if guide is None else guide
        self._owners = [""] * spec.environment.slots  # the member that plays each slot
        self._members: tuple[str, ...] = ()  # of the latest quorum
        self._rank = 0
        self._leaving: set[str] = set()  # members that have said so
        self._lost_at: float | None = None  # when what a lost member interrupted began
        self._results: list[Result] = []  # of the latest update, as are the statistics
        self._statistics = Statistics()
        self._episodes = np.zeros(spec.environment.slots, np.int64)  # number of the current one
        self._explore_frames = spec.curriculum.explore_frames
        if self._explore_frames is None:
            self._explore_frames = 100 if original else 0
        self._explore_every = 1 if original else 2
        self._playing_on = False
        self._apart: Slots | None = None
        self._telling = Telling(spec, len(demo), watch)

    # State

    def snapshot(self) -> Snapshot:
        """All that is needed to go on. Tensors are the live ones, not copies."""
        model, optimizer = self.ppo.state()
        return Snapshot(
            life=self.life,
            update=self.counters.update,
            frames=self.counters.frames,
            members=max(1, len(self._members)),
            model=model,
            optimizer=optimizer,
            state={
                "spec": self.spec.model_dump(mode="json", by_alias=True),
                "demo": {"game": self.demo.game, "sha256": self.demo.sha256},
                "counters": self.counters.state(),
                "curriculum": self.curriculum.state(),
                "goal": self.goal.state(),
                "stall": self.ladder.state(),
                "episodes": self._episodes.tolist(),
                "playing_on": self._playing_on,
            },
        )

    def load(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint: every slot begins anew."""
        self._take_over(snapshot)
        if snapshot.state["spec"]["goal"] != self.spec.goal.model_dump(mode="json", by_alias=True):
            self.goal.met = False  # another goal
        # The episodes that ran when it was saved are lost; their numbers are not used again.
        self._episodes += 2
        self._owners = [""] * len(self._owners)

    def _take_over(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        self.ppo.load(snapshot.model, snapshot.optimizer)
        self.counters = Counters.load(state["counters"])
        self.curriculum.load(state["curriculum"])
        self.goal.load(state["goal"])
        self.ladder.load(state["stall"])
        self._episodes[:] = 0
        kept = min(len(state["episodes"]), len(self._episodes))
        self._episodes[:kept] = state["episodes"][:kept]
        self._playing_on = bool(state["playing_on"])

    # The sequence

    def run(self, stopping: Callable[[], bool]) -> Stopped:
        """Train until the goal is met, the budget is spent, or `stopping` says so.

        Raises:
            NoProgress: the same update failed three times.
            SlotsDied: a process of environments is gone.
        """
        with ExitStack() as self._open:
            try:
                return self._run(stopping)
            except Leaving:
                return Stopped(goal_met=self.goal.met)
            finally:
                self._group.event("left", update=self.counters.update)

    def _run(self, stopping: Callable[[], bool]) -> Stopped:
        collector = self._collector()
        self._nothing = take = Take(collector.nothing(), collector.held, [], [])
        begun: float | None = None
        self._stopping = stopping
        while True:
            quorum, learned = self._update(take)
            if begun is None:
                begun = time.monotonic() - self.counters.seconds
                self._burn_in.refresh()
            self.counters.seconds = time.monotonic() - begun
            stopped = self._stopped(quorum)
            if learned:
                self._telling.update(
                    self.counters,
                    self.curriculum,
                    self.goal,
                    self.ladder,
                    self._statistics,
                    self._results,
                    quorum,
                    learning_rate=self._learning_rate(),
                    checkpoint=self._saver.facts(),
                )
            if quorum.first and (stopped.goal_met or (learned and self._saver.due())):
                with self._telling.phase("checkpoint"):
                    self._saver.save(self.snapshot(), best=self.at_best())
            if stopped.ended:
                return stopped
            self._deal(quorum)
            with self._telling.phase("rollout"):
                mine = [slot for slot, owner in enumerate(self._owners) if owner == quorum.me]
                held = np.array(mine, np.int64)
                collector.hold(held, self._episodes[held])
                successes = self._confirming(quorum)
                rollout, results = collector.collect(self.counters.update)
            take = Take(rollout, held, results, successes)

    def _stopped(self, quorum: Quorum) -> Stopped:
        if self.goal.met and not self._playing_on:
            if self.spec.goal.after is After.STOP:
                return Stopped(ended=True, goal_met=True)
            self._playing_on = True
            self._watch.note("goal met: playing on from the game's own start, for score")
        budget = self.spec.budget.frames
        spent = budget is not None and self.counters.frames >= budget
        # Others are told before one leaves, so that they play its slots in the next rollout.
        leaving = quorum.me in self._leaving or (len(quorum.members) == 1 and self._stopping())
        return Stopped(spent or leaving, goal_met=self.goal.met, budget_spent=spent)

    def _collector(self) -> Collector:
        return Collector(
            self._new_slots(self.spec.environment.slots),
            self._policy,
            self._burn_in,
            self._choose,
            seed=self.spec.seed,
            frame_skip=self._skip,
            length=self.spec.ppo.rollout_length,
            history=self.spec.ppo.burn_in,
            explore_frames=self._explore_frames or 0,
            explore_every=self._explore_every,
            alive=self._group.alive,
        )

    def _new_slots(self, count: int) -> Slots:
        slots: Slots = self._open.enter_context(self._make_slots(count))
        return slots.ready(self._group.alive)

    def _deal(self, quorum: Quorum) -> None:
        """Give every slot to a member; in a slot that changes hands the next episode begins."""
        staying = [member for member in quorum.members if member not in self._leaving]
        dealt = deal(self._owners, staying)
        for slot, (before, now) in enumerate(zip(self._owners, dealt, strict=True)):
            if before and before != now:
                self._episodes[slot] += 1
        self._owners = dealt

    def _choose(self, slot: int, episode: int, random: np.random.Generator) -> Start:
        if self._playing_on:
            return Start(0, limits=False)
        return Start(self.curriculum.choose(slot, random))

    def _update(self, take: Take) -> tuple[Quorum, bool]:
        """One update, or none at all; whether there was anything to learn from.

        After a failure everything is as it was before.
        """
        rejected = 0
        while rejected < MOST_ATTEMPTS:
            with self._telling.phase("quorum"):
                quorum, ahead = self._agree()
            if not ahead:  # what was played belongs to a state that is gone
                take = self._nothing
            with self._telling.phase("copy"):
                before = tuple(_copy(tensors) for tensors in self.ppo.state())
            begun = time.monotonic()
            try:
                with self._telling.phase("optimise"):
                    shares = self._gather(take, quorum)
                    if not any(share["slots"] for share in shares):
                        return quorum, False
                    met = self._judge(shares)
                    if not met:
                        self._statistics = self._optimise(take, quorum, rejected)
            except MemberLost as error:
                self.ppo.load(*before)
                self.counters.rolled_back += 1
                self._lost_at = self._lost_at or begun
                self._group.event("lost", update=self.counters.update, reason=str(error))
                continue
            except NotFinite as error:
                self.ppo.load(*before)
                rejected += 1
                self.counters.rejected += 1
                self._watch.note(f"update {self.counters.update} rejected: {error}")
                self._group.event("rejected", update=self.counters.update)
                continue
            with self._telling.phase("record"):
                self._commit(shares, met)
            return quorum, True
        raise NoProgress(
            f"update {self.counters.update} failed {MOST_ATTEMPTS} times: its loss is not finite; "
            "lower spec.ppo.learningRate and run again: the checkpoint before it is kept"
        )

    def _agree(self) -> tuple[Quorum, bool]:
        """Agree on the members, all with one state; whether this member's own has stayed."""
        stayed = True
        while True:
            begun = time.monotonic()
            quorum = self._group.quorum(self._step())
            try:
                if quorum.source is not None:
                    stayed = self._share(quorum) and stayed
            except MemberLost as error:
                self._lost_at = self._lost_at or begun
                self._group.event("lost", update=self.counters.update, reason=str(error))
                continue
            self._regained(quorum, begun)
            return quorum, stayed

    def _step(self) -> int:
        """Orders the states of a run: a member of an earlier life is behind, a new one more so."""
        return self.life << _UPDATE_BITS | self.counters.update

    def _share(self, quorum: Quorum) -> bool:
        """All take the state of one member; whether it was this one's own."""
        own = quorum.rank == quorum.source
        if own and not self.life:  # all are new: only the first may look at the disk
            life, snapshot = self._find()
            if snapshot is not None:
                self.load(snapshot)
            self.life = life
        if len(quorum.members) == 1:
            return own
        state = pack(self.snapshot(), {"owners": self._owners}) if own else b""
        received = self._group.hand_over(quorum, state)
        if not own:
            snapshot, extra = unpack(received)
            if (snapshot.life, snapshot.update) == (self.life, self.counters.update):
                return True  # another was behind
            self._take_over(snapshot)
            self.life, self._owners = snapshot.life, list(extra["owners"])
            self._burn_in.refresh()
        return own

    def _regained(self, quorum: Quorum, asked: float) -> None:
        """Count, by cause, what was lost or joined since the latest quorum."""
        before, now = set(self._members), set(quorum.members)
        if self._lost_at is not None:
            self.counters.recovered("collective", self._lost_at)
        elif before - now:
            self.counters.recovered("left", asked)
        elif quorum.outage:
            self.counters.recovered("coordinator", asked)
        elif before and now - before:
            self.counters.recovered("joined", asked)
        self._members, self._rank, self._lost_at = quorum.members, quorum.rank, None

    def _gather(self, take: Take, quorum: Quorum) -> list[dict[str, Any]]:
        """What every member brings to this update.

        Raises:
            MemberLost: also where states have drifted apart: those that differ go on as new ones.
        """
        digest = self._digest() if len(quorum.members) > 1 else 0
        shares = self._group.gather(
            {
                "digest": digest,
                "slots": len(take.columns),
                "results": [astuple(result) for result in take.results],
                "successes": take.successes,
                "leaving": self._stopping(),
            }
        )
        self._leaving = {
            member for member, share in zip(quorum.members, shares, strict=True) if share["leaving"]
        }
        digests = [share["digest"] for share in shares]
        if len(set(digests)) > 1:
            finite = [one for one in digests if one >= 0] or digests
            right = max(finite, key=finite.count)
            if digest != right:
                self.life = 0
            self._watch.note(
                f"update {self.counters.update}: the members' weights differ; made equal again"
            )
            raise MemberLost("the members' weights differ")
        return shares

    def _digest(self) -> int:
        """A checksum of the weights; -1 where one is not finite."""
        digest = 0
        for tensor in self._policy.state_dict().values():
            values = tensor.detach().cpu().contiguous().numpy()
            if not np.isfinite(values).all():
                return -1
            digest = zlib.crc32(values, digest)
        return digest

    def _optimise(self, take: Take, quorum: Quorum, rejected: int) -> Statistics:
        spec, remedy = self.spec, self.ladder.remedy
        guide = 0.0 if self._playing_on else self.guide_weight
        return self.ppo.update(
            take.rollout,
            self._minibatches(take.columns, rejected),
            self._lessons(guide),
            self._group,
            learning_rate=self._learning_rate(),
            entropy=spec.ppo.entropy * remedy.entropy,
            guide=guide,
            members=len(quorum.members),
        )

    def _learning_rate(self) -> float:
        """Adam's step size now: with remedies, and smaller near the goal, to keep it.

        Without that a policy that succeeded in 92 % of the episodes from the game's own start fell
        to 50 % within ten updates.
        """
        rate = self.spec.ppo.learning_rate * self.ladder.remedy.learning_rate
        if self.curriculum.frontier or self._playing_on:
            return rate
        return rate * (1 - (1 - CALM) * (self.goal.rate or 0.0))

    def _minibatches(
        self, held: npt.NDArray[np.int64], rejected: int
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Columns of this member's rollout: each epoch cuts all slots of the run anew.

        After a rejected attempt otherwise than before; after a lost member as before.
        """
        spec = self.spec
        slots = spec.environment.slots
        column = np.full(slots, -1)
        column[held] = np.arange(len(held))
        for epoch in range(spec.ppo.epochs):
            random = np.random.default_rng([spec.seed, self.counters.update, epoch, rejected])
            for part in np.split(random.permutation(slots), spec.ppo.minibatches):
                mine = column[part]
                yield mine[mine >= 0]

    def _lessons(self, guide: float) -> Iterator[Any]:
        spec = self.spec
        guidance = self.curriculum.guidance()
        random = np.random.default_rng([spec.seed, self.counters.update, 2**31])
        for _ in range(spec.ppo.epochs * spec.ppo.minibatches):
            yield self._guide.lesson(guidance, random) if guide else None

    def _commit(self, shares: list[dict[str, Any]], met: bool) -> None:
        """Take in what the update has brought; asks nobody, so that it cannot half happen."""
        spec, counters = self.spec, self.counters
        slots = sum(share["slots"] for share in shares)
        per_slot = spec.ppo.rollout_length * self._skip
        results = sorted(
            (Result(*result) for share in shares for result in share["results"]),
            key=lambda result: (result.slot, result.episode),
        )
        successes = [one for share in shares for one in share["successes"]]
        counters.update += 1
        counters.frames += slots * per_slot
        counters.frames_discarded += (spec.environment.slots - slots) * per_slot
        counters.episodes += len(results)
        for result in results:
            self._episodes[result.slot] = result.episode + 1
            if result.start == 0:
                counters.score_max = max(result.score, counters.score_max or result.score)
        self._results = results
        self._group.event(
            "commit", update=counters.update, frames=counters.frames, digest=self._digest
        )
        if self._playing_on:
            return
        self.curriculum.record(results)
        self.goal.record(results)
        if len(successes) == spec.goal.episodes:
            self.goal.confirm(successes)
            self._watch.note(
                f"confirmation: {sum(successes)} of {len(successes)} episodes from the game's own "
                f"start tie the demo; the goal is {spec.goal.success_rate:.0%}"
                + ("" if met else ": on with the training")
            )
        if counters.update % self._refresh_every == 0:
            self._burn_in.refresh()
        if self.curriculum.frontier == 0 and counters.start_reached_frames is None:
            counters.start_reached_frames = counters.frames
            counters.start_reached_seconds = counters.seconds
            self._watch.note("the start has reached the game's own start")
        changed = self.ladder.watch(
            frames=counters.frames, start=self.curriculum.frontier, goal_rate=self.goal.rate
        )
        if changed:
            self._watch.note(changed)

    def _judge(self, shares: list[dict[str, Any]]) -> bool:
        """Whether the goal's episodes, if all were played, meet it."""
        successes = [one for share in shares for one in share["successes"]]
        return len(successes) == self.spec.goal.episodes and self.goal.enough(successes)

    def _confirming(self, quorum: Quorum) -> list[bool]:
        """When the goal seems near: this member's share of its episodes, from the game's own start.

        In slots of their own: if the training's were used, all of their episodes would begin anew
        at the same moment, and the rollouts after a failed confirmation would be of one kind.
        """
        if not self.goal.promising or self.curriculum.frontier or self._playing_on:
            return []
        goal, random = self.spec.goal, np.random.default_rng([self.spec.seed, self.counters.update])
        begins = [Begin(0, int(random.integers(2**62))) for _ in range(goal.episodes)]
        mine = range(quorum.rank, goal.episodes, len(quorum.members))
        if not mine:
            return []
        with self._telling.phase("confirm"):
            if self._apart is None:
                count = min(goal.episodes, CONFIRMING)
                self._apart = self._new_slots(count)
            played = play(
                self._apart,
                self._policy,
                [begins[i] for i in mine],
                seed=self.spec.seed,
                watch=lambda _: self._watch.phase("confirm"),  # a sign of life
                alive=self._group.alive,
            )
        return [episode.success for episode in played]

    @property
    def first(self) -> bool:
        """Whether this member writes the run's checkpoints."""
        return self._rank == 0 and self.life > 0

    def at_best(self) -> bool:
        """Whether the run has never stood better than now."""
        return self.goal.met or self.ladder.at_best


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
