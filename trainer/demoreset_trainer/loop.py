"""The sequence of a run: play, agree on the members, optimise, report, save; until the goal is met.

    rollout ──▶ quorum ──▶ optimise ──▶ record ──▶ confirm the goal? ──▶ save ──▶ next rollout
                  ▲            │ not finite, or a member was lost
                  └── copy ◀───┘

Nothing of an update is kept before it has succeeded as a whole.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from demoreset_api.errors import NoProgress
from demoreset_api.spec import After, CurriculumMode, RunSpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.curriculum import Curriculum, Result, make_curriculum
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import End, Rules
from demoreset_trainer.goal import GoalWatch
from demoreset_trainer.group import Group, MemberLost, Quorum
from demoreset_trainer.guide import Guide
from demoreset_trainer.play import play
from demoreset_trainer.policy import Policy
from demoreset_trainer.ppo import NotFinite, Ppo, Rollout, Statistics
from demoreset_trainer.progress import Progress
from demoreset_trainer.rollout import Collector, Start
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.stall import Ladder
from demoreset_trainer.states import StartStates

MOST_ATTEMPTS = 3  # of one update, before the run gives up
CALM = 0.25  # of the learning rate is left when every episode from the game's own start succeeds
CONFIRMING = 32  # slots that play a confirmation
MAX_EPISODE_FRAMES = 108_000  # 30 minutes of play, the field's usual limit


class Watch(Protocol):
    """Who is told how the run goes."""

    def phase(self, name: str) -> None:
        """The loop has entered a phase."""

    def update(self, progress: Progress) -> None:
        """An update is done."""

    def note(self, text: str) -> None:
        """Something happened that a person wants to know."""


class Saver(Protocol):
    """Who keeps the run's state."""

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""

    def save(self, snapshot: Snapshot, *, best: bool) -> None:
        """Write a checkpoint without holding up the loop."""

    def facts(self) -> dict[str, Any]:
        """The checkpoint fields of `Progress`."""


@dataclass
class Counters:
    """What a run has done, over all its lives."""

    update: int = 0
    frames: int = 0
    episodes: int = 0
    seconds: float = 0.0
    score_max: float | None = None
    rejected: int = 0
    start_reached_frames: int | None = None  # when the frontier first was the game's own start
    start_reached_seconds: float | None = None


@dataclass(frozen=True)
class Stopped:
    """Why the loop ended."""

    goal_met: bool = False
    budget_spent: bool = False


class Loop:
    """One member's run.

    Args:
        spec: What is wanted.
        demo: Its demonstration, cut to what is learned.
        states: The demo's start states.
        policy: On its device.
        make_slots: Makes so many environments for this member.
        codes: The joystick codes of the policy's actions.
        group: The members.
        watch: Told how it goes.
        saver: Keeps its state.
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
        life: int,
    ) -> None:
        self.spec, self.demo, self.life = spec, demo, life
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
        self._burn_in = BurnIn(policy, states, burn_in_decisions)
        # A long demo costs more than a rollout to watch: then it is watched less often.
        per_update = spec.environment.slots * spec.ppo.rollout_length
        self._refresh_every = max(1, len(states) // per_update)
        self._guide = Guide(demo, states, policy.shape.view, self._burn_in, codes)
        default_guide = 0.0 if original else 0.1
        guide = spec.curriculum.guide
        self.guide_weight = default_guide if guide is None else guide
        self._episodes = np.zeros(spec.environment.slots, np.int64)
        self._explore_frames = spec.curriculum.explore_frames
        if self._explore_frames is None:
            self._explore_frames = 100 if original else 0
        self._explore_every = 1 if original else 2
        self._playing_on = False
        self._apart: Slots | None = None
        self._phases: dict[str, float] = {}
        self._speed: deque[tuple[float, int]] = deque(maxlen=30)
        self._moves: deque[tuple[float, int]] = deque(maxlen=200)

    # State

    def snapshot(self, members: int = 1) -> Snapshot:
        """All that is needed to go on. Tensors are the live ones, not copies."""
        model, optimizer = self.ppo.state()
        return Snapshot(
            life=self.life,
            update=self.counters.update,
            frames=self.counters.frames,
            members=members,
            model=model,
            optimizer=optimizer,
            state={
                "spec": self.spec.model_dump(mode="json", by_alias=True),
                "demo": {"game": self.demo.game, "sha256": self.demo.sha256},
                "counters": asdict(self.counters),
                "curriculum": self.curriculum.state(),
                "goal": self.goal.state(),
                "stall": self.ladder.state(),
                "episodes": self._episodes.tolist(),
                "playing_on": self._playing_on,
            },
        )

    def load(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        state = snapshot.state
        self.ppo.load(snapshot.model, snapshot.optimizer)
        known = {field.name for field in fields(Counters)}
        counters = {name: value for name, value in state["counters"].items() if name in known}
        self.counters = Counters(**counters)
        self.curriculum.load(state["curriculum"])
        self.goal.load(state["goal"])
        if state["spec"]["goal"] != self.spec.goal.model_dump(mode="json", by_alias=True):
            self.goal.met = False  # another goal
        self.ladder.load(state["stall"])
        # The episodes that ran when it was saved are lost; their numbers are not used again.
        episodes = np.array(state["episodes"], np.int64) + 2
        kept = min(len(episodes), len(self._episodes))
        self._episodes[:kept] = episodes[:kept]
        self._playing_on = bool(state["playing_on"])

    # The sequence

    def run(self, stopping: Callable[[], bool]) -> Stopped:
        """Train until the goal is met, the budget is spent, or `stopping` says so.

        Raises:
            NoProgress: the same update failed three times.
            SlotsDied: a process of environments is gone.
        """
        with ExitStack() as self._open:
            return self._run(stopping)

    def _run(self, stopping: Callable[[], bool]) -> Stopped:
        quorum = self._group.quorum(self.counters.update)
        self._burn_in.refresh()
        collector = self._collector(quorum)
        begun = time.monotonic() - self.counters.seconds
        while not stopping():
            budget = self.spec.budget.frames
            if budget is not None and self.counters.frames >= budget:
                return Stopped(goal_met=self.goal.met, budget_spent=True)
            with self._phase("rollout"):
                rollout, results = collector.collect(self.counters.update)
            with self._phase("optimise"):
                statistics, quorum = self._optimise(rollout, quorum)
            with self._phase("record"):
                self._record(self._group.gather(results), collector)
            self.counters.seconds = time.monotonic() - begun
            met = False
            if self.goal.promising and self.curriculum.frontier == 0 and not self._playing_on:
                with self._phase("confirm"):
                    met = self._confirm(quorum)
                self.counters.seconds = time.monotonic() - begun
            self._tell(results, statistics, quorum)
            self._phases = {}  # a checkpoint counts to the update after it
            if met and self.spec.goal.after is After.PLAY_ON:
                self._playing_on = True
                self._watch.note("goal met: playing on from the game's own start, for score")
                met = False
            if met or self._saver.due():
                with self._phase("checkpoint"):
                    self._saver.save(self.snapshot(quorum.members), best=self.at_best())
            if met:
                return Stopped(goal_met=True)
        return Stopped(goal_met=self.goal.met)

    def _collector(self, quorum: Quorum) -> Collector:
        """Begin new episodes in all slots of this member."""
        block = quorum.block(self.spec.environment.slots)
        return Collector(
            self._open.enter_context(self._make_slots(len(block))),
            block,
            self.spec.environment.slots,
            self._policy,
            self._burn_in,
            self._choose,
            seed=self.spec.seed,
            frame_skip=self._skip,
            length=self.spec.ppo.rollout_length,
            history=self.spec.ppo.burn_in,
            explore_frames=self._explore_frames or 0,
            explore_every=self._explore_every,
            episodes=self._episodes[block.start : block.stop],
        )

    def _choose(self, slot: int, episode: int, random: np.random.Generator) -> Start:
        if self._playing_on:
            return Start(0, limits=False)
        return Start(self.curriculum.choose(slot, random))

    def _optimise(self, rollout: Rollout, quorum: Quorum) -> tuple[Statistics, Quorum]:
        """One update, or none at all: after a failure everything is as it was before."""
        spec = self.spec
        remedy = self.ladder.remedy
        learning_rate = spec.ppo.learning_rate * remedy.learning_rate * self._calm()
        guide = 0.0 if self._playing_on else self.guide_weight
        rejected = 0
        while rejected < MOST_ATTEMPTS:
            before = tuple(_copy(tensors) for tensors in self.ppo.state())
            try:
                return self.ppo.update(
                    rollout,
                    self._minibatches(quorum, rejected),
                    self._lessons(guide),
                    self._group,
                    learning_rate=learning_rate,
                    entropy=spec.ppo.entropy * remedy.entropy,
                    guide=guide,
                    members=quorum.members,
                ), quorum
            except MemberLost:
                self.ppo.load(*before)
                quorum = self._group.quorum(self.counters.update)
            except NotFinite as error:
                self.ppo.load(*before)
                rejected += 1
                self.counters.rejected += 1
                self._watch.note(f"update {self.counters.update} rejected: {error}")
        raise NoProgress(
            f"update {self.counters.update} failed {MOST_ATTEMPTS} times: its loss is not finite; "
            "lower spec.ppo.learningRate and run again: the checkpoint before it is kept"
        )

    def _calm(self) -> float:
        """What the learning rate is multiplied with near the goal: smaller steps keep it.

        Without it a policy that succeeded in 92 % of the episodes from the game's own start fell
        to 50 % within ten updates.
        """
        if self.curriculum.frontier or self._playing_on:
            return 1.0
        return 1 - (1 - CALM) * (self.goal.rate or 0.0)

    def _minibatches(self, quorum: Quorum, rejected: int) -> Iterator[np.ndarray[Any, Any]]:
        """Columns of the rollout: each epoch cuts all slots of the run anew.

        After a rejected attempt otherwise than before; after a lost member as before.
        """
        spec = self.spec
        slots = spec.environment.slots
        block = quorum.block(slots)
        for epoch in range(spec.ppo.epochs):
            random = np.random.default_rng([spec.seed, self.counters.update, epoch, rejected])
            for part in np.split(random.permutation(slots), spec.ppo.minibatches):
                mine = part[(part >= block.start) & (part < block.stop)]
                yield mine - block.start

    def _lessons(self, guide: float) -> Iterator[Any]:
        spec = self.spec
        guidance = self.curriculum.guidance()
        random = np.random.default_rng([spec.seed, self.counters.update, 2**31])
        for _ in range(spec.ppo.epochs * spec.ppo.minibatches):
            yield self._guide.lesson(guidance, random) if guide else None

    def _record(self, results: list[Result], collector: Collector) -> None:
        """Take in what the update has brought."""
        spec, counters = self.spec, self.counters
        counters.update += 1
        counters.frames += spec.ppo.rollout_length * spec.environment.slots * self._skip
        counters.episodes += len(results)
        for result in results:
            if result.start == 0:
                counters.score_max = max(result.score, counters.score_max or result.score)
        self._episodes[collector.block.start : collector.block.stop] = collector.episodes
        if self._playing_on:
            return
        self.curriculum.record(results)
        self.goal.record(results)
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

    def _confirm(self, quorum: Quorum) -> bool:
        """Hold the policy still and play the goal's episodes from the game's own start.

        In slots of its own: if the training's were used, all of their episodes would begin anew at
        the same moment, and the rollouts after a failed confirmation would be of one kind.
        """
        goal, random = self.spec.goal, np.random.default_rng([self.spec.seed, self.counters.update])
        mine = range(quorum.rank, goal.episodes, quorum.members)
        begins = [Begin(0, int(random.integers(2**62))) for _ in range(goal.episodes)]
        if self._apart is None:
            self._apart = self._open.enter_context(self._make_slots(min(len(mine), CONFIRMING)))
        played = play(
            self._apart,
            self._policy,
            [begins[i] for i in mine],
            seed=self.spec.seed,
            watch=lambda _: self._watch.phase("confirm"),  # a sign of life
        )
        successes = self._group.gather([episode.success for episode in played])
        met = self.goal.confirm(successes)
        self._watch.note(
            f"confirmation: {sum(successes)} of {len(successes)} episodes from the game's own "
            f"start tie the demo; the goal is {goal.success_rate:.0%}"
            + ("" if met else ": on with the training")
        )
        return met

    def at_best(self) -> bool:
        """Whether the run has never stood better than now."""
        return self.goal.met or self.ladder.at_best

    # Telling

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._watch.phase(name)
        begun = time.monotonic()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - begun

    def _tell(self, results: list[Result], statistics: Statistics, quorum: Quorum) -> None:
        counters, spec, ladder = self.counters, self.spec, self.ladder
        self._speed.append((counters.seconds, counters.frames))
        frontier = self.curriculum.frontier
        self._moves.append((counters.seconds, frontier))
        from_start = [result.score for result in results if result.start == 0]
        self._watch.update(
            Progress(
                update=counters.update,
                frames=counters.frames,
                seconds=counters.seconds,
                episodes=counters.episodes,
                start_frame=frontier,
                demo_frames=len(self.demo),
                success_rate=self.curriculum.success_rate(),
                goal_rate=self.goal.rate,
                goal=spec.goal.success_rate,
                ended=len(results),
                outcomes=dict(Counter(End(result.end).name for result in results)),
                score_mean=float(np.mean(from_start)) if from_start else None,
                score_max=counters.score_max,
                learning_rate=spec.ppo.learning_rate * ladder.remedy.learning_rate * self._calm(),
                entropy_coefficient=spec.ppo.entropy * ladder.remedy.entropy,
                stall_rung=ladder.rung,
                stalled=ladder.stalled,
                **asdict(statistics),
                frames_per_second=_slope(self._speed),
                phase_seconds=dict(self._phases),
                members=quorum.members,
                generation=quorum.generation,
                rejected_updates=counters.rejected,
                budget_frames=spec.budget.frames,
                eta_seconds=self._eta(frontier),
                **self._saver.facts(),
            )
        )

    def _eta(self, frontier: int) -> float | None:
        """Seconds until the start is reached, at the pace of the latest updates."""
        pace = -_slope(self._moves)
        return frontier / pace if pace > 0 else None


def rules(spec: RunSpec) -> Rules:
    """What an episode of a run is."""
    curriculum, environment = spec.curriculum, spec.environment
    original = curriculum.mode is CurriculumMode.ORIGINAL
    return Rules(
        frame_skip=environment.frame_skip,
        sticky_probability=environment.sticky_probability,
        no_ops=environment.no_ops,
        life_loss_ends=environment.life_loss_ends,
        lag_frames=curriculum.lag_frames or (50 if original else 240),
        extra_frames=curriculum.extra_frames or (1096 if original else 80),
        horizon_frames=curriculum.horizon_frames,
        max_frames=MAX_EPISODE_FRAMES,
        full_action_space=environment.full_action_space,
        scaled_reward=environment.reward == "Scaled",
    )


def last_start(demo: Demo, frame_skip: int) -> int:
    """The last start from which there still is something to earn, in frames."""
    short = np.flatnonzero(demo.scores[:-1] < demo.scores[-1])
    last = int(short[-1]) if len(short) else 0
    return last // frame_skip * frame_skip


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _slope(points: deque[tuple[float, int]]) -> float:
    """Change per second between the first and the last of the points."""
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return 0.0
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
