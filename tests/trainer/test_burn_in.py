"""The memory at a start is that of a policy that watched the demo one decision after the other."""

import numpy as np
import pytest
import torch
from torch import Tensor

from demoreset_api.spec import PolicyPreset, PolicySpec
from demoreset_trainer import burn_in
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.demo import Demo
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.states import StartStates, start_states


def small(recurrent: bool = True) -> Policy:
    torch.manual_seed(1)
    policy = Policy(architecture(PolicySpec(preset=PolicyPreset.SMALL, recurrent=recurrent)), 3)
    policy.exact = True
    return policy


@torch.no_grad()
def watch(policy: Policy, states: StartStates, first: int, last: int) -> Tensor:
    """The memory before the decision `last`, of one who watches from `first` on."""
    state = policy.initial_state(1)
    for index in range(max(0, first), last):
        seen = states.observation(index, policy.shape.view)
        _, _, state = policy.step(torch.from_numpy(seen)[None], state)
    return state[0]


def test_a_short_demo_is_watched_from_its_beginning(freeway: Demo) -> None:
    policy = small()
    states = start_states(freeway, policy.shape.view, 4)
    memory = BurnIn(policy, states, 3)
    memory.refresh()
    assert memory.hidden.shape == (44, policy.shape.hidden)
    assert not memory.hidden[0].any()
    for index in (1, 2, 20, 43):
        expected = watch(policy, states, 0, index)
        torch.testing.assert_close(memory.hidden[index], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        memory.at(np.array([7, 0, 7])), memory.hidden[torch.tensor([7, 0, 7])]
    )


@pytest.mark.parametrize(("chunk", "length", "batch"), [(8, 5, 4096), (8, 5, 30), (16, 0, 50)])
def test_a_long_demo_is_watched_from_a_little_before_each_chunk(
    freeway: Demo, monkeypatch: pytest.MonkeyPatch, chunk: int, length: int, batch: int
) -> None:
    monkeypatch.setattr(burn_in, "CHUNK", chunk)
    monkeypatch.setattr(burn_in, "BATCH", batch)
    policy = small()
    states = start_states(freeway, policy.shape.view, 4)
    memory = BurnIn(policy, states, length)
    memory.refresh()
    for index in (0, 1, 7, 8, 9, 15, 16, 31, 32, 40, 43):
        expected = watch(policy, states, index // chunk * chunk - length, index)
        torch.testing.assert_close(memory.hidden[index], expected, rtol=1e-4, atol=1e-5)


def test_a_longer_burn_in_is_nearer_to_the_whole(
    freeway: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = small()
    states = start_states(freeway, policy.shape.view, 4)
    whole = BurnIn(policy, states, 0)
    whole.refresh()
    monkeypatch.setattr(burn_in, "CHUNK", 8)
    distances = []
    for length in (0, 2, 8, 40):
        part = BurnIn(policy, states, length)
        part.refresh()
        distances.append(float((part.hidden - whole.hidden).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[3] < 1e-3 < distances[0]


def test_it_follows_the_weights_only_when_told(freeway: Demo) -> None:
    policy = small()
    states = start_states(freeway.prefix(20), policy.shape.view, 4)
    memory = BurnIn(policy, states, 3)
    memory.refresh()
    before = memory.hidden.clone()
    with torch.no_grad():
        policy.dense.bias.add_(0.5)
    torch.testing.assert_close(memory.hidden, before)
    memory.refresh()
    assert not torch.allclose(memory.hidden[5], before[5])


def test_without_memory_there_is_nothing_to_remember(freeway: Demo) -> None:
    policy = small(recurrent=False)
    memory = BurnIn(policy, start_states(freeway, policy.shape.view, 4), 0)
    memory.refresh()
    assert memory.at(np.array([1, 5])).shape == (2, 0)
