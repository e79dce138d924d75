"""A paragraph that says what is happening, and what to do."""

from datetime import timedelta

from demoreset_operator.why import why
from world import World, training


def explanation(world: World) -> str:
    return why(world.run, world.now + timedelta(minutes=3))


def test_a_run_that_trains_says_where_it_stands() -> None:
    world = World(workers={"max": 2})
    world.settle()
    world.start()
    world.train(10)
    world.settle()
    assert explanation(world) == (
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
        explanation(world)
    )


def test_what_a_loss_has_cost_is_told() -> None:
    world = World(workers={"max": 1})
    world.settle()
    world.start()
    world.train(10, life=1)
    world.end("key-worker-0-1", 137)
    world.settle()
    world.start()
    world.tick(9)
    world.train(8, life=2, resumed={"update": 7, "frames": 7 * 8192})
    world.settle()
    assert explanation(world).endswith(
        " The run learned again 9 s later, from update 7: 24,576 frames lost."
    )


def test_a_run_that_waits_says_for_what_and_what_to_do() -> None:
    world = World()
    world.settle()
    world.unschedulable("key-worker-0-1", "0/2 nodes: 2 Insufficient nvidia.com/gpu.")
    world.settle()
    text = explanation(world)
    assert text.startswith("key waits for its first worker. Unschedulable: ")
    assert "Insufficient nvidia.com/gpu. Give it fewer gpus or resources" in text


def test_a_run_that_failed_says_why_and_what_to_do() -> None:
    world = World()
    world.settle()
    world.start()
    world.end("key-worker-0-1", 2)
    world.settle()
    text = explanation(world)
    assert text.startswith("key has failed. BudgetSpent: ")
    assert "kubectl demoreset branch key NEW" in text


def test_a_run_that_no_operator_has_seen_says_so() -> None:
    world = World()
    text = explanation(world)
    assert text.startswith("key waits for its first worker. No operator has looked at it yet. ")
    assert "kubectl get pods --all-namespaces --selector app.kubernetes.io/name=demoreset" in text
    world.settle()
    assert "No operator" not in explanation(world)
    world.change(suspend=True)
    assert "No operator has looked at its latest change yet." in explanation(world)


def test_a_run_of_another_manager_names_it() -> None:
    world = World(managedBy="kueue.x-k8s.io/multikueue")
    assert "It is kueue.x-k8s.io/multikueue's to look after (spec.managedBy)." in explanation(world)


def test_what_a_worker_lacks_is_explained_while_the_others_train() -> None:
    world = World(workers={"max": 2})
    world.settle()
    world.start("key-worker-0-1", "key-coordinator-1")
    world.wait_for("key-worker-1-1", "ContainerCreating", "")
    world.train(10)
    world.settle()
    text = explanation(world)
    assert "Training: 1 of 2 workers train; worker 1: ContainerCreating. Its image is" in text
    assert "FailedMount" in text


def test_a_run_that_waits_after_it_has_trained_says_where_it_stands() -> None:
    world = training(1)
    world.vanish("key-worker-0-1")
    world.settle()
    world.wait_for("key-worker-0-2", "ImagePullBackOff", "no such image")
    world.settle()
    text = explanation(world)
    assert text.startswith("key waits: no worker trains; the start stands at frame 200 of 356")
    assert "no such image. Correct spec.workers.image" in text
