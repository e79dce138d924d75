"""A paragraph that says what is happening, and what to do."""

from datetime import timedelta

from demoreset_operator.why import why
from world import World


def told(world: World) -> str:
    return why(world.run, world.now + timedelta(minutes=3))


def test_a_run_that_trains_says_where_it_stands() -> None:
    world = World(workers={"max": 2})
    world.settle()
    world.start()
    world.train(10)
    world.settle()
    assert told(world) == (
        "key trains with 2 of 2 workers; the start stands at frame 200 of 356 after 81,920 frames, "
        "8,000 a second."
    )


def test_a_loss_is_told() -> None:
    world = World(workers={"max": 2})
    world.settle()
    world.start()
    world.train(10)
    world.evict("key-worker-1-1")
    world.settle()
    assert "A worker was lost in the last hour, the latest 3 min ago (key-worker-1-1, Evicted" in (
        told(world)
    )


def test_a_run_that_waits_says_for_what_and_what_to_do() -> None:
    world = World()
    world.settle()
    world.unschedulable("key-worker-0-1", "0/2 nodes: 2 Insufficient nvidia.com/gpu.")
    world.settle()
    said = told(world)
    assert said.startswith("key waits for its first worker. Unschedulable: ")
    assert "Insufficient nvidia.com/gpu. Give it fewer gpus or resources" in said


def test_a_run_that_failed_says_why_and_what_to_do() -> None:
    world = World()
    world.settle()
    world.start()
    world.end("key-worker-0-1", 2)
    world.settle()
    said = told(world)
    assert said.startswith("key has failed. BudgetSpent: ")
    assert "kubectl demoreset branch key NEW" in said
