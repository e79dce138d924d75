"""Playing a number of episodes to their ends with a policy that does not change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from demoreset_trainer.gpu import to_device
from demoreset_trainer.policy import Policy
from demoreset_trainer.rollout import sample
from demoreset_trainer.slots import IDLE, Begin, Slots
from demoreset_trainer.streams import stream

SHARPENED = 2.0  # what the logits are multiplied with (atari-reset's "sharpened" policy)


class Act(StrEnum):
    """How an action comes from the policy's probabilities."""

    SAMPLED = "sampled"
    SHARPENED = "sharpened"
    ARGMAX = "argmax"


@dataclass(frozen=True)
class Played:
    """An episode that was played to its end."""

    score: int  # at its end
    highest: int  # at any time
    frames: int
    success: bool
    end: int


@torch.no_grad()
def play(
    slots: Slots,
    policy: Policy,
    begins: Sequence[Begin],
    *,
    act: Act = Act.SAMPLED,
    epsilon: float = 0.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    states: Tensor | None = None,
    watch: Callable[[int], None] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> list[Played]:
    """Play the episodes `begins`, each to its end; slot s of N plays the episodes s, s + N, ...

    `epsilon`: chance of a uniformly random action. `states` [episodes, S]: what a recurrent policy
    remembers at their starts; default nothing. `watch` is told how many episodes have ended,
    `alive` that something moves. Every episode draws from a stream of its own, that of its number
    (default: its place in `begins`), so the results do not depend on the number of slots.
    """
    count = len(slots.action)
    device = next(policy.parameters()).device
    numbers = range(len(begins)) if numbers is None else numbers
    known = torch.zeros(len(begins), policy.shape.hidden) if states is None else states
    memory = policy.initial_state(count, device)
    played: list[Played | None] = [None] * len(begins)
    active = list(range(min(count, len(begins))))
    episode = list(range(count))  # that each slot plays
    ended = 0

    def enter(slot: int) -> np.random.Generator:
        """The slot's episode has begun: say where its next one will."""
        later = episode[slot] + count
        if later < len(begins):
            slots.plan(slot, begins[later])
        memory[slot] = known[episode[slot]].to(device)
        return stream(seed, numbers[episode[slot]])

    slots.reset([begins[slot % len(begins)] for slot in range(count)])
    streams = [enter(slot) for slot in active]
    while active:
        index = torch.tensor(active, device=device)
        observations = to_device(slots.observation[active], device)
        logits, _, behind = policy.step(observations, memory[index])
        memory[index] = behind
        noise = np.array([streams[slot].random(2) for slot in active])
        slots.action[:] = IDLE
        slots.action[active] = choose(logits.cpu(), noise, act, epsilon)
        slots.send()
        slots.wait()
        alive()
        for slot in list(active):
            if not slots.end[slot]:
                continue
            played[episode[slot]] = Played(
                score=int(slots.score[slot]),
                highest=int(slots.highest[slot]),
                frames=int(slots.frame[slot]) - begins[episode[slot]].start,
                success=bool(slots.success[slot]),
                end=int(slots.end[slot]),
            )
            ended += 1
            if watch is not None:
                watch(ended)
            episode[slot] += count
            if episode[slot] < len(begins):
                streams[slot] = enter(slot)
            else:
                active.remove(slot)
    return [one for one in played if one is not None]


def choose(
    logits: Tensor, noise: npt.NDArray[np.float64], act: Act, epsilon: float
) -> npt.NDArray[np.int64]:
    """An action for each row of logits [n, A], with random numbers [n, 2]."""
    if act is Act.ARGMAX:
        actions = logits.argmax(1)
    else:
        scale = SHARPENED if act is Act.SHARPENED else 1.0
        log_probs = functional.log_softmax(logits * scale, 1)
        actions = sample(log_probs, torch.from_numpy(noise[:, 0]).float())
    chosen = actions.numpy()
    if epsilon:
        # What is left of a number below epsilon is uniform again, and picks the action.
        random = np.minimum(noise[:, 1] / epsilon * logits.shape[1], logits.shape[1] - 1)
        chosen = np.where(noise[:, 1] < epsilon, random.astype(np.int64), chosen)
    return chosen
