"""The sequence of a run: agree on the members, learn from what they played, save, play.

    play ──▶ quorum ──▶ a member behind? state from one ahead ──▶ gather, optimise ──▶ commit
              ▲                                                      │ not finite, or
              └──────────────────── back to the copy ◀───────────────┘ a member was lost

Nothing of an update is kept before it has succeeded as a whole: up to the commit the members only
play and add up; the commit itself asks nobody.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from demoreset_api.errors import NoProgress, TryAgain
from demoreset_api.names import CONFIRM, QUORUM
from demoreset_api.spec import After, RunSpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.confirm import Confirmation
from demoreset_trainer.curriculum import Result
from demoreset_trainer.demo import Demo
from demoreset_trainer.group import Group, Leaving, MemberLost, Quorum
from demoreset_trainer.guide import Guide
from demoreset_trainer.membership import DISK, Membership
from demoreset_trainer.policy import Policy
from demoreset_trainer.ppo import NotFinite, Ppo, Rollout, Statistics, minibatches
from demoreset_trainer.progress import Watch
from demoreset_trainer.rollout import Collector, Start
from demoreset_trainer.run_state import RunState
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import StartStates
from demoreset_trainer.telling import Telling

MAX_ATTEMPTS = 3  # of one update, before the run gives up
AT_GOAL = 0.25  # of a coefficient is left when all episodes from the game's own start succeed
MAX_FAILURES = 3  # in a row, before a person is told that members are lost again and again


class Saver(Protocol):
    """Who keeps the run's state."""

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""

    def save(self, snapshot: Snapshot, *, candidate: bool) -> None:
        """Write a checkpoint without holding up the loop; a candidate may be the best so far."""

    def finish(self, snapshot: Snapshot, *, candidate: bool) -> bool:
        """Write a checkpoint and wait for it; whether it is there."""

    overtaken: tuple[int, str]  # the life whose states are refused for the sake of a later, and why

    def take_life(self) -> int | None:
        """Take the run's next life: what is saved in an earlier one is refused from then on.

        None until it is taken: called again and again meanwhile.

        Raises:
            TryAgain: it could not be taken for now.
        """

    def facts(self) -> dict[str, Any]:
        """The checkpoint fields of `Progress`."""


@dataclass(frozen=True)
class Take:
    """What a member has played since the latest update: nothing yet, when it is new.

    held: the slots of the rollout. successes: of the goal's episodes, when one is confirmed.
    """

    rollout: Rollout
    held: npt.NDArray[np.int64]
    results: list[Result]
    successes: list[bool]


@dataclass(frozen=True)
class Stopped:
    """Whether the loop is to end, and why.

    goal_met: and nothing is left to do; a run that plays on has not met it by being stopped.
    """

    ended: bool = True
    goal_met: bool = False
    budget_spent: bool = False


class Loop:
    """One member's run.

    Args:
        demo: Cut to what is learned.
        policy: On its device.
        make_slots: Makes so many environments.
        codes: The joystick codes of the policy's actions.
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
        self.spec = spec
        self.state = RunState(spec, demo)
        self._open = ExitStack()  # what `run` closes: the slots
        self._stopping: Callable[[], bool] = lambda: False  # as `run` is told
        self._group, self._watch, self._saver = group, watch, saver
        self._make_slots, self._policy = make_slots, policy
        self._skip = spec.environment.frame_skip
        original = self.state.original
        self.ppo = Ppo(policy, spec.ppo, success_is_neutral=original)
        burn_in_decisions = spec.ppo.burn_in if policy.shape.hidden else 0
        self._burn_in = BurnIn(policy, states, burn_in_decisions, group.alive)
        # A long demo costs more than a rollout to watch: then it is watched less often.
        per_update = spec.environment.slots * spec.ppo.rollout_length
        self._refresh_every = max(1, len(states) // per_update)
        self._guide = Guide(demo, states, policy.shape.view, self._burn_in, codes)
        self._confirmation = Confirmation(
            policy,
            self._new_slots,
            episodes=spec.goal.episodes,
            seed=spec.seed,
            alive=group.alive,
            watch=lambda: watch.phase(CONFIRM),  # a sign of life
        )
        self._membership = Membership(
            group,
            self.state,
            self.ppo,
            self._burn_in,
            find=find,
            take_life=saver.take_life,
            note=watch.note,
        )
        self._deserted = False  # it leaves while the others may know better
        self._results: list[Result] = []  # of the latest update, as are the statistics
        self._statistics = Statistics()
        self._steps = self._coefficients()  # those of the statistics
        # Whether it has brought a confirmation; it is saved then: seldom is a policy known so well.
        self._confirmed = False
        self._explore_frames = spec.curriculum.in_force.explore_frames
        self._explore_every = 1 if original else 2
        self._telling = Telling(spec, len(demo), watch)

    # State

    def snapshot(self) -> Snapshot:
        """All that is needed to go on. Tensors are the live ones, not copies."""
        return self._membership.snapshot()

    @property
    def saves(self) -> bool:
        """Whether it falls to this member to save: it is the first, or lost sight of the others."""
        return self.state.life > 0 and (self._membership.rank == 0 or self._deserted)

    @property
    def candidate(self) -> bool:
        """Whether a checkpoint of now may be the run's best, as far as the demo can tell."""
        return not (self.state.playing_on or self._deserted)  # the others may stand better by now

    # The sequence

    def run(self, stopping: Callable[[], bool]) -> Stopped:
        """Train until the goal is met, the budget is spent, or `stopping` says so.

        Raises:
            NoProgress: the same update failed three times.
            TryAgain: it is to begin anew.
            SlotsDied: a process of environments is gone.
        """
        self._stopping = stopping
        with self._open:
            try:
                return self._run()
            except Leaving:
                self._deserted = True
                return Stopped(goal_met=self._over)
            except TryAgain:  # what it knows is old
                self._deserted = True
                raise
            finally:
                self._group.event("left", update=self.state.counters.update)

    def _run(self) -> Stopped:
        state, collector = self.state, self._collector()
        take = nothing = Take(collector.blank(), collector.held, [], [])
        fresh = True
        while True:
            quorum, learned = self._update(take, nothing)
            if fresh:
                self._burn_in.refresh()
                fresh = False
            state.counters.seconds = self._membership.seconds
            stopped = self._stopped(quorum)
            if learned:
                self._telling.update(
                    state,
                    self._statistics,
                    self._results,
                    quorum,
                    learning_rate=self._steps[0],
                    entropy_coefficient=self._steps[1],
                    checkpoint=self._saver.facts(),
                )
            if quorum.first and learned and (self._saver.due() or self._confirmed):
                with self._telling.phase("checkpoint"):
                    self._saver.save(self.snapshot(), candidate=self.candidate)
            if stopped.ended:
                return stopped
            if state.goal.met and not state.playing_on:
                self._play_on(quorum)
            staying = self._membership.staying
            state.deal(staying)
            successes = self._confirm(quorum.me, staying)
            with self._telling.phase("rollout"):
                mine = [slot for slot, owner in enumerate(state.owners) if owner == quorum.me]
                held = np.array(mine, np.int64)
                collector.hold(held, state.episodes[held])
                rollout, results = collector.collect(state.counters.update)
            take = Take(rollout, held, results, successes)

    def _stopped(self, quorum: Quorum) -> Stopped:
        budget = self.spec.budget.frames
        spent = budget is not None and self.state.counters.frames >= budget
        # Others are told before one leaves, so that they play its slots in the next rollout.
        alone = len(quorum.members) == 1
        leaving = quorum.me not in self._membership.staying or (alone and self._stopping())
        met = self._over or (spent and self.state.goal.met)
        return Stopped(met or spent or leaving, goal_met=met, budget_spent=spent)

    @property
    def _over(self) -> bool:
        """Whether the goal is met, and nothing is to follow."""
        return self.state.goal.met and self.spec.goal.after is After.STOP

    def _play_on(self, quorum: Quorum) -> None:
        """Go on for score; the policy that met the goal is kept as the best."""
        self._group.alive(DISK)
        self.state.playing_on = True
        self.state.ladder.relieve()  # nobody watches any more whether it is needed
        self._watch.note("goal met: playing on from the game's own start, for score")
        if quorum.first:
            with self._telling.phase("checkpoint"):
                kept = self._saver.finish(self.snapshot(), candidate=True)
            if not kept:
                self._watch.note("the policy that met the goal could not be saved as the best")
        self._group.alive()

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
            explore_frames=self._explore_frames,
            explore_every=self._explore_every,
            parts=2 if self.ppo.device.type == "cuda" else 1,
            alive=self._group.alive,
        )

    def _new_slots(self, count: int) -> Slots:
        slots: Slots = self._open.enter_context(self._make_slots(count))
        return slots.ready(self._group.alive)

    def _choose(self, slot: int, episode: int, random: np.random.Generator) -> Start:
        if self.state.playing_on:
            return Start(0, limits=False)
        return Start(self.state.curriculum.choose(slot, random))

    def _confirm(self, me: str, members: list[str]) -> list[bool]:
        """When the goal seems near: my share of its episodes, from the game's own start."""
        state = self.state
        if not state.goal.promising or state.curriculum.frontier or state.playing_on:
            return []
        with self._telling.phase(CONFIRM):
            return self._confirmation.share(state.counters.update, me, members, self._stopping)

    # One update

    def _update(self, take: Take, nothing: Take) -> tuple[Quorum, bool]:
        """One update, or none at all; whether there was anything to learn from.

        After a failure everything is as it was before.
        """
        rejected, failures, wrong = 0, 0, ""
        while rejected < MAX_ATTEMPTS:
            with self._telling.phase(QUORUM):
                quorum, ahead = self._membership.agree()
            counters = self.state.counters
            if not ahead:  # what was played belongs to a state that is gone
                take, rejected = nothing, 0
            with self._telling.phase("copy"):
                before = tuple(_copy(tensors) for tensors in self.ppo.state())
            begun = time.monotonic()
            try:
                with self._telling.phase("optimise"):
                    shares = self._exchange(take, quorum)
                    if not any(share["slots"] for share in shares):
                        return quorum, False
                    met = self._judge(shares)
                    if not met:
                        self._statistics = self._optimise(take, quorum, rejected)
            except MemberLost as error:
                self.ppo.load(*before)
                counters.rolled_back += 1
                failures += 1
                self._membership.lost(begun, error)
                if failures % MAX_FAILURES == 0:
                    self._watch.note(
                        f"update {counters.update + 1} was begun {failures} times, and a member "
                        f"was lost each time; the latest: {error}"
                    )
                continue
            except NotFinite as error:
                self.ppo.load(*before)
                rejected, wrong = rejected + 1, str(error)
                counters.rejected += 1
                self._watch.note(f"update {counters.update + 1} rejected: {wrong}")
                self._group.event("rejected", update=counters.update)
                continue
            except BaseException:  # what is saved on the way out is a whole update
                self.ppo.load(*before)
                raise
            with self._telling.phase("record"):
                self._commit(shares, met)
            return quorum, True
        raise NoProgress(
            f"update {self.state.counters.update + 1} failed {MAX_ATTEMPTS} times: {wrong}; "
            "lower spec.ppo.learningRate and run again: the checkpoint before it is kept"
        )

    def _exchange(self, take: Take, quorum: Quorum) -> list[dict[str, Any]]:
        """What every member brings to this update."""
        share = {
            "slots": len(take.held),
            "results": [astuple(result) for result in take.results],
            "successes": take.successes,
            "overtaken": self._saver.overtaken,
        }
        return self._membership.exchange(quorum, share, leaving=self._stopping())

    def _judge(self, shares: list[dict[str, Any]]) -> bool:
        """Whether the goal's episodes, if all were played, meet it."""
        successes = [one for share in shares for one in share["successes"]]
        wanted = self.spec.goal.episodes
        return len(successes) == wanted and self.state.goal.enough(successes)

    def _optimise(self, take: Take, quorum: Quorum, rejected: int) -> Statistics:
        spec, state = self.spec, self.state
        guide = 0.0 if state.playing_on else spec.curriculum.in_force.guide
        seed = [spec.seed, state.counters.update]
        self._steps = learning_rate, entropy = self._coefficients()
        return self.ppo.update(
            take.rollout,
            # After a rejected attempt otherwise than before; after a lost member as before.
            minibatches(spec.ppo, spec.environment.slots, take.held, seed, attempt=rejected),
            self._lessons(guide),
            self._group,
            learning_rate=learning_rate,
            entropy=entropy,
            guide=guide,
            members=len(quorum.members),
        )

    def _coefficients(self) -> tuple[float, float]:
        """Adam's step size and the entropy bonus's coefficient, as things stand."""
        return self._learning_rate(), self._entropy_coefficient()

    def _learning_rate(self) -> float:
        """Adam's step size now: with remedies, and smaller near the goal, to keep it.

        Without that a policy that succeeded in 92 % of the episodes from the game's own start fell
        to 50 % within ten updates.
        """
        remedy = self.state.ladder.remedy
        return self.spec.ppo.learning_rate * remedy.learning_rate * self._left_near_goal()

    def _entropy_coefficient(self) -> float:
        """Of the entropy bonus, with remedies; without a guide smaller near the goal.

        There it is large, so that the demo's actions are found: larger than what keeps a policy
        that has found them.
        """
        coefficient = self.spec.entropy * self.state.ladder.remedy.entropy
        if self.spec.curriculum.in_force.guide:
            return coefficient
        return coefficient * (AT_GOAL if self.state.playing_on else self._left_near_goal())

    def _left_near_goal(self) -> float:
        """Of a coefficient that shrinks as success from the game's own start grows."""
        state = self.state
        if state.curriculum.frontier or state.playing_on:
            return 1.0
        return 1 - (1 - AT_GOAL) * (state.goal.rate or 0.0)

    def _lessons(self, guide: float) -> Iterator[Any]:
        spec, state = self.spec, self.state
        guidance = state.curriculum.guidance()
        random = np.random.default_rng([spec.seed, state.counters.update, 2**31])
        for _ in range(spec.ppo.epochs * spec.ppo.minibatches):
            yield self._guide.lesson(guidance, random) if guide else None

    def _commit(self, shares: list[dict[str, Any]], met: bool) -> None:
        """Take in what the update has brought; asks nobody, so that it cannot half happen."""
        state, counters, goal = self.state, self.state.counters, self.spec.goal
        results = sorted(
            (Result(*result) for share in shares for result in share["results"]),
            key=lambda result: (result.slot, result.episode),
        )
        successes = [one for share in shares for one in share["successes"]]
        state.record(results, sum(share["slots"] for share in shares))
        counters.agree(share["seen"] for share in shares)
        self._results = results
        self._confirmed = not state.playing_on and len(successes) == goal.episodes
        self._group.event(
            "commit",
            life=state.life,
            update=counters.update,
            frames=counters.frames,
            digest=self._membership.digest,
        )
        if state.playing_on:
            return
        state.curriculum.record(results)
        state.goal.record(results)
        if self._confirmed:
            # Where it did not meet the goal its policy was trained on, in this very update.
            state.goal.confirm(successes, counters.update if met else counters.update - 1)
            self._watch.note(
                f"confirmation: {sum(successes)} of {len(successes)} episodes from the game's own "
                f"start tie the demo; the goal is {goal.success_rate:.0%}"
                + ("" if met else ": on with the training")
            )
        if state.curriculum.frontier == 0 and counters.start_reached_frames is None:
            counters.start_reached_frames = counters.frames
            counters.start_reached_seconds = counters.seconds
            self._watch.note("the start has reached the game's own start")
        changed = state.ladder.watch(
            frames=counters.frames,
            start=state.curriculum.frontier,
            goal_rate=state.goal.sound_rate,
        )
        if changed:
            self._watch.note(changed)
        if counters.update % self._refresh_every == 0:
            self._burn_in.refresh()  # last: it takes time, in which this member may have to leave


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
