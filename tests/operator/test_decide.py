"""What the operator decides, in the words of those who run it."""

import json
from datetime import timedelta
from typing import Any

import pytest

from demoreset_api.crd import schema
from demoreset_api.status import Cause, Phase
from demoreset_operator.render import Settings
from world import SETTINGS, Crash, World, saved, stamp, training, worker_status


def test_a_new_run_gets_all_its_objects_in_one_look() -> None:
    world = World(workers={"max": 3})
    plan = world.step()
    assert [body["kind"] for body in plan.apply_children] == [
        "ConfigMap",
        "Service",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
    ]
    assert sorted(world.created) == [
        "key-coordinator-1",
        "key-worker-0-1",
        "key-worker-1-1",
        "key-worker-2-1",
    ]
    assert world.status.phase is Phase.PENDING
    assert world.status.workers.shown == "0/3"


def test_nothing_is_written_twice() -> None:
    world = training()
    before = world.writes
    for _ in range(5):
        world.step()
    assert world.writes == before


def test_a_run_with_workers_that_train_is_running() -> None:
    world = training()
    assert world.status.phase is Phase.RUNNING
    assert world.condition("Running") == ("True", "Training", "all workers train")
    assert world.status.workers.shown == "3/3"
    assert world.status.curriculum is not None
    assert world.status.curriculum.progress == "44%"
    assert [event.reason for event in world.events] == ["TrainingStarted"]


def test_few_requests_until_a_run_of_four_workers_trains() -> None:
    world = World(workers={"max": 4})
    world.patient = True
    world.settle()
    world.tick(2)
    world.start()
    world.settle()
    world.tick(4)
    world.train()
    world.settle()
    assert world.status.phase is Phase.RUNNING
    assert world.writes + len(world.events) <= 14


def test_a_crash_is_recorded_and_the_worker_comes_again_at_once() -> None:
    world = training()
    world.end("key-worker-1-1", 1, words="RuntimeError: no luck")
    world.step()
    assert world.live()[1] == "key-worker-1-2"
    (attempt,) = world.status.attempts
    assert (attempt.worker, attempt.attempt, attempt.cause) == (1, 1, Cause.CRASHED)
    assert (attempt.exit_code, attempt.counts) == (1, False)  # the others train
    assert attempt.message == "exit code 1: RuntimeError: no luck"
    assert (world.status.restarts.total, world.status.restarts.counted) == (1, 0)
    assert world.events[-1].reason == "WorkerCrashed"
    assert "key-worker-1-1" in world.pods, "its log can be read"


def test_crashes_in_a_row_wait_longer_and_longer_and_then_end_the_run() -> None:
    world = training(1, restart={"limit": 4, "backOffSeconds": 2})
    waits = []
    for number in range(1, 5):
        world.end(f"key-worker-0-{number}", 1, words="Boom")
        waits.append(world.missed_for())
        world.start()
    assert waits == [0, 2, 4, 8]
    world.end("key-worker-0-5", 1, words="Boom")
    world.settle()
    assert world.status.phase is Phase.FAILED
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == "RestartLimit"
    assert "5 crashes, spec.restart.limit is 4" in failed[2]
    assert "Boom" in failed[2]


@pytest.mark.parametrize(
    ("limit", "field", "end"),
    [
        ("outOfMemoryLimit", "times out of memory", {"code": 137, "reason": "OOMKilled"}),
        ("limit", "crashes", {"code": 1}),
    ],
)
def test_every_cause_has_a_limit_of_its_own(limit: str, field: str, end: dict[str, Any]) -> None:
    limits = {"limit": 5, "outOfMemoryLimit": 5, "backOffSeconds": 0} | {limit: 1}
    world = training(1, restart=limits)
    other = {"code": 1} if limit == "outOfMemoryLimit" else {"code": 137, "reason": "OOMKilled"}
    for number, how in enumerate((other, other, end, other, end), 1):
        assert world.status.phase is not Phase.FAILED
        world.end(f"key-worker-0-{number}", **how)
        world.settle()
        world.start()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[:2] == ("True", "RestartLimit")
    assert failed[2].startswith(f"2 {field}")
    assert f"spec.restart.{limit} is 1; the last of key-worker-0-5" in failed[2]
    assert world.status.restarts.counted == 5


def test_where_others_go_on_a_loss_costs_seconds_and_no_frames() -> None:
    world = training(3)
    world.patient = True  # the status is written every 5 s, but for what must not wait
    world.train(7, life=1)
    world.tick(3)
    world.end("key-worker-1-1", 137)
    world.settle()
    # These updates may have been done before the loss: what was known then was seconds old.
    world.tick(1)
    world.train(9, life=1)
    world.settle()
    (lost,) = world.status.attempts
    assert (lost.update, lost.recovery_seconds) == (7, None)
    for _ in range(3):
        world.tick(0.5)
        world.train(10, life=1)
        world.settle()
    (lost,) = world.status.attempts
    assert (lost.recovery_seconds, lost.resumed_from, lost.lost_frames) == (1.5, None, 0)
    messages = [event.message for event in world.events if event.reason == "Recovered"]
    assert messages == ["the run learns on 1.5 s after key-worker-1-1 ended"]
    world.tick(9)
    world.train(11, life=1)
    world.settle()
    assert world.status.attempts == [lost]
    assert len([event for event in world.events if event.reason == "Recovered"]) == 1


def test_time_that_a_run_was_suspended_is_no_recovery() -> None:
    world = training(1)
    world.train(7, life=1)
    world.end("key-worker-0-1", 1)
    world.settle()
    world.change(suspend=True)
    world.settle()
    world.tick(3600)
    world.change(suspend=False)
    world.settle()
    world.go_on(1, checkpoint=7)
    (lost,) = world.status.attempts
    assert (lost.cause, lost.recovery_seconds, lost.lost_frames) == (Cause.CRASHED, None, None)


def test_of_workers_that_do_not_tell_their_life_nothing_is_guessed() -> None:
    world = training(1)
    world.train(42)
    world.end("key-worker-0-1", 1)
    world.settle()
    world.go_on(1, checkpoint=30)
    (lost,) = world.status.attempts
    assert (lost.recovery_seconds, lost.lost_frames) == (None, None)


@pytest.mark.parametrize(
    "went_on",
    [
        {"life": 2, "resumed": {"life": None, "update": 42, "frames": 42 * 8192}},
        # Then they, too, were lost, before anything was heard of them.
        {"life": 3, "resumed": {"life": 2, "update": 50, "frames": 50 * 8192}},
    ],
)
def test_who_went_on_in_a_life_of_their_own_read_no_checkpoint(went_on: dict[str, Any]) -> None:
    world = training(2)
    world.train(42, life=1)
    world.end("key-worker-1-1", 137)
    world.settle()
    world.tick(20)
    world.train(51, **went_on)
    world.settle()
    (lost,) = world.status.attempts
    assert (lost.recovery_seconds, lost.resumed_from, lost.lost_frames) == (20, None, 0)
    (message,) = (event.message for event in world.events if event.reason == "Recovered")
    assert "checkpoint" not in message


def test_a_checkpoint_may_be_later_than_what_was_known_of_the_run() -> None:
    world = training(1)
    world.train(42, life=1)
    world.end("key-worker-0-1", 137)
    world.settle()
    world.go_on(20, checkpoint=44)
    (lost,) = world.status.attempts
    assert (lost.update, lost.resumed_from, lost.lost_frames) == (42, 44, 0)


def test_where_all_are_lost_the_checkpoint_says_what_it_costs() -> None:
    world = training(2)
    first = {"life": 1}
    world.train(40, **first)
    world.tick(2)
    world.train(42, **first)  # the status is not written again as soon as that
    for worker in (0, 1):
        world.end(f"key-worker-{worker}-1", 137)
    world.settle()
    world.go_on(20, checkpoint=30)
    for lost in world.status.attempts:
        assert (lost.update, lost.life) == (42, 1)
        assert (lost.resumed_from, lost.lost_frames) == (30, 12 * 8192)
        assert lost.recovery_seconds == 20
    messages = [event.message for event in world.events if event.reason == "Recovered"]
    (message,) = messages
    assert message.endswith(", from the checkpoint of update 30: 98,304 frames are learned again")
    assert world.status.training is not None
    assert world.status.training.life == 2


def test_a_worker_that_trained_for_a_while_is_not_made_to_wait() -> None:
    world = training(1)
    for number in range(1, 6):
        world.tick(120)
        world.end(f"key-worker-0-{number}", 137)
        world.step()
        assert world.live()[0] == f"key-worker-0-{number + 1}"
        world.start()


@pytest.mark.parametrize(
    "befalls",
    [
        lambda world, name: world.delete(name),
        lambda world, name: world.vanish(name),  # without a word
        lambda world, name: world.end(name, 143),
    ],
)
def test_somebody_who_ends_workers_again_and_again_is_no_hot_loop(befalls: Any) -> None:
    world = training(1, restart={"limit": 0, "maxBackOffSeconds": 8})
    waits = []
    for number in range(1, 8):
        befalls(world, f"key-worker-0-{number}")
        waits.append(world.missed_for())
        world.start()
    assert waits == [0, 1, 2, 4, 8, 8, 8]
    assert world.status.restarts.counted == 0
    # Who runs for a minute is replaced at once again, however it ends.
    world.tick(61)
    world.settle()
    befalls(world, "key-worker-0-8")
    world.step()
    assert world.live()[0] == "key-worker-0-9"


@pytest.mark.parametrize("behind", [0, 90, 3600])
def test_a_node_whose_clock_is_behind_does_not_keep_the_waits_from_growing(behind: int) -> None:
    world = World(restart={"limit": 100})
    world.behind = timedelta(seconds=behind)
    world.settle()
    waits = []
    for number in range(1, 6):
        world.start()
        world.tick(3)
        world.settle()  # it is seen while it lives
        world.end(f"key-worker-0-{number}", 1)
        waits.append(world.missed_for())
    assert waits == [0, 1, 2, 4, 8]
    world.start()
    world.tick(61)  # for so long it was not in vain
    world.settle()
    world.end("key-worker-0-6", 1)
    assert world.missed_for() == 0


@pytest.mark.parametrize("behind", [0, 3600])
def test_who_has_just_begun_on_a_node_whose_clock_is_behind_does_not_train_yet(behind: int) -> None:
    world = World(workers={"min": 1, "max": 2})
    world.behind = timedelta(seconds=behind)
    world.settle()
    world.start()
    world.end("key-worker-1-1", 1)
    world.settle()
    assert world.status.restarts.counted == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [(64, "WrongRun"), (65, "NoValidCheckpoint"), (66, "NoProgress")],
)
def test_some_ends_are_final_and_say_why(code: int, reason: str) -> None:
    world = training()
    for other in ("key-worker-0-1", "key-worker-1-1"):  # where others go on it is not the run's
        world.end(other, code)
    world.end("key-worker-2-1", code, words="demoreset: spec.ppo: received 3")
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[:2] == ("True", reason)
    assert "received 3" in failed[2]
    world.vanish()
    world.settle()
    assert not world.live()
    assert not world.coordinators()
    assert "key-worker-2-1" in world.pods, "its log can be read"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(64, "WrongRun"), (65, "NoValidCheckpoint"), (66, "NoProgress")],
)
def test_where_others_train_on_a_worker_fails_itself_and_not_the_run(
    code: int, reason: str
) -> None:
    world = training()
    world.end("key-worker-2-1", code, words="NoProgress: update 1 failed 3 times: no GPU")
    world.settle()
    assert world.condition("Failed") is None
    assert (world.status.restarts.total, world.status.restarts.crashed) == (1, 0)
    assert "no GPU" in world.status.attempts[-1].message
    assert world.live()[2] == "key-worker-2-2"
    for other in ("key-worker-0-1", "key-worker-1-1"):  # one after the other: now nobody goes on
        world.end(other, code, words="NoProgress: update 9 failed 3 times")
        world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == reason


def test_a_worker_has_ended_though_a_sidecar_runs_on() -> None:
    world = training()
    world.end("key-worker-2-1", 1)
    status = world.pods["key-worker-2-1"]["status"]
    status["phase"] = "Running"  # for a moment after every end
    world.settle()
    assert world.status.restarts.total == 0
    sidecar = {"name": "shipper", "state": {"running": {"startedAt": stamp(world.now)}}}
    status["containerStatuses"].append(sidecar)
    world.settle()
    assert world.status.restarts.total == 1
    assert world.live()[2] == "key-worker-2-2"
    assert "deletionTimestamp" in world.pods["key-worker-2-1"]["metadata"], "it keeps its GPU"
    for name in world.live().values():
        world.end(name, 0)
        world.pods[name]["status"]["phase"] = "Running"
        world.pods[name]["status"]["containerStatuses"].append(sidecar)
    world.settle()
    world.vanish()
    world.tick(60)
    world.settle()
    assert world.status.phase is Phase.COMPLETE
    world.vanish()
    assert not [pod for pod in world.workers() if not pod.ended or pod.lingers]


def test_a_coordinator_that_a_node_refuses_is_no_hot_loop() -> None:
    world = training()
    made = []
    for _ in range(60):
        for name in world.coordinators():
            bound = {"type": "PodScheduled", "status": "True"}
            bound["lastTransitionTime"] = stamp(world.now)
            refused = {"phase": "Failed", "reason": "Evicted", "conditions": [bound]}
            world.pods[name]["status"] |= refused
        world.settle()
        world.vanish()
        made.append(max(world.names("coordinator")))
        assert world.coordinators() or world.decide().again is not None
        world.tick(1)
    assert 5 <= len(set(made)) <= 8


def test_after_a_resume_the_deadline_counts_although_a_worker_once_crashed() -> None:
    world = training(pendingDeadlineSeconds=100)
    world.end("key-worker-2-1", 1)
    world.settle()
    world.change(suspend=True)
    world.settle()
    world.vanish()
    world.tick(60)
    world.change(suspend=False)
    world.settle()
    assert world.status.begun is None
    world.tick(101)
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == "PendingDeadlineExceeded"


def test_the_latest_checkpoint_is_the_writers_whoever_is_ahead() -> None:
    world = training()
    for update in (40, 41):
        world.tick(20)
        kept = {"update": update - 2, "ageSeconds": 5.0, "bytes": 9, "error": None}
        world.say("key-worker-1-1", update, rank=0, checkpoint=kept)
        for name in ("key-worker-0-1", "key-worker-2-1"):  # they answer a moment later
            world.say(name, update + 1, rank=1)
        world.settle()
        assert world.status.training is not None
        assert world.status.training.update == update + 1
        assert world.status.checkpoint is not None
        assert world.status.checkpoint.update == update - 2
        assert world.status.checkpoint.time == world.now - timedelta(seconds=5)
    before = world.status.checkpoint
    world.tick(3)
    world.say("key-worker-1-1", 41, rank=0, checkpoint=kept | {"ageSeconds": 8.7})
    world.settle()
    assert world.status.checkpoint == before, "it is older, and the same"


@pytest.mark.parametrize(("code", "kind"), [(0, "Complete"), (2, "Failed")])
def test_the_last_words_of_a_worker_that_is_done_are_how_the_run_stands(
    code: int, kind: str
) -> None:
    world = training(2)
    tried = {"update": 98, "episodes": 100, "successRate": 0.93}
    world.end("key-worker-1-1", code, words=json.dumps(worker_status(99, 2, evaluation=tried)))
    world.settle()
    found = world.condition(kind)
    assert found is not None
    assert found[0] == "True"
    if code == 0:
        assert "in 93% of 100 episodes" in found[2]
    status = world.status
    assert status.training is not None
    assert (status.training.update, status.training.frames) == (99, 99 * 8192)
    assert status.evaluation is not None
    assert status.evaluation.success_rate == 0.93
    assert all("{" not in attempt.message for attempt in status.attempts)
    assert status.restarts.total == 0, "it was not started again"


def test_a_confirmation_that_failed_is_not_told_as_the_one_that_was_met() -> None:
    world = training(1)
    tried = {"update": 40, "episodes": 100, "successRate": 0.62}
    world.train(50, evaluation=tried)
    world.end("key-worker-0-1", 0)  # its last words were lost
    world.settle()
    found = world.condition("Complete")
    assert found is not None
    assert "62" not in found[2]
    assert world.status.workers.members == 0


def test_last_words_of_an_earlier_goal_do_not_take_a_run_back() -> None:
    world = training(1)
    world.train(50)
    world.settle()
    world.change(goal={"episodes": 7})
    world.end("key-worker-0-1", 0, words=json.dumps(worker_status(40, 1)))
    world.settle()
    assert world.status.training is not None
    assert world.status.training.update == 50


@pytest.mark.parametrize(
    ("befalls", "cause"),
    [
        (lambda world: world.evict("key-worker-0-1"), Cause.EVICTED),
        (lambda world: world.evict("key-worker-0-1", "PreemptionByScheduler"), Cause.EVICTED),
        (lambda world: world.evict("key-worker-0-1", "DeletionByTaintManager"), Cause.NODE_LOST),
        (lambda world: world.delete("key-worker-0-1"), Cause.DELETED),
        (lambda world: world.vanish("key-worker-0-1"), Cause.DELETED),
        (lambda world: world.end("key-worker-0-1", 143), Cause.DRAINED),
        (lambda world: world.end("key-worker-0-1", 75), Cause.TRY_AGAIN),
    ],
)
def test_what_the_run_cannot_help_does_not_count(befalls: Any, cause: Cause) -> None:
    world = training(restart={"limit": 0})
    befalls(world)
    world.step()
    assert world.live()[0] == "key-worker-0-2", "replaced without waiting for its end"
    (attempt,) = world.status.attempts
    assert (attempt.cause, attempt.counts) == (cause, False)
    assert world.status.restarts.counted == 0


def test_memory_that_was_not_enough_names_the_limit() -> None:
    world = training(1, restart={"outOfMemoryLimit": 0})
    world.pods["key-worker-0-1"]["spec"]["containers"][0]["resources"] = {
        "limits": {"memory": "512Mi"}
    }
    world.end("key-worker-0-1", 137, "OOMKilled")
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert "more than its limit of 512Mi; raise spec.workers.resources.limits.memory" in failed[2]


def test_the_goal_completes_a_run_and_the_others_end_by_themselves() -> None:
    world = training()
    world.end("key-worker-0-1", 0, "Completed")
    world.settle()
    assert world.status.phase is Phase.COMPLETE
    assert world.live(), "they are about to end by themselves"
    world.end("key-worker-1-1", 0, "Completed")
    world.tick(60)
    world.settle()
    world.vanish()
    world.settle()
    assert not world.live()
    assert not world.coordinators()
    assert world.events[-1].reason == "GoalMet"


def test_a_run_that_ended_is_deleted_when_its_time_has_come() -> None:
    world = training(ttlSecondsAfterFinished=100)
    world.end("key-worker-0-1", 0)
    world.settle()
    plan = world.decide()
    assert plan.again is not None
    world.tick(99)
    world.settle()
    assert not world.deleted
    world.tick(2)
    world.step()
    assert world.deleted


def test_a_change_to_a_run_that_is_over_is_answered_once() -> None:
    world = training()
    world.end("key-worker-0-1", 0)
    world.settle()
    world.tick(60)
    world.settle()
    assert "RunIsOver" not in [event.reason for event in world.events]
    world.change(workers={"max": 5})
    world.settle()
    assert [event.reason for event in world.events].count("RunIsOver") == 1
    assert "delete it and apply it anew" in world.events[-1].message, "it has no checkpoint"
    assert not world.live()


BRANCH = "new run. `kubectl demoreset branch key NEW` goes on from its checkpoints."
FETCH = "`kubectl demoreset fetch key` brings its folder, for its volume goes with it ("


@pytest.mark.parametrize(
    ("volume", "says"),
    [
        ({}, BRANCH),
        ({"claim": "mine", "retention": "Delete"}, BRANCH),
        ({"retention": "Delete"}, f"new run. No branch can have its checkpoints: {FETCH}"),
    ],
)
@pytest.mark.parametrize("changed", [{"workers": {"max": 5}}, {"ttlSecondsAfterFinished": 10**6}])
def test_a_change_to_a_run_that_is_over_never_costs_its_checkpoints(
    volume: dict[str, str], says: str, changed: dict[str, Any]
) -> None:
    world = saved(checkpoint={"volume": volume})
    world.end("key-worker-0-1", 2)
    world.settle()
    world.change(**changed)
    world.settle()
    assert world.events[-1].reason == "RunIsOver"
    message = world.events[-1].message
    assert "a changed spec.ttlSecondsAfterFinished counts" in message
    assert message.count(says) == 1
    assert ("delete it and apply it anew" in message) is (FETCH in message)


def test_whoever_ends_with_its_run_has_seen_the_last_checkpoint() -> None:
    world = training(2)
    kept = {"update": 40, "ageSeconds": 1.0, "bytes": 8, "error": None}
    world.say("key-worker-0-1", 50, rank=0, checkpoint=kept)
    world.settle()
    words = worker_status(50, 2, rank=1, checkpoint=kept | {"update": 50})
    world.end("key-worker-1-1", 0, words=json.dumps(words))
    world.settle()
    assert world.status.checkpoint is not None
    assert world.status.checkpoint.update == 50


def test_the_last_words_say_whether_what_was_learned_is_on_the_volume() -> None:
    world = training(2)
    full = {"update": 1, "ageSeconds": 9.0, "bytes": 1, "error": "disk full"}
    world.say("key-worker-0-1", 5, rank=0, checkpoint=full)
    world.say("key-worker-1-1", 5, rank=1)
    world.settle()
    world.end("key-worker-1-1", 0, words=json.dumps(worker_status(6, 2, rank=1)))
    world.settle()
    assert world.status.phase is Phase.COMPLETE
    assert world.condition("CheckpointReady") == ("False", "NotWritten", "disk full")
    words = worker_status(6, 2, rank=0, checkpoint=full | {"update": 6, "error": None})
    world.end("key-worker-0-1", 0, words=json.dumps(words))
    world.settle()
    ready = world.condition("CheckpointReady")
    assert ready == ("True", "Written", "what was learned is on the volume")
    # The same in one look.
    world = saved()
    world.train(5, checkpoint=full)
    world.settle()
    words = worker_status(6, 1, checkpoint=full | {"update": 6, "error": None})
    world.end("key-worker-0-1", 0, words=json.dumps(words))
    world.step()
    assert world.condition("CheckpointReady") == ready


@pytest.mark.parametrize(("code", "stalled"), [(0, ("False", "Moves")), (2, ("True", "Plateau"))])
def test_a_run_that_is_complete_is_not_stalled(code: int, stalled: tuple[str, str]) -> None:
    world = training(1)
    how = worker_status(5, 1)["training"]
    world.train(5, training=how | {"stalled": True})
    world.settle()
    world.end("key-worker-0-1", code)
    world.settle()
    found = world.condition("Stalled")
    assert found is not None
    assert found[:2] == stalled
    world = training(1)
    world.end("key-worker-0-1", 0)
    world.settle()
    assert world.condition("Stalled") is None


def suspended(**volume: Any) -> World:
    """A run that has saved, and gave its pods back."""
    world = saved(checkpoint={"volume": volume})
    world.change(suspend=True)
    world.settle()
    world.vanish()
    world.settle()
    return world


def test_a_suspended_run_whose_claim_is_gone_says_so_before_it_is_too_late() -> None:
    world = suspended()
    claim = world.children.pop(("PersistentVolumeClaim", "key-data"))
    world.settle()
    suspends, ready = world.condition("Suspended"), world.condition("CheckpointReady")
    assert suspends == ("True", "Suspended", "no pods, nor the claim with the checkpoints")
    assert ready is not None
    assert ready[:2] == ("False", "VolumeLost")
    assert "the claim key-data is gone: put it back" in ready[2]
    assert world.status.phase is Phase.SUSPENDED
    world.children["PersistentVolumeClaim", "key-data"] = claim
    world.settle()
    ready = world.condition("CheckpointReady")
    assert ready is not None
    assert ready[0] == "True"
    del world.children["PersistentVolumeClaim", "key-data"]
    world.change(suspend=False)
    world.settle()
    assert world.condition("Failed") is not None
    ready = world.condition("CheckpointReady")
    assert ready == ("False", "VolumeLost", "the claim key-data is gone")
    world.change(ttlSecondsAfterFinished=100)
    world.settle()
    assert "Its checkpoints are gone: delete it and apply it anew." in world.events[-1].message


def test_of_a_claim_that_the_user_names_a_suspended_run_knows_nothing() -> None:
    ready = suspended(claim="mine").condition("CheckpointReady")
    assert ready is not None
    assert ready[0] == "True"


@pytest.mark.parametrize(
    ("befalls", "seconds", "ended"),
    [
        (lambda world, name: world.end(name, 137), 51, "ended"),
        (lambda world, name: world.delete(name), 51, "ended"),
        (lambda world, name: world.vanish(name), 10, "was found to have ended"),
    ],
)
def test_a_recovery_counts_from_the_end_that_the_pod_tells_though_the_operator_was_away(
    befalls: Any, seconds: int, ended: str
) -> None:
    world = training(1)
    world.train(7, life=1)
    world.settle()
    befalls(world, "key-worker-0-1")
    world.answers.clear()
    world.tick(41)
    found = world.now
    world.settle()
    world.vanish()
    world.tick(10)
    world.start()
    world.train(8, life=2, resumed={"life": 1, "update": 7, "frames": 7 * 8192})
    world.settle()
    (lost,) = world.status.attempts
    assert (lost.recovery_seconds, lost.found_at) == (seconds, found)
    (message,) = [one.message for one in world.events if one.reason == "Recovered"]
    assert message.startswith(f"the run learns on {seconds}.0 s after key-worker-0-1 {ended}")


def test_a_group_that_is_too_small_does_not_train_and_says_so() -> None:
    world = training(2)
    world.change(workers={"min": 2, "max": 2})
    world.settle()
    world.train(5)
    world.settle()
    assert world.condition("Running") == ("True", "Training", "all workers train")
    world.vanish("key-worker-1-1")
    world.settle()
    few = "1 of the 2 workers that it needs (spec.workers.min) are there; the others are waited for"
    world.unschedulable("key-worker-1-2", "no room")
    for number, more in enumerate(("worker 1: Unschedulable: no room", *2 * ["worker 1 loads"])):
        if number == 1:
            world.start("key-worker-1-2")
        elif number == 2:
            world.say("key-worker-1-2", None)
        world.tick(5)
        world.say("key-worker-0-1", 5, phase="quorum")
        world.settle()
        running = world.condition("Running")
        assert running == ("False", "TooFewWorkers", f"{few}; {more}")
        assert (world.status.phase, world.status.workers.shown) == (Phase.PENDING, "0/2")
    world.train(6)
    world.settle()
    assert world.condition("Running") == ("True", "Training", "all workers train")


def test_all_workers_that_lack_are_named() -> None:
    world = training(3)
    for worker in (0, 1):
        world.vanish(f"key-worker-{worker}-1")
    world.settle()
    for worker in (0, 1):
        world.unschedulable(f"key-worker-{worker}-2", "no room")
    world.tick(5)
    world.say("key-worker-2-1", 5)
    world.settle()
    running = world.condition("Running")
    both = "worker 0, worker 1: Unschedulable: no room"
    assert running == ("True", "Training", f"1 of 3 workers train; {both}")


def test_an_operator_that_has_just_begun_takes_no_group_for_too_small() -> None:
    world = World(workers={"min": 2, "max": 2})
    world.settle()
    world.start()
    world.train(5)
    world.settle()
    del world.answers["key-worker-1-1"]  # it is asked later
    world.settle()
    running = world.condition("Running")
    assert running == ("True", "Training", "1 of 2 workers train; worker 1 loads")


def test_an_operator_that_has_heard_nobody_yet_shows_the_size_that_is_wanted_now() -> None:
    world = training(3)
    world.answers.clear()
    world.change(workers={"min": 1, "max": 4})
    world.settle()
    assert world.status.workers.shown == "3/4"


def test_whoever_began_before_the_first_status_has_begun() -> None:
    world = World()
    world.settle()
    world.start()
    world.tick(3)
    world.end("key-worker-0-1", 1)
    world.run_body["status"] = {}  # it was not written yet
    status = world.decide().status
    assert status is not None
    assert status.begun is not None


def test_suspending_gives_the_pods_back_and_the_coordinator_last() -> None:
    world = training()
    world.change(suspend=True)
    world.settle()
    assert world.coordinators(), "those who leave need it"
    suspended = world.condition("Suspended")
    assert suspended is not None
    assert suspended[:2] == ("False", "Suspending")
    world.vanish()
    world.settle()
    world.vanish()
    world.settle()
    assert world.pods == {}
    assert world.status.phase is Phase.SUSPENDED
    assert world.status.restarts.total == 0
    world.change(suspend=False)
    world.settle()
    assert len(world.live()) == 3
    assert world.live()[0] == "key-worker-0-2"
    suspended = world.condition("Suspended")
    assert suspended is not None
    assert suspended[:2] == ("False", "Resumed")


def test_a_larger_group_leaves_those_who_train_alone() -> None:
    world = training(1)
    world.change(workers={"min": 1, "max": 3})
    world.settle()
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-1"}
    assert world.coordinators() == ["key-coordinator-1"]


def test_a_smaller_group_loses_its_last_workers_and_no_restart_is_counted() -> None:
    world = training(3)
    world.change(workers={"min": 1, "max": 1})
    world.settle()
    world.vanish()
    world.settle()
    assert world.live() == {0: "key-worker-0-1"}
    assert world.status.restarts.total == 0
    world.change(workers={"min": 1, "max": 2})
    world.settle()
    assert set(world.live()) == {0, 1}


def test_another_template_is_rolled_through_the_group_one_by_one() -> None:
    world = training(3)
    world.change(workers={"min": 1, "max": 3, "labels": {"team": "a"}})
    gone = []
    for _ in range(20):
        before = set(world.live().values())
        world.settle()
        gone.append(len(before - set(world.live().values())))
        world.vanish()
        world.start()
        world.train(2)
        world.tick()
    assert max(gone) == 1
    assert sum(gone) == 3
    assert {name[-1] for name in world.live().values()} == {"2"}
    assert {one.cause for one in world.status.attempts} == {Cause.REPLACED}
    assert world.status.restarts.counted == 0


def test_other_things_to_learn_let_all_leave_before_anybody_comes() -> None:
    world = training(3)
    old = set(world.pods)
    world.change(goal={"successRate": 0.5})
    world.settle()
    assert not world.live()
    assert set(world.pods) <= old | {"key-coordinator-1"}
    world.vanish(*[name for name in world.names("worker")])
    world.settle()
    assert len(world.live()) == 3
    configs = [name for kind, name in world.children if kind == "ConfigMap"]
    assert len(configs) == 1, "the old one is gone"


def test_another_image_of_the_operator_rolls_the_group() -> None:
    world = training(2)
    world.step(settings=Settings("trainer:next", "Never", SETTINGS.namespace))
    assert world.live()[1] == "key-worker-1-2"
    assert world.live()[0] == "key-worker-0-1"


def test_an_image_that_cannot_be_had_fails_after_minutes() -> None:
    world = World()
    world.settle()
    world.wait_for("key-worker-0-1", "ImagePullBackOff", "no such image trainer:test")
    world.settle()
    running = world.condition("Running")
    assert running is not None
    assert running[1] == "ImagePullBackOff"
    assert "no such image" in running[2]
    plan = world.decide()
    assert plan.again is not None
    world.now = plan.again + timedelta(seconds=1)
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == "ImagePullBackOff"


def test_what_cannot_be_scheduled_says_so_and_has_a_deadline() -> None:
    world = World(pendingDeadlineSeconds=30)
    world.settle()
    world.unschedulable("key-worker-0-1", "0/2 nodes: 2 Insufficient nvidia.com/gpu.")
    world.settle()
    running = world.condition("Running")
    assert running is not None
    assert running[1] == "Unschedulable"
    assert "Insufficient nvidia.com/gpu" in running[2]
    world.tick(31)
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == "PendingDeadlineExceeded"
    assert "Insufficient" in failed[2]


def test_a_run_that_is_too_long_active_fails() -> None:
    world = training(activeDeadlineSeconds=100)
    world.tick(101)
    world.settle()
    failed = world.condition("Failed")
    assert failed is not None
    assert failed[1] == "DeadlineExceeded"


@pytest.mark.parametrize(
    "limit", ["activeDeadlineSeconds", "pendingDeadlineSeconds", "ttlSecondsAfterFinished"]
)
def test_a_limit_beyond_all_dates_is_not_taken_and_one_that_is_stored_does_no_harm(
    limit: str,
) -> None:
    assert schema()["properties"]["spec"]["properties"][limit]["maximum"] == 2**31 - 1
    world = training(1, **{limit: 10**15})
    world.tick(86_400)
    world.settle()
    assert world.condition("Failed") is None
    world.end("key-worker-0-1", 0)
    world.settle()
    assert world.condition("Complete") is not None
    assert not world.deleted


def test_a_lost_coordinator_is_made_again_without_touching_workers() -> None:
    world = training()
    world.delete("key-coordinator-1")
    world.step()
    assert world.coordinators() == ["key-coordinator-2"]
    assert world.status.restarts.total == 0


def test_a_run_of_another_manager_is_left_alone() -> None:
    world = World(managedBy="kueue.x-k8s.io/multikueue")
    world.step()
    assert not world.pods
    assert "status" not in world.run_body


def test_a_child_that_was_deleted_comes_back() -> None:
    world = training()
    del world.children["Service", "key-coordinator"]
    world.settle()
    assert ("Service", "key-coordinator") in world.children


@pytest.mark.parametrize("requests", range(1, 10))
def test_an_operator_that_dies_anywhere_at_the_start_leaves_no_duplicate(requests: int) -> None:
    world = World(workers={"max": 3})
    with pytest.raises(Crash):
        world.step(crash_after=requests)
    world.settle()
    assert len(world.created) == len(set(world.created)) == 4
    assert len(world.live()) == 3


def test_a_successor_is_known_at_once_though_the_operator_dies_and_the_pod_vanishes() -> None:
    world = training(1)
    world.patient = True  # what may wait, waits
    world.vanish("key-worker-0-1")
    world.settle()
    assert world.live()[0] == "key-worker-0-2"
    world.vanish("key-worker-0-2")  # while there is no operator
    world.taken.clear()
    world.settle()
    world.tick()
    world.settle()
    assert world.live()[0] == "key-worker-0-3"
    assert world.status.restarts.total == 2


def reasons(world: World) -> list[tuple[str, str]]:
    """The events so far."""
    return [(event.type, event.reason) for event in world.events]


def test_a_checkpoint_that_cannot_be_written_is_told_once() -> None:
    world = training(1)
    world.patient = True
    full = {"update": 1, "ageSeconds": 9.0, "bytes": 1, "error": "No space left on device"}
    for update, error in ((2, None), (3, full["error"]), (4, full["error"]), (5, "Read-only")):
        world.train(update, checkpoint=full | {"error": error})
        for _ in range(2):
            world.step()
            world.tick(2)
    assert reasons(world)[1:] == [("Warning", "NotWritten")]
    assert "No space left" in world.events[-1].message


def test_a_group_that_is_too_small_is_told_of_once_at_each_time() -> None:
    world = training(2, least=2)
    world.patient = True
    for attempt in (1, 2):
        world.tick(61)  # or the next one waits
        world.train(10 * attempt)
        world.step()
        world.delete(f"key-worker-1-{attempt}")
        world.vanish()
        for _ in range(3):
            world.step()
        world.start()
        world.train(10 * attempt + 1)
        world.step()
    told = [
        reason for reason in reasons(world) if reason[1] in ("TooFewWorkers", "TrainingStarted")
    ]
    assert told == [("Normal", "TrainingStarted"), ("Warning", "TooFewWorkers")] * 2 + [
        ("Normal", "TrainingStarted")
    ]


def test_a_pause_is_told_from_its_beginning_to_its_end() -> None:
    world = training(1)
    world.patient = True
    world.change(suspend=True)
    world.step()
    world.vanish()
    world.settle()
    world.change(suspend=False)
    for _ in range(3):
        world.step()
    assert reasons(world)[1:] == [("Normal", "Suspended"), ("Normal", "Resumed")]


def test_who_comes_back_alone_is_told_of_once() -> None:
    world = training(2, least=2)
    world.vanish("key-worker-0-1", "key-worker-1-1")
    world.settle()
    world.start()
    world.settle()
    world.patient = True
    world.say("key-worker-0-2", 7)
    for _ in range(3):
        world.step()
    assert [name for _, name in reasons(world)].count("TooFewWorkers") == 1


@pytest.mark.parametrize(("after", "told"), [("PlayOn", ["GoalMet"]), ("Stop", [])])
def test_a_run_that_plays_on_tells_when_its_goal_is_met(after: str, told: list[str]) -> None:
    world = training(1, goal={"successRate": 0.9, "after": after})
    world.patient = True
    for update, rate in ((2, None), (3, 0.8), (4, 0.93), (5, 0.95)):
        tried = {"update": update, "episodes": 100, "successRate": rate} if rate else {}
        world.train(update, evaluation=tried)
        for _ in range(2):
            world.step()
    assert [reason for _, reason in reasons(world)[1:]] == told
    if told:
        assert world.events[-1].message.startswith(
            "the policy ties the demonstration in 93% of 100"
        )
        assert world.events[-1].message.endswith("; it plays on")
