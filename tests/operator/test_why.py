"""A paragraph that says what is happening, and what to do."""

from datetime import timedelta
from typing import Any

import pytest

from demoreset_operator.why import why
from world import BEGIN, World, saved, training


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


def test_a_run_that_is_complete_says_how_to_have_what_it_learned() -> None:
    world = training(1)
    world.end("key-worker-0-1", 0)
    world.settle()
    assert "is complete: the policy plays from the game's own start" in explanation(world)
    assert "`kubectl demoreset fetch key` brings it to runs/key" in explanation(world)


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
    world.go_on(9, checkpoint=7)
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
    world = saved()
    world.end("key-worker-0-1", 2)
    world.settle()
    text = explanation(world)
    assert text.startswith("key has failed; the start stands at frame 200 of 356")
    assert "BudgetSpent: spec.budget.frames is spent" in text
    branch = "kubectl demoreset branch key NEW --set spec.budget.frames=..."
    assert text.endswith(f"`{branch}` goes on from its checkpoints.")


def test_no_branch_is_advised_where_none_can_be() -> None:
    world = saved(checkpoint={"volume": {"retention": "Delete"}})
    world.end("key-worker-0-1", 2)
    world.settle()
    assert "branch key" not in explanation(world)
    assert "`kubectl demoreset fetch key` brings its folder" in explanation(world)
    world = World(restart={"outOfMemoryLimit": 0})
    world.settle()
    world.start()
    world.end("key-worker-0-1", 137, "OOMKilled")
    world.settle()
    text = explanation(world)
    assert "branch" not in text
    assert "raise spec.workers.resources.limits.memory" in text
    assert "It has saved no checkpoint itself: delete it and apply it anew." in text


KEEPS = "`kubectl demoreset fetch key` brings its folder, for its volume goes with it ("
ANEW = "then delete it and apply it anew."


@pytest.mark.parametrize(
    ("learned", "retention", "do"),
    [(True, "Retain", ANEW), (False, "Delete", ANEW), (True, "Delete", f"then {KEEPS}")],
)
def test_no_advice_costs_what_was_learned(learned: bool, retention: str, do: str) -> None:
    spec: dict[str, Any] = {"checkpoint": {"volume": {"retention": retention}}}
    world = saved(**spec) if learned else training(1, **spec)
    world.end("key-worker-0-1", 64, words="no such game")
    world.settle()
    assert f"no such game. Correct what the message names; {do}" in explanation(world)
    # Nor after a pause, when there is no room any more.
    world = saved(**spec) if learned else World(**spec)
    for suspend in (True, False):
        world.change(suspend=suspend, pendingDeadlineSeconds=60)
        world.settle()
        world.vanish()
        world.settle()
    world.unschedulable(world.live()[0], "no room")
    world.tick(61)
    world.settle()
    text = explanation(world)
    assert f"A run that has failed takes no correction: {do}" in text
    assert (KEEPS in text) is (KEEPS in do)


def test_a_claim_that_is_gone_is_restored_where_the_run_has_trained_on_it() -> None:
    world = saved(checkpoint={"volume": {"claim": "mine"}})
    world.vanish("key-worker-0-1")
    world.settle()
    world.unschedulable("key-worker-0-2", 'persistentvolumeclaim "mine" not found')
    world.settle()
    text = explanation(world)
    assert "not found. Restore it from a backup or snapshot; on an empty one the run begins" in text
    assert "Make the claim" not in text


def test_a_run_that_was_suspended_before_it_trained_has_nothing_to_go_on_from() -> None:
    world = World(suspend=True)
    world.settle()
    assert "key is suspended, and begins when spec.suspend is false." in explanation(world)
    assert "no pods; spec.suspend: false begins the run" in str(world.run.status.conditions)


def test_a_suspended_run_whose_claim_is_gone_does_not_promise_to_go_on() -> None:
    world = saved()
    world.change(suspend=True)
    world.settle()
    world.vanish()
    world.settle()
    assert "is suspended, and goes on from its checkpoint when" in explanation(world)
    del world.children["PersistentVolumeClaim", "key-data"]
    world.settle()
    text = explanation(world)
    assert text.startswith("key is suspended, and cannot go on; the start stands at frame 200")
    assert "VolumeLost: the claim key-data is gone: put it back, as from a snapshot, before" in text
    world.change(suspend=False)
    world.settle()
    assert explanation(world).count("the claim key-data is gone") == 1


def test_a_worker_that_is_held_back_is_named_and_what_to_read() -> None:
    world = World()
    world.settle()
    for attempt in (1, 2):
        world.start()
        world.end(f"key-worker-0-{attempt}", 1, words="no such game")
        world.settle()
    text = explanation(world)
    assert "BackOff: waiting before the next try; key-worker-0-2: Crashed: exit code 1" in text
    assert "comes by itself. Read the log of that pod (`kubectl demoreset logs key --pod" in text


@pytest.mark.parametrize(
    ("deadline", "learned", "do"),
    [
        ("activeDeadlineSeconds", True, "branch key NEW --set spec.activeDeadlineSeconds=...`"),
        ("activeDeadlineSeconds", False, "saved no checkpoint itself: delete it and apply it"),
        ("pendingDeadlineSeconds", False, "saved no checkpoint itself: delete it and apply it"),
    ],
)
def test_after_a_deadline_it_is_said_how_to_go_on(deadline: str, learned: bool, do: str) -> None:
    world = saved(**{deadline: 60}) if learned else World(**{deadline: 60})
    world.settle()
    world.tick(61)
    world.settle()
    text = explanation(world)
    assert text.startswith("key has failed")
    assert "DeadlineExceeded: " in text
    assert do in text


def test_a_run_that_waited_too_long_is_told_what_for() -> None:
    world = World(pendingDeadlineSeconds=60)
    world.settle()
    world.unschedulable("key-worker-0-1", "no room")
    world.tick(61)
    world.settle()
    assert "no room. Give it fewer gpus or resources" in explanation(world)


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError"])
def test_a_run_that_has_failed_is_to_be_applied_anew(reason: str) -> None:
    world = World()
    world.settle()
    world.wait_for("key-worker-0-1", reason, "no such thing")
    world.settle()
    assert "apply it anew" not in explanation(world)
    world.tick(301)
    world.settle()
    text = explanation(world)
    assert text.startswith(f"key has failed. {reason}: ")
    assert text.endswith("takes no correction: then delete it and apply it anew.")


@pytest.mark.parametrize(
    ("volume", "do"),
    [
        ({"claim": "nope"}, "Make the claim, or delete the run and name another."),
        ({}, "Give it fewer gpus or resources"),  # the operator makes its own
    ],
)
def test_a_missing_claim_is_said_once_and_what_to_do(volume: dict[str, str], do: str) -> None:
    world = World(checkpoint={"volume": volume})
    world.settle()
    missing = f'persistentvolumeclaim "{volume.get("claim", "key-data")}" not found'
    world.unschedulable("key-worker-0-1", f"0/2 nodes are available: {missing}. not found.")
    world.settle()
    assert f"worker. Unschedulable: worker 0: 0/2 nodes are available: {missing}. {do}" in (
        explanation(world)
    )


def test_a_group_that_is_too_small_waits() -> None:
    world = training(2, least=2)
    world.vanish("key-worker-1-1")
    world.settle()
    world.unschedulable("key-worker-1-2", "no room")
    world.settle()
    text = explanation(world)
    assert text.startswith("key waits: no worker trains; the start stands at")
    assert "TooFewWorkers: 1 of the 2 workers that it needs (spec.workers.min) are there" in text
    assert "worker 1: Unschedulable: no room. Give it fewer gpus" in text
    world.start()
    world.settle()
    assert "Those who are there train once spec.workers.min is lower" in explanation(world)


@pytest.mark.parametrize(("running", "old"), [(2, False), (1, True), (None, False)])
def test_a_status_that_is_other_than_the_pods_may_be_old(running: int | None, old: bool) -> None:
    text = why(training(2).run, BEGIN, running=running)
    assert ("That may be old: of its workers' pods 1 run now. See whether" in text) is old


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
