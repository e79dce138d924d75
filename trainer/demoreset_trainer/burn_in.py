"""What a recurrent policy remembers at a start, had it watched the demo up to there.

An episode that begins inside the demo needs the hidden state that belongs there. It comes from the
demo's cached images, in batches; the emulator is not stepped for it. The demo is cut into chunks
that run side by side, each from a few decisions before its own part (its burn-in, from an empty
memory: R2D2, Kapturowski et al. 2019, section 3), so that a long demo costs few sequential steps.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demoreset_trainer.policy import Policy
from demoreset_trainer.states import StartStates

CHUNK = 64  # decisions of a chunk's own
BATCH = 512  # images that run through the network at a time: seconds for the largest on a CPU


class BurnIn:
    """The hidden state before every decision of a demo; computed anew by `refresh`."""

    def __init__(
        self,
        policy: Policy,
        states: StartStates,
        decisions: int,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy = policy
        self._states = states
        self._length = decisions
        self._alive = alive
        self.hidden = torch.zeros(len(states), policy.shape.hidden)

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the policy's latest weights."""
        policy, count = self._policy, len(self._states)
        if not policy.shape.hidden:
            return
        device = next(policy.parameters()).device
        view = policy.shape.view
        firsts = np.arange(0, count, CHUNK)
        per_batch = max(1, BATCH // (CHUNK + self._length))
        for low in range(0, len(firsts), per_batch):
            first = firsts[low : low + per_batch]
            index = first[None] + np.arange(-self._length, CHUNK)[:, None]  # [time, chunks]
            inside = index.clip(0, count - 1)
            self._alive()
            images = self._states.observations(inside.reshape(-1), view)
            observations = torch.from_numpy(images).view(*index.shape, *view.shape).to(device)
            features = policy.features(observations.flatten(0, 1)).view(*index.shape, -1)
            hidden = policy.initial_state(len(first), device)
            for t in range(len(index)):
                own = t - self._length
                if own >= 0:
                    rows = torch.from_numpy(index[t])
                    known = rows < count
                    self.hidden[rows[known]] = hidden.cpu()[known]
                # Before the demo's first decision there is nothing to remember.
                watched = torch.from_numpy(index[t] >= 0).to(device).unsqueeze(1)
                hidden = torch.where(watched, policy.remember(features[t], hidden), hidden)

    def at(self, index: npt.NDArray[np.int64]) -> Tensor:
        """The states before the demo's decisions `index` [n], [n, S]."""
        return self.hidden[torch.from_numpy(index)]
