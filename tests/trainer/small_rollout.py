"""A policy, a rollout and a lesson that are as small as can be, for tests of the optimisation."""

import numpy as np
import numpy.typing as npt
import torch

from demoreset_trainer.env import End
from demoreset_trainer.policy import Architecture, Policy
from demoreset_trainer.ppo import Lesson, Rollout
from demoreset_trainer.states import View

TINY = View(12, 12, stack=2)
PLAIN = Architecture(TINY, ((4, 4, 2),), features=8, hidden=0)
MEMORY = Architecture(TINY, ((4, 4, 2),), features=8, hidden=6)
ACTIONS = 3


def make(shape: Architecture) -> Policy:
    torch.manual_seed(0)
    policy = Policy(shape, ACTIONS)
    policy.exact = True
    with torch.no_grad():  # not nearly uniform, or errors would hide
        policy.actor.weight.mul_(60)
    return policy


def rollout(
    shape: Architecture, *, slots: int = 4, length: int = 5, burn_in: int = 3, seed: int = 0
) -> Rollout:
    """Anything that could have happened, of a policy a little different from today's."""
    random = np.random.default_rng(seed)
    rows = burn_in + length

    def floats(*size: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(size).astype(np.float32)

    ends = random.choice(len(End), (length, slots), p=[0.65] + [0.35 / 6] * 6).astype(np.uint8)
    begins = random.random((rows, slots)) < 0.2
    begins[burn_in + 1 :] = ends[:-1] != 0
    return Rollout(
        observations=torch.from_numpy(
            random.integers(0, 256, (rows, slots, *TINY.shape), dtype=np.uint8)
        ),
        begins=begins,
        states=torch.from_numpy(floats(rows, slots, shape.hidden)),
        actions=random.integers(0, ACTIONS, (length, slots)),
        log_probs=np.log(random.uniform(0.2, 0.6, (length, slots))).astype(np.float32),
        values=floats(length, slots),
        rewards=floats(length, slots),
        ends=ends,
        end_values=floats(length, slots),
        logit_scale=random.choice([0.5, 1.0], (length, slots)).astype(np.float32),
        last_values=floats(slots),
    )


def make_lesson(shape: Architecture) -> Lesson:
    random = np.random.default_rng(5)
    return Lesson(
        observations=random.integers(0, 256, (6, *TINY.shape), dtype=np.uint8),
        states=torch.from_numpy(random.standard_normal((6, shape.hidden)).astype(np.float32)),
        actions=random.integers(0, ACTIONS, 6),
        weights=random.random(6).astype(np.float32),
    )
