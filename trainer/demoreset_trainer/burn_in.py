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

from demoreset_trainer.gpu import Recorded, to_device
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
        self._device = next(policy.parameters()).device
        self._recorded = Recorded(self._watch, self._device)
        self.hidden = policy.initial_state(len(states), self._device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the policy's latest weights."""
        count, view = len(self._states), self._policy.shape.view
        if not self._policy.shape.hidden:
            return
        firsts = np.arange(0, count, CHUNK)
        per_batch = max(1, BATCH // (CHUNK + self._length))
        for low in range(0, len(firsts), per_batch):
            first = firsts[low : low + per_batch]
            index = first[None] + np.arange(-self._length, CHUNK)[:, None]  # [time, chunks]
            self._alive()
            images = self._states.observations(index.clip(0, count - 1).reshape(-1), view)
            observations = to_device(images.reshape(*index.shape, *view.shape), self._device)
            # Before the demo's first decision there is nothing to remember.
            (before,) = self._recorded(observations, to_device(index >= 0, self._device))
            own = index[self._length :] < count
            rows = to_device(index[self._length :][own], self._device)
            self.hidden[rows] = before[self._length :][to_device(own, self._device)]

    def _watch(self, observations: Tensor, watched: Tensor) -> tuple[Tensor]:
        """The states before each decision, [time, chunks, S], from an empty memory.

        observations [time, chunks, C, H, W]; watched [time, chunks]: whether it is remembered.
        """
        policy = self._policy
        features = policy.features(observations.flatten(0, 1)).view(*watched.shape, -1)
        hidden = policy.initial_state(watched.shape[1], self._device)
        before = []
        for seen, remembered in zip(features, watched, strict=True):
            before.append(hidden)
            hidden = torch.where(remembered.unsqueeze(1), policy.remember(seen, hidden), hidden)
        return (torch.stack(before),)

    def at(self, index: npt.NDArray[np.int64]) -> Tensor:
        """The states before the demo's decisions `index` [n], [n, S]."""
        return self.hidden[to_device(index, self._device)]
