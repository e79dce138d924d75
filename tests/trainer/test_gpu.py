"""What a GPU replays is what it would have done; a run may change from a GPU to a CPU and back."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demoreset_api.spec import PolicyPreset, PolicySpec, PpoSpec, RunSpec
from demoreset_trainer import gpu, ppo
from demoreset_trainer.assemble import assemble
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import Rules
from demoreset_trainer.gpu import Recorded, to_device
from demoreset_trainer.group import Alone
from demoreset_trainer.loop import Loop
from demoreset_trainer.policy import Architecture, Policy, architecture
from demoreset_trainer.ppo import Ppo, Rollout
from demoreset_trainer.rollout import Collector, Start
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import start_states
from small_rollout import MEMORY, PLAIN, make, make_lesson, rollout
from small_run import SMALL, Diary, Shelf

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_nothing_is_recorded() -> None:
    calls = []

    def double(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (2 * x,)

    recorded = Recorded(double, torch.device("cpu"))
    for _ in range(3):
        assert recorded(torch.ones(2))[0].tolist() == [2, 2]
    assert len(calls) == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_arrays_arrive(device: str) -> None:
    for array in (np.arange(6).reshape(2, 3), np.zeros((2, 0), np.float32), np.array([True])):
        there = to_device(array, torch.device(device))
        assert there.device.type == device
        np.testing.assert_array_equal(there.cpu().numpy(), array)


@on_gpu
@pytest.mark.parametrize(("setting", "called"), [(None, 2 * 2), ("0", 2 * 4)])
def test_every_shape_is_recorded_at_its_second_use(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, called: int
) -> None:
    if setting is not None:
        monkeypatch.setenv("DEMORESET_CUDA_GRAPHS", setting)
    device, calls = torch.device("cuda"), []
    weight = torch.ones((), device=device)

    def add(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.shape)
        weight.add_(1)
        return x + y, x * weight

    recorded = Recorded(add, device)
    for turn in range(4):
        for size in (3, 5):
            x = torch.arange(float(size), device=device) + turn
            before = weight.item()
            total, product = recorded(x, x)
            assert weight.item() == before + 1  # recording alone does nothing
            torch.testing.assert_close(total, 2 * x)
            torch.testing.assert_close(product, x * weight)
    assert len(calls) == called


@on_gpu
def test_what_it_returned_may_be_an_argument_of_the_next_call() -> None:
    device = torch.device("cuda")
    follow = Recorded(lambda x: (x + 1,), device)
    (state,) = follow(torch.zeros(2, device=device))
    for _ in range(4):
        (state,) = follow(state)
    assert state.tolist() == [5, 5]


@on_gpu
def test_there_is_an_end_to_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MOST", 1)
    device = torch.device("cuda")
    double = Recorded(lambda x: (2 * x,), device)
    for _ in range(3):
        for size in (1, 2):
            assert double(torch.ones(size, device=device))[0].tolist() == [2] * size
    assert len(double._recordings) == 1


def gradient(learner: Ppo, shape: Architecture, turns: int, scale: float) -> Tensor:
    """Of the last of so many minibatches, by weights that stand still."""
    r = rollout(shape, burn_in=3 if shape.hidden else 0)
    r.observations, r.states = r.observations.to(learner.device), r.states.to(learner.device)
    lesson = make_lesson(shape)
    lesson = replace(lesson, states=lesson.states.to(learner.device))
    learner.update(
        r,
        [np.array([0, 2, 3])] * turns,
        [lesson] * turns,
        Alone(),
        learning_rate=0,
        entropy=0.05 * scale,
        guide=0.3 * scale,
    )
    found = [p.grad.flatten().cpu() for p in learner.policy.parameters() if p.grad is not None]
    return torch.cat(found)


@on_gpu
@pytest.mark.parametrize("shape", [PLAIN, MEMORY], ids=["feed-forward", "recurrent"])
@pytest.mark.parametrize("images", [4096, 1])  # at once; slot by slot
def test_a_replayed_gradient_is_that_of_a_cpu(
    shape: Architecture, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ppo.MAX_IMAGES, "cuda", images)
    spec = PpoSpec(gradient_norm=0, l2=0.01)
    slow, fast = Ppo(make(shape), spec), Ppo(make(shape).to("cuda"), spec)
    model, moments = ({name: x.clone() for name, x in part.items()} for part in slow.state())
    for scale in (1, 2, 1):
        expected = gradient(slow, shape, 1, scale)
        for turns in (3, 1):
            found = gradient(fast, shape, turns, scale)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        for learner in (slow, fast):  # a recording follows the weights, and what is loaded
            with torch.no_grad():
                for parameter in learner.policy.parameters():
                    parameter.mul_(0.9)
            if scale == 2:
                learner.load(model, moments)


def collect(demo: Demo, device: str) -> list[Rollout]:
    """Four rollouts, of three slots and then of four."""
    torch.manual_seed(2)
    policy = Policy(architecture(PolicySpec(preset=PolicyPreset.SMALL, recurrent=True)), 3)
    policy.to(device).exact = True
    states = start_states(demo, policy.shape.view, 4)
    burn_in = BurnIn(policy, states, 3)
    for _ in range(3):  # as it is, recorded, replayed
        burn_in.refresh()
    rollouts = []
    with Slots(demo, Rules(max_frames=40), policy.shape.view, slots=5, processes=1) as slots:
        collector = Collector(
            slots,
            policy,
            burn_in,
            lambda slot, episode, random: Start(int(random.integers(1, 43)) * 4),
            seed=7,
            frame_skip=4,
            length=12,
            history=3,
            explore_frames=0,
            explore_every=2,
            parts=2 if device == "cuda" else 1,
        )
        for update, held in enumerate([[1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]):
            running = dict(zip(collector.held.tolist(), collector.episodes.tolist(), strict=True))
            collector.hold(np.array(held), np.array([running.get(slot, 0) for slot in held]))
            rollouts.append(deepcopy(collector.collect(update)[0]))
    return rollouts


@on_gpu
def test_a_gpu_collects_what_a_cpu_does(freeway: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for ours, theirs in zip(collect(freeway, "cuda"), collect(freeway, "cpu"), strict=True):
        assert ours.observations.device.type == ours.states.device.type == "cuda"
        for name, expected in vars(theirs).items():
            found = torch.as_tensor(getattr(ours, name)).cpu()
            torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-3, atol=1e-4)


def run(demo: Demo, start: Snapshot | None, updates: int, **changes: Any) -> tuple[Loop, Snapshot]:
    spec = RunSpec.model_validate(SMALL | changes)
    shelf = Shelf()
    loop = assemble(spec, demo, group=Alone(), watch=Diary(), saver=shelf, find=lambda: (1, start))
    done = start.update + updates if start else updates
    loop.run(lambda: loop.state.counters.update >= done)
    return loop, shelf.saved[-1]


@on_gpu
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_run_goes_from_a_gpu_to_a_cpu_and_back(
    recurrent: bool, freeway: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"recurrent": recurrent}
    loop, snapshot = run(freeway, None, 3, policy=policy)
    assert loop.ppo.device.type == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        loop, snapshot = run(freeway, snapshot, 1, policy=policy)
        assert loop.ppo.device.type == "cpu"
    loop, snapshot = run(freeway, snapshot, 2, policy=policy)
    assert loop.ppo.device.type == "cuda"
    assert snapshot.update == 6
    assert snapshot.optimizer["0.step"] == 6 * 2 * 2  # epochs, minibatches
    assert all(tensor.isfinite().all() for tensor in snapshot.model.values())
