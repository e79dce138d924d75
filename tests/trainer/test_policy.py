"""The networks: many decisions at once give what one after the other gives."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from demoreset_api.spec import PolicyPreset, PolicySpec
from demoreset_trainer.policy import Architecture, OriginalGru, Policy, architecture
from demoreset_trainer.states import View

TINY = View(20, 16, stack=2)
CONVOLUTIONS = ((4, 4, 2), (4, 3, 1))
PLAIN = Architecture(TINY, CONVOLUTIONS, features=8, hidden=0)
MEMORY = Architecture(TINY, CONVOLUTIONS, features=8, hidden=6)
ORIGINAL = Architecture(TINY, CONVOLUTIONS, features=8, hidden=6, original=True)


def make(shape: Architecture, actions: int = 4) -> Policy:
    torch.manual_seed(0)
    policy = Policy(shape, actions)
    policy.exact = True
    return policy


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (*shape, *TINY.shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("preset", "shape", "channels", "features", "hidden"),
    [
        (PolicyPreset.SMALL, (4, 64, 64), (16, 32, 32), 256, 0),
        (PolicyPreset.BASE, (4, 84, 84), (32, 64, 64), 512, 512),
        (PolicyPreset.ORIGINAL, (12, 105, 80), (64, 128, 128), 800, 800),
    ],
)
def test_presets(
    preset: PolicyPreset,
    shape: tuple[int, int, int],
    channels: tuple[int, ...],
    features: int,
    hidden: int,
) -> None:
    made = architecture(PolicySpec(preset=preset), max_over_frames=3)
    assert made.view.shape == shape
    assert made.view.max_over_frames == 3
    assert tuple(one[0] for one in made.convolutions) == channels
    assert (made.features, made.hidden) == (features, hidden)


@pytest.mark.parametrize(
    ("preset", "recurrent", "hidden"),
    [
        (PolicyPreset.SMALL, True, 256),
        (PolicyPreset.SMALL, False, 0),
        (PolicyPreset.BASE, False, 0),
        (PolicyPreset.BASE, True, 512),
        (PolicyPreset.ORIGINAL, False, 0),
    ],
)
def test_memory_may_be_chosen(preset: PolicyPreset, recurrent: bool, hidden: int) -> None:
    assert architecture(PolicySpec(preset=preset, recurrent=recurrent)).hidden == hidden


@pytest.mark.parametrize("shape", [PLAIN, MEMORY, ORIGINAL])
def test_unrolled_is_one_after_the_other(shape: Architecture) -> None:
    policy = make(shape)
    observations = images(7, 3)
    generator = torch.Generator().manual_seed(2)
    before = torch.randn(3, shape.hidden, generator=generator)
    states = torch.randn(7, 3, shape.hidden, generator=generator)
    begins = torch.zeros(7, 3, dtype=torch.bool)
    begins[0, 1] = begins[3, 0] = begins[4, 0] = begins[6, 2] = True
    logits, values, last = policy.unroll(observations, before, begins, states)
    assert (logits.shape, values.shape) == ((7, 3, 4), (7, 3))
    for slot in range(3):
        state = before[slot]
        for t in range(7):
            if begins[t, slot]:
                state = states[t, slot]
            seen = observations[t, slot][None]
            one_logits, one_value, behind = policy.step(seen, state[None])
            state = behind[0]
            torch.testing.assert_close(logits[t, slot], one_logits[0])
            torch.testing.assert_close(values[t, slot], one_value[0])
        torch.testing.assert_close(last[slot], state)


@pytest.mark.parametrize("shape", [MEMORY, ORIGINAL])
def test_memory_matters_and_remember_is_its_step(shape: Architecture) -> None:
    policy = make(shape)
    observations = images(2)
    some = torch.rand(2, shape.hidden)
    logits, values, behind = policy.step(observations, some)
    torch.testing.assert_close(policy.remember(policy.features(observations), some), behind)
    others, other_values, _ = policy.step(observations, policy.initial_state(2))
    assert not torch.allclose(logits, others)
    assert not torch.allclose(values, other_values)
    for one, other in zip(policy(observations, some), (logits, values, behind), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_runs_through_time_but_not_into_another_episode() -> None:
    policy = make(MEMORY)
    before = torch.rand(2, 6, requires_grad=True)
    states = torch.rand(5, 2, 6, requires_grad=True)
    begins = torch.zeros(5, 2, dtype=torch.bool)
    begins[3, 1] = True
    logits, _, _ = policy.unroll(images(5, 2), before, begins, states)
    logits[4, :, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert before.grad is not None
    assert states.grad is not None
    assert before.grad[0].any()
    assert not before.grad[1].any()
    assert states.grad[3, 1].any()
    assert int(states.grad.flatten(2).any(2).sum()) == 1


def test_the_originals_gru_is_that_of_the_paper() -> None:
    torch.manual_seed(3)
    gru = OriginalGru(2, 3)
    x, h = torch.rand(1, 2), torch.rand(1, 3)
    torch.nn.init.uniform_(gru.gates.bias)
    torch.nn.init.uniform_(gru.candidate.bias)
    seen = [*x[0].tolist(), *h[0].tolist()]

    def dense(layer: torch.nn.Linear, row: int, inputs: list[float]) -> float:
        weights: list[float] = layer.weight[row].tolist()
        bias: float = layer.bias[row].item()
        return sum((w * i for w, i in zip(weights, inputs, strict=True)), bias)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    keep = [sigmoid(dense(gru.gates, row, seen)) for row in range(3)]
    reset = [sigmoid(dense(gru.gates, 3 + row, seen)) for row in range(3)]
    gated = seen[:2] + [r * s for r, s in zip(reset, seen[2:], strict=True)]
    expected = [
        keep[row] * seen[2 + row] + (1 - keep[row]) * math.tanh(dense(gru.candidate, row, gated))
        for row in range(3)
    ]
    assert gru(x, h)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_originals_features_are_normalised() -> None:
    features = make(ORIGINAL).features(images(3))
    assert (features >= 0).all()
    torch.manual_seed(0)
    policy = make(ORIGINAL)
    with torch.no_grad():
        policy.dense.weight.mul_(5)
        policy.dense.bias.mul_(5)
    torch.testing.assert_close(policy.features(images(3)), features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [PLAIN, MEMORY, ORIGINAL])
def test_a_new_policy_acts_nearly_at_random(shape: Architecture) -> None:
    policy = make(shape, actions=18)
    logits, values, _ = policy.step(images(5), policy.initial_state(5))
    probabilities = logits.softmax(1)
    assert (probabilities - 1 / 18).abs().max().item() < 0.01
    assert values.shape == (5,)
    assert not policy.actor.bias.any()


def test_the_same_seed_makes_the_same_policy() -> None:
    one, other = make(MEMORY), make(MEMORY)
    for name, weights in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weights, rtol=0, atol=0)


def test_the_fast_numbers_are_near_the_exact_ones() -> None:
    exact, fast = make(MEMORY), make(MEMORY)
    fast.exact = False
    difference = (exact.features(images(4)) - fast.features(images(4))).abs().max()
    assert difference.item() < 0.05
    assert exact.features(images(4)).dtype == fast.features(images(4)).dtype == torch.float32


def test_images_are_seen_as_shares_of_white() -> None:
    policy = make(PLAIN)
    seen: list[Tensor] = []
    policy.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    policy.features(images(2))
    expected = images(2).numpy().astype(np.float32) / 255
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-6)
