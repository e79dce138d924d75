"""A group that stands still though its workers answer: who is replaced, when, and who is not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from demoreset_api.status import Cause
from demoreset_operator import said
from world import World, training

STAND = 150  # seconds: more than what a run of one update a second is given


def stand(world: World, during: int = STAND, update: int = 1, **more: object) -> None:
    """Workers answer for so many seconds, and do no update."""
    for _ in range(during // 5):
        world.tick(5)
        world.train(update, **more)
        world.settle()


def causes(world: World) -> list[Cause]:
    return [one.cause for one in world.recorded]


def test_one_worker_is_replaced_and_the_others_stay() -> None:
    world = training(3)
    stand(world)
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-2"}
    (attempt,) = world.recorded
    assert (attempt.cause, attempt.worker, attempt.counts) == (Cause.HUNG, 2, True)
    assert "no update for 1" in attempt.message
    assert "hangs/ on the volume" in attempt.message
    assert [event.reason for event in world.events if event.type == "Warning"] == ["WorkerHung"]


def test_the_one_furthest_behind_goes_first() -> None:
    world = training(3)
    world.train(5)
    behind = world.told["key-worker-0-1"]
    words = behind.said.model_copy(update={"update": 4})
    world.told["key-worker-0-1"] = replace(behind, said=words)
    for _ in range(STAND // 5):
        world.tick(5)
        for name, told in world.told.items():
            world.told[name] = said.told(told, told.said, world.now, timedelta(seconds=30))
        world.settle()
    assert [one.pod for one in world.recorded] == ["key-worker-0-1"]


def test_a_crash_between_record_and_deletion_replaces_it_once() -> None:
    world = training(2)
    for _ in range(STAND // 5):
        world.tick(5)
        world.train(1)
        if world.decide().delete:
            break
        world.settle()
    plan = world.decide()
    assert plan.status is not None
    world._write(plan.status)  # and the operator dies
    world.told.clear()
    world.taken.clear()
    world.settle()
    assert "deletionTimestamp" in world.pods["key-worker-1-1"]["metadata"]
    assert causes(world) == [Cause.HUNG]
    assert world.live()[1] == "key-worker-1-2"


def pending(world: World) -> None:
    """Another worker is on its way."""
    world.change(workers={"min": 1, "max": 4})


def alone(world: World) -> None:
    """The coordinator is away."""
    for name in world.coordinators():
        world.vanish(name)


def suspended(world: World) -> None:
    """They are about to leave."""
    world.change(suspend=True)


@pytest.mark.parametrize("reason", [pending, alone, suspended])
def test_nobody_is_replaced_while_there_is_another_reason(reason: Callable[[World], None]) -> None:
    world = training(3)
    reason(world)
    stand(world)
    assert Cause.HUNG not in causes(world)


def test_fewer_than_train_at_least_wait() -> None:
    world = training(3, restart={"limit": 100})
    world.change(workers={"min": 3, "max": 3})
    world.settle()
    world.start()
    world.vanish("key-worker-2-1")
    world.settle()
    world.unschedulable("key-worker-2-2", "no node")
    stand(world)
    assert Cause.HUNG not in causes(world)


def test_a_long_confirmation_is_no_hang() -> None:
    world = training(2)
    stand(world, 600, phase="confirm")
    assert world.recorded == []


def test_slow_updates_are_no_hang() -> None:
    world = training(2)
    stand(world, 1200, update=2, seconds=200.0)
    assert world.recorded == []


def test_the_next_one_is_replaced_only_when_the_first_one_is_back_in_vain() -> None:
    world = training(2)
    stand(world)
    assert len(world.recorded) == 1
    stand(world, 600)  # the new one is not started: all wait for it
    assert len(world.recorded) == 1
    world.vanish()
    world.start()
    stand(world, 50)
    assert len(world.recorded) == 2


def test_a_run_that_hangs_for_ever_ends() -> None:
    world = training(1, restart={"limit": 2, "backOffSeconds": 0})
    for number in range(1, 4):
        stand(world, update=number)
        world.vanish()
        world.settle()
        world.start()
        world.train(number + 1)
        world.settle()
    status, reason, message = world.condition("Failed") or ("", "", "")
    assert (status, reason) == ("True", "RestartLimit")
    assert "no update for" in message
