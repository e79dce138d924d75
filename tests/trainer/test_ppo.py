"""PPO against slow and obvious definitions: learning code that is wrong does not raise."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demoreset_api.spec import PpoSpec
from demoreset_trainer import ppo
from demoreset_trainer.env import TRUNCATED, End
from demoreset_trainer.group import Alone, Group, Quorum
from demoreset_trainer.policy import Architecture, Policy
from demoreset_trainer.ppo import (
    NotFinite,
    Ppo,
    Rollout,
    advantages,
    policy_losses,
    value_losses,
)
from small_rollout import ACTIONS, MEMORY, PLAIN, make, make_lesson, rollout

Item = TypeVar("Item")


# Advantages


def slow_advantage(
    r: Rollout, t: int, slot: int, *, gamma: float, lambda_: float, neutral: bool
) -> float:
    """The sum of (gamma lambda)^l delta_{t+l} (arXiv 1506.02438, eq. 16), up to the end."""
    total, weight = 0.0, 1.0
    for later in range(t, len(r.actions)):
        end = End(int(r.ends[later, slot]))
        match end:
            case End.NONE if later + 1 < len(r.actions):
                future = float(r.values[later + 1, slot])
            case End.NONE:
                future = float(r.last_values[slot])
            case End.HORIZON | End.FRAMES:  # it goes on beyond our sight
                future = float(r.end_values[later, slot])
            case End.GAME_OVER | End.LIFE_LOST | End.BEHIND | End.SUCCESS:
                future = 0.0
        delta = float(r.rewards[later, slot]) + gamma * future - float(r.values[later, slot])
        if end is End.SUCCESS and neutral:
            delta = 0.0
        total += weight * delta
        if end:
            break
        weight *= gamma * lambda_
    return total


@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.9, 0.999, 1.0]),
    lambda_=st.sampled_from([0.0, 0.7, 0.95, 1.0]),
    neutral=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_advantages_are_those_of_the_paper(
    seed: int, gamma: float, lambda_: float, neutral: bool
) -> None:
    r = rollout(PLAIN, slots=3, length=9, burn_in=0, seed=seed)
    fast = advantages(r, gamma=gamma, lambda_=lambda_, success_is_neutral=neutral)
    assert fast.shape == (9, 3)
    for t in range(9):
        for slot in range(3):
            slow = slow_advantage(r, t, slot, gamma=gamma, lambda_=lambda_, neutral=neutral)
            assert fast[t, slot] == pytest.approx(slow, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("end", "neutral", "expected"),
    [
        (End.NONE, False, 1 + 0.9 * 30 - 10),
        (End.GAME_OVER, False, 1 - 10),
        (End.LIFE_LOST, False, 1 - 10),
        (End.BEHIND, False, 1 - 10),
        (End.SUCCESS, False, 1 - 10),
        (End.SUCCESS, True, 0),
        (End.BEHIND, True, 1 - 10),
        (End.HORIZON, False, 1 + 0.9 * 50 - 10),
        (End.FRAMES, False, 1 + 0.9 * 50 - 10),
    ],
)
def test_what_an_end_is_worth(end: End, neutral: bool, expected: float) -> None:
    r = rollout(PLAIN, slots=1, length=2, burn_in=0)
    r.rewards[:], r.values[:, 0], r.end_values[:], r.last_values[:] = 1, [10, 30], 50, 27
    r.ends[:, 0] = [end, End.NONE]
    # With lambda 0 the first advantage is its own delta.
    first = advantages(r, gamma=0.9, lambda_=0.0, success_is_neutral=neutral)[0, 0]
    assert first == pytest.approx(expected, rel=1e-6)
    assert set(End) - TRUNCATED == {
        End.NONE, End.GAME_OVER, End.LIFE_LOST, End.SUCCESS, End.BEHIND
    }  # fmt: skip


def test_with_lambda_one_the_target_is_the_discounted_return() -> None:
    r = rollout(PLAIN, slots=1, length=6, burn_in=0)
    r.ends[:, 0] = [0, 0, End.FRAMES, 0, 0, 0]
    targets = advantages(r, gamma=0.5, lambda_=1.0, success_is_neutral=False) + r.values
    w = r.rewards[:, 0].tolist()
    expected = w[0] + w[1] / 2 + w[2] / 4 + float(r.end_values[2, 0]) / 8
    assert targets[0, 0] == pytest.approx(expected, rel=1e-5)
    expected = w[3] + w[4] / 2 + w[5] / 4 + float(r.last_values[0]) / 8
    assert targets[3, 0] == pytest.approx(expected, rel=1e-5)


# Losses


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def slow_policy_loss(log_prob: float, old: float, advantage: float, clip: float) -> float:
    ratio = math.exp(log_prob - old)
    return -min(ratio * advantage, clamp(ratio, 1 - clip, 1 + clip) * advantage)


def slow_value_loss(value: float, old: float, target: float, clip: float) -> float:
    loss = (value - target) ** 2
    if clip:
        loss = max(loss, (old + clamp(value - old, -clip, clip) - target) ** 2)
    return loss / 2


def test_losses_are_those_of_the_paper() -> None:
    random = np.random.default_rng(0)
    log_probs, old, advantage = torch.from_numpy(random.standard_normal((3, 200)))
    losses = policy_losses(log_probs * 0.3, old * 0.3, advantage, 0.2)
    rows = zip(losses, log_probs * 0.3, old * 0.3, advantage, strict=True)
    for loss, *arguments in rows:
        log_prob, before, gain = (float(x) for x in arguments)
        expected = slow_policy_loss(log_prob, before, gain, 0.2)
        assert float(loss) == pytest.approx(expected)
    for clip in (0.0, 0.1, 1.0):
        losses = value_losses(log_probs, old, advantage, clip)
        for loss, *arguments in zip(losses, log_probs, old, advantage, strict=True):
            value, before, target = (float(x) for x in arguments)
            expected = slow_value_loss(value, before, target, clip)
            assert float(loss) == pytest.approx(expected)


def slow_loss(
    policy: Policy, r: Rollout, normalised: npt.NDArray[Any], targets: npt.NDArray[Any],
    columns: Sequence[int], spec: PpoSpec, entropy: float,
) -> Tensor:  # fmt: skip
    """The mean over the samples, one decision after the other, one slot after the other."""
    total, samples = torch.zeros(()), 0
    length = len(r.actions)
    burn_in = len(r.observations) - length
    for slot in columns:
        state = r.states[0, slot]
        for row in range(burn_in + length):
            if r.begins[row, slot]:
                state = r.states[row, slot]
            seen = r.observations[row, slot][None]
            logits, value, behind = policy.step(seen, state[None])
            state = behind[0]
            t = row - burn_in
            if t < 0:
                continue
            log_probs = (logits[0] * float(r.logit_scale[t, slot])).log_softmax(0)
            ratio = (log_probs[int(r.actions[t, slot])] - float(r.log_probs[t, slot])).exp()
            a = float(normalised[t, slot])
            gain = torch.min(ratio * a, ratio.clamp(1 - spec.clip, 1 + spec.clip) * a)
            old, target = float(r.values[t, slot]), float(targets[t, slot])
            clipped = old + (value[0] - old).clamp(-spec.value_clip, spec.value_clip)
            error = torch.max((value[0] - target) ** 2, (clipped - target) ** 2) / 2
            bonus = -(log_probs.exp() * log_probs).sum()
            total = total - gain + spec.value_coefficient * error - entropy * bonus
            samples += 1
    return total / samples


def gradients(policy: Policy) -> Tensor:
    found = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("images", [512, 1])  # at once; slot by slot
@pytest.mark.parametrize("shape", [PLAIN, MEMORY])
def test_an_update_follows_the_gradient_of_the_plain_loss(
    shape: Architecture, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ppo.MAX_IMAGES, "cpu", images)
    spec = PpoSpec(gradient_norm=0, value_coefficient=0.7, clip=0.15)
    r = rollout(shape, burn_in=3 if shape.hidden else 0)
    raw = np.array(
        [
            [slow_advantage(r, t, s, gamma=0.999, lambda_=0.95, neutral=False) for s in range(4)]
            for t in range(5)
        ]
    )
    normalised = (raw - raw.mean()) / raw.std()
    policy = make(shape)
    columns = [0, 2, 3]
    loss = slow_loss(policy, r, normalised, raw + r.values, columns, spec, entropy=0.05)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = gradients(policy)
    learner = Ppo(make(shape), spec)
    learner.update(
        r, [np.array(columns)], [None], Alone(), learning_rate=1e-3, entropy=0.05, guide=0
    )
    torch.testing.assert_close(gradients(learner.policy), expected, rtol=1e-3, atol=1e-5)


def on_policy(shape: Architecture) -> tuple[Policy, Rollout]:
    """A rollout whose log probabilities are those of the policy itself."""
    policy, r = make(shape), rollout(shape)
    burn_in = 3
    with torch.no_grad():
        logits, values, _ = policy.unroll(
            r.observations, r.states[0], torch.from_numpy(r.begins), r.states
        )
    scaled = logits[burn_in:] * torch.from_numpy(r.logit_scale)[..., None]
    chosen = scaled.log_softmax(2).gather(2, torch.from_numpy(r.actions)[..., None])
    r.log_probs, r.values = chosen[..., 0].numpy(), values[burn_in:].numpy()
    return policy, r


def test_an_update_reports_what_it_did() -> None:
    policy, r = on_policy(MEMORY)
    every = np.arange(4)
    first = Ppo(policy, PpoSpec()).update(
        r, [every], [None], Alone(), learning_rate=1e-3, entropy=0, guide=0
    )
    # Nothing has changed yet: every ratio is 1, and normalised advantages have the mean 0.
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert first.clip_share == 0
    assert first.policy_loss == pytest.approx(0, abs=1e-5)
    assert 0.1 < first.entropy < math.log(ACTIONS)
    assert first.guide_loss == 0
    raw = advantages(r, gamma=0.999, lambda_=0.95, success_is_neutral=False)
    assert first.value_loss == pytest.approx(float(np.square(raw).mean()) / 2, rel=1e-4)
    share = 1 - float(np.var(raw)) / float(np.var(raw + r.values))
    assert first.explained_variance == pytest.approx(share, rel=1e-4)
    policy, r = on_policy(MEMORY)
    many = Ppo(policy, PpoSpec()).update(
        r, [every] * 8, [None] * 8, Alone(), learning_rate=5e-3, entropy=0, guide=0
    )
    assert many.kl > 1e-3
    assert many.clip_share > 0.02
    assert many.policy_loss < -0.02


def test_a_success_is_neutral_where_the_learner_is_told_so() -> None:
    r = rollout(PLAIN, burn_in=0)
    r.ends[:] = End.SUCCESS
    learner = Ppo(make(PLAIN), PpoSpec(), success_is_neutral=True)
    statistics = learner.update(
        r, [np.arange(4)], [None], Alone(), learning_rate=1e-3, entropy=0, guide=0
    )
    assert statistics.policy_loss == 0
    assert statistics.explained_variance == 1  # every target is the value itself


@pytest.mark.parametrize(("limit", "clipped"), [(0.01, True), (1e6, False), (0, False)])
def test_the_gradients_norm_has_a_limit(limit: float, clipped: bool) -> None:
    learner = Ppo(make(PLAIN), PpoSpec(gradient_norm=limit))
    statistics = learner.update(
        rollout(PLAIN, burn_in=0), [np.arange(4)], [None], Alone(),
        learning_rate=1e-3, entropy=0, guide=0,
    )  # fmt: skip
    assert statistics.gradient_norm > 0.1  # as it was before
    applied = float(gradients(learner.policy).norm())
    assert applied == pytest.approx(limit if clipped else statistics.gradient_norm, rel=1e-4)


def test_the_guide_is_a_weighted_cross_entropy() -> None:
    lesson = make_lesson(MEMORY)
    r = rollout(MEMORY)
    spec = PpoSpec(gradient_norm=0)
    without, within = Ppo(make(MEMORY), spec), Ppo(make(MEMORY), spec)
    settings: dict[str, Any] = {"learning_rate": 1e-3, "entropy": 0.01}
    without.update(r, [np.arange(4)], [lesson], Alone(), guide=0, **settings)
    statistics = within.update(r, [np.arange(4)], [lesson], Alone(), guide=0.3, **settings)
    policy = make(MEMORY)
    logits, _, _ = policy.step(torch.from_numpy(lesson.observations), lesson.states)
    loss = torch.zeros(())
    for row, action in enumerate(lesson.actions.tolist()):
        loss = loss - float(lesson.weights[row]) * logits[row].log_softmax(0)[action] / 6
    assert statistics.guide_loss == pytest.approx(loss.item(), rel=1e-5)
    (loss * 0.3).backward()  # type: ignore[no-untyped-call]
    policy_gradient = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
         for p in policy.parameters()]
    )  # fmt: skip
    torch.testing.assert_close(
        gradients(within.policy) - gradients(without.policy), policy_gradient,
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


def test_l2_pulls_every_weight_towards_nothing() -> None:
    r = rollout(PLAIN, burn_in=0)
    settings: dict[str, Any] = {"learning_rate": 1e-3, "entropy": 0.0, "guide": 0.0}
    grads = []
    for l2 in (0.0, 0.2):
        learner = Ppo(make(PLAIN), PpoSpec(gradient_norm=0, l2=l2))
        learner.update(r, [np.arange(4)], [None], Alone(), **settings)
        grads.append(gradients(learner.policy))
    weights = torch.cat([p.detach().flatten() for p in make(PLAIN).parameters()])
    torch.testing.assert_close(grads[1] - grads[0], 0.2 * weights, rtol=1e-3, atol=1e-5)


# Members


class Member:
    """One of several threads whose sums wait for each other."""

    def __init__(self, rank: int, shared: "list[Any]", barrier: threading.Barrier) -> None:
        self._rank, self._shared, self._barrier = rank, shared, barrier

    def quorum(self, update: int) -> Quorum:
        return Quorum(0, self._rank, tuple(str(rank) for rank in range(len(self._shared))))

    def sum(self, tensor: Tensor) -> None:
        self._shared[self._rank] = tensor.clone()
        self._barrier.wait(30)
        total = torch.stack(self._shared).sum(0)
        self._barrier.wait(30)
        tensor.copy_(total)

    def gather(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def hand_over(self, quorum: Quorum, state: bytes) -> bytes:
        raise NotImplementedError

    def alive(self, patience: float = 0.0) -> None:
        pass

    def event(self, name: str, **facts: Any) -> None:
        pass


def in_threads(members: int, run: Callable[[int, Group], None]) -> None:
    shared: list[Any] = [None] * members
    barrier = threading.Barrier(members)
    failed: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            run(rank, Member(rank, shared, barrier))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def columns_of(r: Rollout, block: range) -> Rollout:
    """What a member who holds these slots has."""
    part = slice(block.start, block.stop)
    cut = {
        name: value[part] if name == "last_values" else value[:, part]
        for name, value in vars(r).items()
    }
    return Rollout(**cut)


@pytest.mark.parametrize(
    "blocks",
    [
        [range(0, 3), range(3, 6)],
        [range(0, 1), range(1, 6)],
        [range(0, 2), range(2, 3), range(3, 6)],
    ],
)
def test_members_together_learn_what_one_learns(blocks: list[range]) -> None:
    spec = PpoSpec(l2=1e-2)
    r = rollout(MEMORY, slots=6)
    lesson = make_lesson(MEMORY)
    minibatches = [
        np.array(x) for x in ([5, 0, 2], [0, 1, 2, 3, 4], [4, 5])
    ]  # in one of them some have none
    settings: dict[str, Any] = {"learning_rate": 1e-3, "entropy": 0.02, "guide": 0.4}
    alone = Ppo(make(MEMORY), spec)
    expected = alone.update(r, minibatches, [lesson] * 3, Alone(), **settings)
    learners = [Ppo(make(MEMORY), spec) for _ in blocks]
    reported: dict[int, Any] = {}

    def run(rank: int, group: Group) -> None:
        block = blocks[rank]
        mine = [x[(x >= block.start) & (x < block.stop)] - block.start for x in minibatches]
        reported[rank] = learners[rank].update(
            columns_of(r, block), mine, [lesson] * 3, group, members=len(blocks), **settings
        )

    in_threads(len(blocks), run)
    for rank, learner in enumerate(learners):
        for name, weights in alone.policy.state_dict().items():
            torch.testing.assert_close(
                learner.policy.state_dict()[name], weights, rtol=1e-3, atol=2e-5
            )
        torch.testing.assert_close(
            gradients(learner.policy), gradients(alone.policy), rtol=1e-3, atol=1e-5
        )
        for name in ("policy_loss", "value_loss", "guide_loss", "entropy", "kl", "clip_share"):
            value = getattr(reported[rank], name)
            assert value == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-5), name
        # Bit for bit the same: members must not drift apart.
        for name, weights in learners[0].policy.state_dict().items():
            torch.testing.assert_close(learner.policy.state_dict()[name], weights, rtol=0, atol=0)


# What goes wrong, and going on


@pytest.mark.parametrize("where", ["rewards", "log_probs", "states"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    r = rollout(MEMORY)
    getattr(r, where)[:] = np.nan
    learner = Ppo(make(MEMORY), PpoSpec())
    with pytest.raises(NotFinite, match="the gradient's norm is nan"):
        learner.update(r, [np.arange(4)], [None], Alone(), learning_rate=1e-3, entropy=0, guide=0)


def test_a_loss_that_is_infinite_is_refused_though_its_gradient_is_not() -> None:
    """An error of 3e19 has a square that no float32 holds."""
    r = rollout(MEMORY)
    r.rewards[:] = 3e19
    learner = Ppo(make(MEMORY), PpoSpec(value_coefficient=1e-6, value_clip=0))
    with pytest.raises(NotFinite, match="the loss is inf"):
        learner.update(r, [np.arange(4)], [None], Alone(), learning_rate=1e-3, entropy=0, guide=0)
    assert torch.isfinite(gradients(learner.policy)).all()


def test_it_goes_on_from_its_state() -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "entropy": 0.02, "guide": 0.0}
    r = rollout(MEMORY)
    learner = Ppo(make(MEMORY), PpoSpec())
    learner.update(r, [np.arange(4)] * 2, [None] * 2, Alone(), **settings)
    model, moments = (
        {name: value.clone() for name, value in tensors.items()} for tensors in learner.state()
    )
    other = Ppo(Policy(MEMORY, ACTIONS), PpoSpec())
    other.policy.exact = True
    other.load(model, moments)
    for again in (False, True):
        if again:  # a learner also goes back to its own copy
            learner.load(model, moments)
        else:
            other.update(r, [np.arange(4)] * 2, [None] * 2, Alone(), **settings)
        learner.update(r, [np.arange(4)] * 2, [None] * 2, Alone(), **settings)
        for name, weights in learner.policy.state_dict().items():
            torch.testing.assert_close(other.policy.state_dict()[name], weights, rtol=0, atol=0)
    assert not torch.equal(learner.policy.state_dict()["actor.weight"], model["actor.weight"])
