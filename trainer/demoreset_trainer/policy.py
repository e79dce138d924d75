"""The networks: images in, logits and value out, with or without memory.

Shapes: T decisions, B slots, A actions, S hidden units (0 without memory).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from demoreset_api.spec import PolicyPreset, PolicySpec
from demoreset_trainer.states import View

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Architecture:
    """A network's size. convolutions: (channels, kernel, stride) each."""

    view: View
    convolutions: tuple[tuple[int, int, int], ...]
    features: int
    hidden: int  # of the GRU; 0: no memory
    original: bool = False  # with the layer norm and the GRU of atari-reset


def architecture(spec: PolicySpec, max_over_frames: int = 2) -> Architecture:
    """The architecture of a preset."""
    match spec.preset:
        case PolicyPreset.SMALL:
            size, convolutions = (64, 64), ((16, 6, 3), (32, 3, 2), (32, 3, 1))
            features, channels = 256, 1
        case PolicyPreset.BASE:
            size, convolutions = (84, 84), ((32, 8, 4), (64, 4, 2), (64, 3, 1))
            features, channels = 512, 1
        case PolicyPreset.ORIGINAL:
            size, convolutions = (105, 80), ((64, 8, 4), (128, 4, 2), (128, 3, 1))
            features, channels = 800, 3
    return Architecture(
        View(*size, channels=channels, max_over_frames=max_over_frames),
        convolutions,
        features,
        hidden=features if spec.memory else 0,
        original=spec.preset is PolicyPreset.ORIGINAL,
    )


class Policy(nn.Module):
    """Actor and critic over one trunk: convolutions, a dense layer, and a GRU if it has memory.

    With memory the heads see the GRU's output and its input (as atari-reset's do).
    """

    def __init__(self, shape: Architecture, actions: int) -> None:
        super().__init__()
        self.shape = shape
        self.exact = False  # compute in float32, for an exchange format
        layers: list[nn.Module] = []
        channels, height, width = shape.view.shape
        for out, kernel, stride in shape.convolutions:
            layers += [_orthogonal(nn.Conv2d(channels, out, kernel, stride)), nn.ReLU()]
            channels = out
            height, width = ((size - kernel) // stride + 1 for size in (height, width))
        self.convolutions = nn.Sequential(*layers)
        self.dense = _orthogonal(nn.Linear(channels * height * width, shape.features))
        cell = OriginalGru if shape.original else nn.GRUCell
        self.gru = cell(shape.features, shape.hidden) if shape.hidden else None
        seen = shape.features + shape.hidden
        self.actor = _orthogonal(nn.Linear(seen, actions), gain=0.01)
        self.critic = _orthogonal(nn.Linear(seen, 1), gain=1.0)

    def features(self, observations: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] to features [N, F]."""
        fast = torch.float32 if self.exact else fast_dtype(observations.device)
        images = observations.to(fast, memory_format=torch.channels_last).mul_(1 / 255)
        with torch.autocast(observations.device.type, fast, enabled=fast != torch.float32):
            features = self.dense(self.convolutions(images).flatten(1))
        features = features.float()
        if self.shape.original:
            features = functional.layer_norm(features, features.shape[-1:])
        return torch.relu(features)

    def initial_state(self, slots: int, device: torch.device | None = None) -> Tensor:
        """The state before anything was seen, [slots, S]."""
        return torch.zeros(slots, self.shape.hidden, device=device)

    def remember(self, features: Tensor, state: Tensor) -> Tensor:
        """The state behind a decision, [B, S], from its features [B, F] and the state before."""
        return self.gru(features, state) if self.gru is not None else state

    def step(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One decision: logits [B, A], values [B], the next state [B, S]."""
        features = self.features(observations)
        if self.gru is not None:
            state = self.gru(features, state)
            features = torch.cat([state, features], 1)
        return self.actor(features), self.critic(features).squeeze(1), state

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `step`."""
        return self.step(observations, state)

    def unroll(
        self, observations: Tensor, state: Tensor, begins: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T decisions of B slots: logits [T, B, A], values [T, B], the state behind the last.

        observations [T, B, C, H, W]; state [B, S] before the first one. Where `begins` [T, B] is
        set, an episode begins and its state is that of `states` [T, B, S].
        """
        length, slots = observations.shape[:2]
        features = self.features(observations.flatten(0, 1))
        if self.gru is not None:
            features = features.view(length, slots, self.shape.features)
            outputs = []
            fresh = begins.unsqueeze(2)
            for t in range(length):
                state = torch.where(fresh[t], states[t], state)
                state = self.gru(features[t], state)
                outputs.append(state)
            features = torch.cat([torch.stack(outputs), features], 2).flatten(0, 1)
        logits = self.actor(features).view(length, slots, self.actor.out_features)
        return logits, self.critic(features).view(length, slots), state


class OriginalGru(nn.Module):
    """The GRU of atari-reset: its reset gate works on the state before the matrix product.

    (Cho et al. 2014, arXiv 1406.1078, eq. 8; nn.GRUCell has it after the product.)
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(features + hidden, 2 * hidden)
        self.candidate = nn.Linear(features + hidden, hidden)
        for layer in (self.gates, self.candidate):
            nn.init.normal_(layer.weight)
            with torch.no_grad():  # every output's weights have length 1
                layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        """The state behind, [B, S], from features [B, F] and the state before [B, S]."""
        keep, reset = torch.sigmoid(self.gates(torch.cat([features, state], 1))).chunk(2, 1)
        candidate = torch.tanh(self.candidate(torch.cat([features, reset * state], 1)))
        return keep * state + (1 - keep) * candidate


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, which there is 2.5 times as fast."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if _CPU_HAS_BF16 else torch.float32


_CPU_HAS_BF16 = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _orthogonal(layer: Layer, gain: float = np.sqrt(2)) -> Layer:
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
