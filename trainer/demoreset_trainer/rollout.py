"""Playing: the slots that a member holds and the policy, T decisions at a time.

Randomness belongs to slots: what slot 7 draws does not depend on which member holds it, nor on how
many there are. Episode e of slot s draws from the stream (seed, s, e); the actions of update u come
from one table of random numbers over all slots of the run, of which a member reads its columns.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.curriculum import Result
from demoreset_trainer.env import TRUNCATED
from demoreset_trainer.gpu import Recorded, to_device
from demoreset_trainer.policy import Policy
from demoreset_trainer.ppo import Rollout
from demoreset_trainer.slots import IDLE, Begin, Slots
from demoreset_trainer.streams import seed_from, stream

EXPLORING_SCALE = 0.5  # what the logits are multiplied with
MAKING = 60.0  # seconds that new environments may take to be made


@dataclass(frozen=True)
class Start:
    """Where an episode begins: a frame of the demo; with the demo's limits or for score."""

    frame: int
    limits: bool = True


Choose = Callable[[int, int, np.random.Generator], Start]  # (slot, episode, random)


class Collector:
    """Plays the slots that a member holds, and remembers their latest decisions.

    Args:
        slots: Environments for all slots of the run; those that are not held stand still.
        choose: Asked for the start of every episode.
        parts: Into how many parts the slots are divided, of which one is decided for while the
            others play: with two, neither a GPU nor the games wait for each other.
        alive: Told that the loop moves, or of something that may take so many seconds.
    """

    def __init__(
        self,
        slots: Slots,
        policy: Policy,
        burn_in: BurnIn,
        choose: Choose,
        *,
        seed: int,
        frame_skip: int,
        length: int,
        history: int,
        explore_frames: int,
        explore_every: int,
        parts: int = 1,
        alive: Callable[..., None] = lambda *_: None,
    ) -> None:
        self._slots, self._total = slots, len(slots.action)
        self._policy, self._burn_in, self._choose = policy, burn_in, choose
        self._seed, self._skip, self._length = seed, frame_skip, length
        self._explore = explore_frames // frame_skip
        self._explore_every = explore_every
        self._alive = alive
        self._history = history if policy.shape.hidden else 0
        self.device = next(policy.parameters()).device
        self._recorded = Recorded(self._decide, self.device)
        self._count_of_parts = parts
        self.held = np.zeros(0, np.int64)  # numbers of the slots, ascending
        self._make_room(0)

    def _make_room(self, count: int) -> None:
        """Arrays for so many slots; what is in them belongs to no episode."""
        view, rows, hidden = self._slots.view, self._history + self._length, self._hidden
        self.episodes = np.full(count, -1, np.int64)  # number of each slot's current episode
        images = count, *view.shape
        self._observations = torch.zeros((rows, *images), dtype=torch.uint8, device=self.device)
        self._states = torch.zeros((rows, count, hidden), device=self.device)
        self._begins = np.zeros((rows, count), np.bool_)
        on_gpu = self.device.type == "cuda"
        # Images go to a GPU by way of memory that it can read by itself.
        self._staging = torch.zeros(images, dtype=torch.uint8, pin_memory=True) if on_gpu else None
        self._begun = np.ones(count, np.bool_)  # an episode begins with the next decision
        self._age = np.zeros(count, np.int64)  # decisions of the current episode
        self._starts = np.zeros(count, np.int64)
        self._state = self._policy.initial_state(count, self.device)
        self._planned: dict[int, Begin] = {}  # the next episode of a column
        bounds = np.linspace(0, count, self._count_of_parts + 1).astype(int).tolist()
        self._parts = [slice(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]

    @property
    def _hidden(self) -> int:
        return self._policy.shape.hidden

    def hold(self, held: npt.NDArray[np.int64], episodes: npt.NDArray[np.int64]) -> None:
        """Play these slots from now on; `episodes`: the number of each one's current episode.

        Where a slot plays that episode already it goes on; elsewhere the episode begins.
        """
        before = {
            (slot, episode): column
            for column, (slot, episode) in enumerate(
                zip(self.held.tolist(), self.episodes.tolist(), strict=True)
            )
        }
        running = list(zip(held.tolist(), episodes.tolist(), strict=True))
        if running == list(before):
            return
        observations, begins, states = self._observations, self._begins, self._states
        begun, age, starts, state = self._begun, self._age, self._starts, self._state
        planned = self._planned
        self._make_room(len(held))
        self.held, self.episodes = held.copy(), episodes.copy()
        fresh = [column for column, key in enumerate(running) if key not in before]
        kept = [column for column, key in enumerate(running) if key in before]
        source = [before[running[column]] for column in kept]
        self._observations[:, kept] = observations[:, source]
        self._begins[:, kept] = begins[:, source]
        self._states[:, kept] = states[:, source]
        self._begun[kept] = begun[source]
        self._age[kept] = age[source]
        self._starts[kept] = starts[source]
        self._state[kept] = state[source]
        self._planned = {column: planned[one] for column, one in zip(kept, source, strict=True)}
        self._planned |= {column: self._begin(column, int(episodes[column])) for column in fresh}
        self._alive(MAKING)
        self._slots.begin({int(held[column]): self._planned[column] for column in fresh})
        self._alive()
        self._slots.action[:] = IDLE
        self._enter(np.array(fresh, np.int64))

    def blank(self) -> Rollout:
        """A rollout of the slots that are held, before it is played."""
        shape = self._length, len(self.held)
        log_probs, values, rewards, end_values, logit_scale = np.zeros((5, *shape), np.float32)
        return Rollout(
            observations=self._observations,
            begins=self._begins,
            states=self._states,
            actions=np.zeros(shape, np.int64),
            log_probs=log_probs,
            values=values,
            rewards=rewards,
            ends=np.zeros(shape, np.uint8),
            end_values=end_values,
            logit_scale=logit_scale,
            last_values=np.zeros(shape[1], np.float32),
        )

    def _begin(self, i: int, episode: int) -> Begin:
        slot = int(self.held[i])
        random = stream(self._seed, slot, episode)
        start = self._choose(slot, episode, random)
        return Begin(start.frame, seed_from(random), start.limits)

    def _enter(self, which: npt.NDArray[np.int64]) -> None:
        """The planned episodes have begun in these columns; plan the ones after."""
        for i in which.tolist():
            self._starts[i] = self._planned[i].start
            self._plan(i)
        self._begun[which] = True
        self._age[which] = 0

    def _plan(self, i: int) -> None:
        self._planned[i] = self._begin(i, int(self.episodes[i]) + 1)
        self._slots.plan(int(self.held[i]), self._planned[i])

    @torch.no_grad()
    def collect(self, update: int) -> tuple[Rollout, list[Result]]:
        """Play one rollout; its results come in the order of their slots and episodes."""
        history, length, count = self._history, self._length, len(self.held)
        if not count:
            return self.blank(), []
        # The latest decisions of the rollout before are this one's burn-in.
        if history:
            self._begins[:history] = self._begins[-history:].copy()
            for kept in (self._observations, self._states):
                kept[:history] = kept[-history:].clone()
        for i in range(count):  # the curriculum has moved since the next episodes were planned
            self._plan(i)
        rollout = self.blank()
        noise = self._noise(update)
        results: list[Result] = []
        for t in range(length):
            for part in self._parts:
                if t:
                    results += self._see(rollout, t - 1, part)
                self._act(rollout, t, part, noise[t, part])
        for part in self._parts:
            results += self._see(rollout, length - 1, part)
        # Behind the rollout; of no account where an episode has just begun.
        rollout.last_values[:] = self._values(
            self._slots.observation[self.held], self._state, np.arange(count)
        )
        return rollout, sorted(results, key=lambda result: (result.slot, result.episode))

    def _act(self, rollout: Rollout, t: int, part: slice, noise: npt.NDArray[np.float32]) -> None:
        """Decide for these columns, and let their slots play it."""
        row, begun, held = self._history + t, self._begun[part], self.held[part]
        self._begins[row, part] = begun
        if self._hidden and begun.any():
            fresh = np.flatnonzero(begun) + part.start
            states = self._burn_in.at(self._starts[fresh] // self._skip)
            self._state.index_copy_(0, to_device(fresh, self.device), states)
        self._states[row, part] = self._state[part]
        begun[:] = False
        logit_scale = np.where(self._exploring()[part], EXPLORING_SCALE, 1).astype(np.float32)
        chances = to_device(np.stack([logit_scale, noise]), self.device)
        answers, state = self._recorded(self._observe(row, part), self._state[part], chances)
        self._state[part] = state
        rollout.logit_scale[t, part] = logit_scale
        actions, log_probs, values = answers.cpu().numpy()
        rollout.actions[t, part], rollout.log_probs[t, part] = actions, log_probs
        rollout.values[t, part] = values
        self._slots.action[held] = rollout.actions[t, part]
        self._slots.send(int(held[0]), int(held[-1]) + 1)

    def _see(self, rollout: Rollout, t: int, part: slice) -> list[Result]:
        """Wait for what came of it in these columns; the results of episodes that ended."""
        slots, held = self._slots, self.held
        slots.wait()
        self._alive()
        self._age[part] += 1
        rollout.rewards[t, part] = slots.reward[held[part]]
        ends = rollout.ends[t]
        ends[part] = slots.end[held[part]]
        ended = np.flatnonzero(ends[part]) + part.start
        if not len(ended):
            return []
        cut = ended[np.isin(ends[ended], list(TRUNCATED))]
        if len(cut):
            seen = slots.last_observation[held[cut]]
            rollout.end_values[t, cut] = self._values(seen, self._state, cut)
        results = [self._result(i) for i in ended.tolist()]
        self.episodes[ended] += 1
        self._enter(ended)
        return results

    def _noise(self, update: int) -> npt.NDArray[np.float32]:
        """A random number for every decision of this update, [T, slots of this member]."""
        random = stream(self._seed, self._total, update)
        table = random.random((self._length, self._total), dtype=np.float32)
        return table[:, self.held]

    def _exploring(self) -> npt.NDArray[np.bool_]:
        return self._explorers() & (self._age < self._explore)

    def _explorers(self) -> npt.NDArray[np.bool_]:
        """Of which columns the episode explores.

        From the game's own start at most every second: the others tell how good the policy is.
        """
        every = np.where(self._starts == 0, max(2, self._explore_every), self._explore_every)
        exploring: npt.NDArray[np.bool_] = self.episodes % every == 0
        return exploring & (self._explore > 0)

    def _observe(self, row: int, part: slice) -> Tensor:
        """What these columns see now, kept in a row of the rollout, [columns, C, H, W]."""
        seen = self._observations[row, part]
        there = seen if self._staging is None else self._staging[part]
        held = self.held[part]
        np.take(self._slots.observation, held, axis=0, out=there.numpy(), mode="clip")
        if there is not seen:  # it has arrived before the next one: the answer is waited for
            seen.copy_(there, non_blocking=True)
        return seen

    def _decide(
        self, observations: Tensor, state: Tensor, chances: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Actions, their log probabilities and values as one tensor [3, B]; the state behind.

        chances [2, B]: logit_scale and noise.
        """
        logit_scale, noise = chances
        logits, values, state = self._policy.step(observations, state)
        log_probs = functional.log_softmax(logits * logit_scale.unsqueeze(1), 1)
        actions = sample(log_probs, noise)
        chosen = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
        return torch.stack([actions.float(), chosen, values]), state

    def _values(
        self, observations: npt.NDArray[np.uint8], state: Tensor, which: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        seen, index = (to_device(array, self.device) for array in (observations, which))
        _, values, _ = self._policy.step(seen, state[index])
        return values.cpu().numpy()

    def _result(self, i: int) -> Result:
        slots, slot = self._slots, int(self.held[i])
        return Result(
            slot=slot,
            episode=int(self.episodes[i]),
            start=int(self._starts[i]),
            success=bool(slots.success[slot]),
            score=int(slots.score[slot]),
            frames=int(slots.frame[slot]) - int(self._starts[i]),
            end=int(slots.end[slot]),
            explored=bool(self._explorers()[i]),
        )


def sample(log_probs: Tensor, noise: Tensor) -> Tensor:
    """Actions [B] by inversion of the distribution [B, A] at `noise` [B] from [0, 1)."""
    cumulative = log_probs.exp().cumsum(1)
    actions = (cumulative <= noise.unsqueeze(1)).sum(1)
    return actions.clamp(max=log_probs.shape[1] - 1)
