"""What keeps a GPU busy: copies that nobody waits for, and work recorded once and then replayed.

A decision of a policy, or the gradient of a minibatch, is hundreds of short kernels: starting them
one by one takes several times as long as running them (docs/benchmarks.md has the figures). CUDA
graphs start them together. What torch.compile makes of them is not faster here, and it needs a C
compiler wherever a run trains.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from demoreset_api.names import ENV_CUDA_GRAPHS

MOST = 32  # shapes that are recorded; each keeps a copy of its arguments
Function = Callable[..., tuple[Tensor, ...]]


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array there; on a CPU the array itself, on a GPU a copy that is on its way."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Recorded:
    """A function of tensors, which on a GPU is recorded for every shape of its arguments.

    It must not wait for the GPU nor decide by what a tensor holds; it may change tensors that stay
    where they are (weights, gradients). While it is recorded no autograd graph of the same weights
    may be alive. What it returns is good until the next call, of which it may be an argument. On a
    CPU, or where the environment says so, nothing is recorded.
    """

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function = function
        self._records = device.type == "cuda" and os.environ.get(ENV_CUDA_GRAPHS) != "0"
        self._recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}
        self._pool: Any = None  # memory that the recordings share: they never run side by side

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Do it."""
        if not self._records:
            return self._function(*arguments)
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._recordings:
            # Once without: what libraries do at a first use cannot be recorded.
            if len(self._recordings) < MOST:
                self._recordings[shapes] = None
            return self._function(*arguments)
        recording = self._recordings[shapes]
        if recording is None:
            recording = _Recording(self._function, arguments, self._pool)
            self._pool = self._pool or recording.graph.pool()
            self._recordings[shapes] = recording
        return recording.replay(arguments)


class _Recording:
    """A function's kernels for one set of shapes, with places for what goes in and comes out."""

    def __init__(self, function: Function, arguments: tuple[Tensor, ...], pool: Any) -> None:
        self._arguments = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU: those of gloo and NCCL do.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self._results = function(*self._arguments)

    def replay(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for place, argument in zip(self._arguments, arguments, strict=True):
            place.copy_(argument, non_blocking=True)
        self.graph.replay()
        return self._results
