"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), for a group.

Reads top to bottom: a rollout, its advantages, the losses of a minibatch, the update. What differs
from the paper stands at the place: how episodes end, the guide, and gradients that are SUMS over
samples, so that those of several members add up before one division by the samples of all.

Shapes: T decisions of a rollout, K decisions before it (burn-in), B slots, A actions, S hidden.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from demoreset_api.errors import DemoResetError
from demoreset_api.spec import PpoSpec
from demoreset_trainer.env import TRUNCATED, End
from demoreset_trainer.gpu import Recorded, to_device
from demoreset_trainer.group import Group
from demoreset_trainer.policy import Policy

# What `_losses` adds up for a person, in this order.
_SUMS = ("policy_loss", "value_loss", "entropy", "kl", "clip_share")

Floats = npt.NDArray[np.float32]
# That go through the network at a time. On a CPU these are seconds, for the largest network; on a
# GPU some 4 GB.
MAX_IMAGES = {"cpu": 512, "cuda": 4096}


class NotFinite(DemoResetError):
    """A loss, gradient or weight is infinite or not a number: this update must not be kept."""


@dataclass
class Rollout:
    """What B slots saw and did in T decisions, with the K decisions before, whose losses are void.

    observations [K + T, B, C, H, W] uint8, where the policy is; states [K + T, B, S] there, too: of
    the policy before the decision; begins [K + T, B]: an episode begins here; the rest [T, B].
    `logit_scale` multiplies the logits (0.5: exploring). `end_values`: where an episode was
    truncated, the value of what it saw last. last_values [B]: of what is seen behind the rollout.
    """

    observations: Tensor
    begins: npt.NDArray[np.bool_]
    states: Tensor
    actions: npt.NDArray[np.int64]
    log_probs: Floats
    values: Floats
    rewards: Floats
    ends: npt.NDArray[np.uint8]
    end_values: Floats
    logit_scale: Floats
    last_values: Floats


def advantages(
    rollout: Rollout, *, gamma: float, lambda_: float, success_is_neutral: bool
) -> Floats:
    """Generalised advantage estimates [T, B] (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    A terminal end is worth nothing afterwards. A truncated episode goes on beyond our sight: its
    last value is bootstrapped. A success is an artificial end: terminal, or, where it is neutral,
    without advantage, as in atari-reset.
    """
    ended = rollout.ends != End.NONE
    truncated = np.isin(rollout.ends, list(TRUNCATED))
    neutral = (rollout.ends == End.SUCCESS) & success_is_neutral
    later = np.concatenate([rollout.values[1:], rollout.last_values[None]])
    later = np.where(ended, np.where(truncated, rollout.end_values, 0), later)
    deltas = np.where(neutral, 0, rollout.rewards + gamma * later - rollout.values)
    result = np.zeros_like(deltas)
    following = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following = deltas[t] + gamma * lambda_ * np.where(ended[t], 0, following)
        result[t] = following
    return result.astype(np.float32)


def policy_losses(log_probs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, negated, per sample (arXiv 1707.06347, eq. 7)."""
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_losses(values: Tensor, old: Tensor, target: Tensor, clip: float) -> Tensor:
    """Half the squared error per sample, of the value or of the clipped value if that is worse."""
    losses = (values - target).square()
    if clip:
        clipped = old + (values - old).clamp(-clip, clip)
        losses = torch.maximum(losses, (clipped - target).square())
    return losses / 2


@dataclass(frozen=True)
class Lesson:
    """Demo decisions that guide the policy: images, the state before, the demo's action, a weight.

    observations [n, C, H, W] uint8, states [n, S] where the policy is, actions [n], weights [n].
    """

    observations: npt.NDArray[np.uint8]
    states: Tensor
    actions: npt.NDArray[np.int64]
    weights: Floats


@dataclass(frozen=True)
class Statistics:
    """Means over an update's samples, of all members."""

    policy_loss: float = 0.0
    value_loss: float = 0.0
    guide_loss: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    clip_share: float = 0.0
    explained_variance: float = 0.0
    gradient_norm: float = 0.0


def minibatches(
    spec: PpoSpec, slots: int, held: npt.NDArray[np.int64], seed: Sequence[int], *, attempt: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Columns of a member's rollout: each epoch cuts all slots of the run anew.

    Args:
        spec: epochs, minibatches.
        slots: Of the run.
        held: Those of the rollout's columns.
        seed: Of this update, the same for all members.
        attempt: Another one cuts otherwise.
    """
    column = np.full(slots, -1)
    column[held] = np.arange(len(held))
    for epoch in range(spec.epochs):
        random = np.random.default_rng([*seed, epoch, attempt])
        for part in np.split(random.permutation(slots), spec.minibatches):
            mine = column[part]
            yield mine[mine >= 0]


class Ppo:
    """A policy and its optimiser."""

    def __init__(self, policy: Policy, spec: PpoSpec, *, success_is_neutral: bool = False) -> None:
        self.policy = policy
        self.spec = spec
        self._success_is_neutral = success_is_neutral
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        self.device = self._parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self._parameters,
            lr=spec.learning_rate,
            eps=spec.adam_epsilon,
            foreach=not on_gpu,
            fused=on_gpu,
        )
        # All gradients lie in one row, to be summed over the members at once.
        sizes = [parameter.numel() for parameter in self._parameters]
        self._gradient = torch.zeros(sum(sizes), device=self.device)
        pieces = torch.split(self._gradient, sizes)
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        self._recorded_gradient = Recorded(self._add_gradient, self.device)
        self._recorded_guide_gradient = Recorded(self._add_guide_gradient, self.device)

    def update(
        self,
        rollout: Rollout,
        batches: Iterable[npt.NDArray[np.int64]],
        lessons: Iterable[Lesson | None],
        group: Group,
        *,
        learning_rate: float,
        entropy: float,
        guide: float,
        members: int = 1,
    ) -> Statistics:
        """Optimise over a rollout: one step for each of `batches` (columns of the rollout).

        `lessons`: one for each batch, the same for all members.

        Raises:
            NotFinite: the weights are those of a failed step; go back to the copy.
            MemberLost: likewise.
        """
        spec = self.spec
        raw = advantages(
            rollout,
            gamma=spec.gamma,
            lambda_=spec.lambda_,
            success_is_neutral=self._success_is_neutral,
        )
        mean, deviation = _moments(raw, group)
        targets = raw + rollout.values
        facts = [
            rollout.logit_scale,
            rollout.log_probs,
            rollout.values,
            (raw - mean) / (deviation + 1e-8),
            targets,
        ]
        actions, begins, data = self._to_device(rollout.actions, rollout.begins, np.stack(facts))
        played = [rollout.observations, rollout.states, begins, actions, data]
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate
        sums = torch.zeros(len(_SUMS), device=self.device)
        guide_losses, norms, samples = torch.zeros((), device=self.device), [], 0.0
        for columns, lesson in zip(batches, lessons, strict=True):
            count = torch.tensor([float(rollout.actions[:, columns].size)])
            group.sum(count)
            if not count.item():
                continue  # all of its slots were lost with their members
            self._gradient.zero_()
            (scales,) = self._to_device(np.array([count.item(), entropy], np.float32))
            self._add_batch(played, columns, scales, sums, group)
            if lesson is not None and guide:
                guide_losses += self._add_lesson(lesson, guide / members)
            if spec.l2:
                self._add_l2_gradient(spec.l2 / members)
            norms.append(self._step(group))
            samples += count.item()
        totals = sums.cpu()
        group.sum(totals)
        means = dict(zip(_SUMS, (totals / samples).tolist(), strict=True))
        guide_loss = guide_losses.item() / len(norms)
        _, spread = _moments(targets, group)
        loss = (
            means["policy_loss"]
            + spec.value_coefficient * means["value_loss"]
            - entropy * means["entropy"]
            + guide * guide_loss
        )
        if not math.isfinite(loss):  # squares overflow before the gradient does
            raise NotFinite(f"the loss is {loss}")
        # After the latest step no gradient tells; and after the sums nobody waits for this member.
        if not all(parameter.isfinite().all() for parameter in self._parameters):
            raise NotFinite("a weight is not finite")
        return Statistics(
            **means,
            guide_loss=guide_loss,
            explained_variance=1 - (deviation / spread) ** 2 if spread else 0.0,
            gradient_norm=float(np.mean(norms)),
        )

    def _to_device(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        """These, where the policy is."""
        return [to_device(array, self.device) for array in arrays]

    def _add_batch(
        self,
        played: Sequence[Tensor],
        columns: npt.NDArray[np.int64],
        scales: Tensor,
        sums: Tensor,
        group: Group,
    ) -> None:
        """Add the gradient of some columns' losses, and to `sums` what is reported of them.

        played: all columns, as `_losses` takes them. scales: as `_add_gradient` does.
        """
        *tensors, data = played
        for piece in _pieces(columns, len(tensors[0]), MAX_IMAGES[self.device.type]):
            (index,) = self._to_device(piece)
            (parts,) = self._recorded_gradient(
                scales,
                *(one.index_select(1, index) for one in tensors),
                data.index_select(2, index),
            )
            sums += parts
            group.alive()

    def _add_gradient(self, scales: Tensor, *columns: Tensor) -> tuple[Tensor]:
        """Add the gradient of some columns' losses; the sums that are reported.

        scales: the samples of all members, by which the sum is divided, and the entropy's
        coefficient. columns: as `_losses` takes them.
        """
        count, entropy = scales
        loss, parts = self._losses(entropy, *columns)
        (loss / count).backward()
        return (parts,)

    def _losses(
        self,
        entropy_coefficient: Tensor,
        observations: Tensor,
        states: Tensor,
        begins: Tensor,
        actions: Tensor,
        data: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss summed over the samples of some columns, and the sums that are reported.

        As in a `Rollout`; data [5, T, b]: logit_scale, log probabilities, values, advantages,
        targets.
        """
        spec = self.spec
        logit_scale, old, old_values, advantage, target = data
        logits, values, _ = self.policy.unroll(observations, states[0], begins, states)
        burn_in = len(logits) - len(actions)
        logits, values = logits[burn_in:], values[burn_in:]
        log_probs = functional.log_softmax(logits * logit_scale.unsqueeze(2), 2)
        entropy = -(log_probs.exp() * log_probs).sum(2)
        chosen = log_probs.gather(2, actions.unsqueeze(2)).squeeze(2)
        policy = policy_losses(chosen, old, advantage, spec.clip)
        value = value_losses(values, old_values, target, spec.value_clip)
        loss = policy + spec.value_coefficient * value - entropy_coefficient * entropy
        with torch.no_grad():
            change = chosen - old
            # Of two estimates of the divergence the one without negative values:
            # joschu.net/blog/kl-approx.html
            kl = change.exp() - 1 - change
            outside = ((change.exp() - 1).abs() > spec.clip).float()
            parts = torch.stack([x.sum() for x in (policy, value, entropy, kl, outside)])
        return loss.sum(), parts

    def _add_lesson(self, lesson: Lesson, share: float) -> Tensor:
        """Add the gradient of a lesson's loss, times this member's share of the guide; the loss."""
        images, actions, weights, scale = self._to_device(
            lesson.observations, lesson.actions, lesson.weights, np.array([share], np.float32)
        )
        (loss,) = self._recorded_guide_gradient(images, lesson.states, actions, weights, scale)
        return loss

    def _add_guide_gradient(
        self, observations: Tensor, states: Tensor, actions: Tensor, weights: Tensor, share: Tensor
    ) -> tuple[Tensor]:
        """Add the gradient of a lesson's loss, times `share`; the loss.

        It is the weighted cross entropy to the demo's actions, a mean over the lesson.
        """
        logits, _, _ = self.policy.step(observations, states)
        losses = functional.cross_entropy(logits, actions, reduction="none")
        loss = (losses * weights).mean()
        (share[0] * loss).backward()  # type: ignore[no-untyped-call]
        return (loss.detach(),)

    @torch.no_grad()
    def _add_l2_gradient(self, coefficient: float) -> None:
        """Add the gradient of half the sum of squares: by hand, for no graph may outlive this.

        What is recorded next would meet it: both hang on the same weights.
        """
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.add_(parameter, alpha=coefficient)

    def _step(self, group: Group) -> float:
        """One step of the optimiser on the gradients of all members; their norm."""
        group.sum(self._gradient)
        norm = _norm(self._gradient)
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient's norm is {norm}")
        limit = self.spec.gradient_norm
        if limit and norm > limit:
            self._gradient.mul_(limit / norm)
        self.optimizer.step()
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and the optimiser's moments, as flat dictionaries; not copies."""
        moments = {}
        for index, parameter in enumerate(self._parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{index}.{name}"] = value
        return dict(self.policy.state_dict()), moments

    def load(self, model: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Go on from a `state`, or from a copy of it."""
        self.policy.load_state_dict(model)
        self.optimizer.state.clear()
        for name, value in moments.items():
            index, field = name.split(".")
            parameter = self._parameters[int(index)]
            self.optimizer.state[parameter][field] = value.to(self.device, copy=True)


def _pieces(columns: npt.NDArray[np.int64], rows: int, images: int) -> list[npt.NDArray[np.int64]]:
    """Columns that go through the network at a time: memory and beats do not grow with a batch."""
    count = min(-(-len(columns) * rows // images), len(columns))
    return np.array_split(columns, count) if count else []


_ROW = 4096  # numbers that one thread sums


def _norm(flat: Tensor) -> float:
    """The Euclidean norm, to the last bit the same for members with other numbers of threads.

    Each row is summed by one thread, and the rows are few enough for one.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = flat[:whole].view(-1, _ROW).square().sum(1)
    rest = flat[whole:].double().square().sum()
    return math.sqrt(float(rows.double().sum() + rest))


def _moments(values: Floats, group: Group) -> tuple[float, float]:
    """Mean and standard deviation over all members."""
    exact = values.astype(np.float64)
    sums = torch.tensor([exact.size, exact.sum(), np.square(exact).sum()], dtype=torch.float64)
    group.sum(sums)
    count, total, squares = sums.tolist()
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2))
