"""Trouble that a run must survive, or say: found by reviews, kept by tests."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from demoreset_api.status import Attempt, Cause, Phase
from demoreset_operator import pods
from demoreset_operator.render import Settings
from demoreset_operator.why import why
from world import SETTINGS, World, training


def condition(world: World, kind: str) -> tuple[str, str, str]:
    found = world.condition(kind)
    assert found is not None
    return found


def test_an_operator_that_has_just_begun_tells_nothing_new() -> None:
    world = training()
    before = world.writes
    world.answers.clear()
    world.step()
    assert world.status.phase is Phase.RUNNING
    assert [event.reason for event in world.events] == ["TrainingStarted"]
    assert world.writes <= before + 1, "the number of those who train"


def test_a_claim_that_gets_no_volume_is_told_though_the_pod_says_nothing() -> None:
    """A pod that the scheduler waits with for a volume has no condition PodScheduled."""
    world = World(workers={"max": 2})
    world.settle()
    world.children["PersistentVolumeClaim", "key-data"]["status"] = {"phase": "Pending"}
    world.settle()
    told = "the claim key-data has no volume yet: ReadWriteMany, of the default class"
    assert condition(world, "Running") == ("False", "ClaimPending", told)
    world.unschedulable("key-worker-0-1", "running PreBind plugin", "SchedulerError")
    world.settle()
    assert condition(world, "Running") == ("False", "ClaimPending", told), "that is over"
    paragraph = why(world.run, world.now)
    assert told in paragraph
    assert "kubectl describe pvc" in paragraph
    world.children["PersistentVolumeClaim", "key-data"]["status"] = {"phase": "Bound"}
    del world.pods["key-worker-0-1"]["status"]["conditions"]
    world.settle()
    assert condition(world, "Running")[1] == "Creating"


def test_a_change_that_is_refused_is_told_though_all_train() -> None:
    world = training()
    assert "Refused" not in why(world.run, world.now)
    world.refused = "pods is forbidden: no PriorityClass with name urgent was found"
    world.settle()
    told = f"all workers train; Refused: {world.refused}"
    assert condition(world, "Running") == ("True", "Training", told)
    assert f"{told}. Mend what the message names" in why(world.run, world.now)


@pytest.mark.parametrize(
    "changed", [{"runtimeClassName": "no-such"}, {"membersPerWorker": 2}], ids=str
)
def test_where_a_new_pod_would_be_refused_all_but_the_change_goes_on(changed: Any) -> None:
    world = training()
    world.refused, world.unfit = "spec.runtimeClassName: not found", True
    world.change(workers={"min": 1, "max": 3, **changed})
    world.settle()
    first = {f"key-worker-{index}-1" for index in range(3)}
    assert set(world.live().values()) == first, "who trains stays"
    del world.pods["key-coordinator-1"]
    world.settle()
    assert world.coordinators(), "without one nobody trains"
    world.unfit = False
    world.settle()
    assert set(world.live().values()) < first | {f"key-worker-{n}-2" for n in range(3)}


def test_where_a_new_pod_would_be_refused_the_group_shrinks_as_wanted() -> None:
    world = training()
    world.refused, world.unfit = "spec.runtimeClassName: not found", True
    world.change(workers={"min": 1, "max": 1, "runtimeClassName": "no-such"})
    world.settle()
    assert set(world.live().values()) == {"key-worker-0-1"}


def test_an_operator_with_another_image_does_not_take_all_workers_for_idle() -> None:
    world = training()
    world.answers.clear()
    world.step(settings=Settings("trainer:next", "Never", SETTINGS.namespace))
    assert set(world.live().values()) == {f"key-worker-{index}-1" for index in range(3)}


def test_the_old_coordinator_stays_until_the_new_one_runs() -> None:
    world = training()
    world.change(workers={"min": 2, "max": 3})
    world.step()
    assert world.coordinators() == ["key-coordinator-1", "key-coordinator-2"]
    world.start()
    world.step()
    assert world.coordinators() == ["key-coordinator-2"]


def test_a_wrong_image_does_not_harm_those_who_train() -> None:
    world = training()
    world.change(workers={"min": 1, "max": 3, "image": "typo"})
    for _ in range(5):
        world.settle()
        world.vanish()
        world.tick(120)
        world.train(int(world.now.timestamp()))
        for name, body in world.pods.items():
            if body["status"]["phase"] == "Pending":
                world.wait_for(name, "ErrImagePull", "no such image: typo")
    assert world.status.phase is Phase.RUNNING
    assert len([name for name in world.live().values() if name.endswith("-1")]) == 2
    assert "key-coordinator-1" in world.coordinators()
    assert "no such image: typo" in condition(world, "Running")[2]


def test_a_new_coordinator_that_crashes_does_not_take_the_place_of_the_old_one() -> None:
    world = training()
    world.change(workers={"min": 1, "max": 3, "image": "broken"})
    world.settle()
    world.start("key-coordinator-2")
    status = world.pods["key-coordinator-2"]["status"]
    status["conditions"][-1] = {"type": "Ready", "status": "False"}  # it is `Running` all the same
    world.wait_for("key-coordinator-2", "CrashLoopBackOff", "back-off")
    for update in (2, 3, 4):
        learned(world, update, 60)
        assert "key-coordinator-1" in world.coordinators()
    status["conditions"][-1] = {"type": "Ready", "status": "True"}
    learned(world, 5, 60)
    assert world.coordinators() == ["key-coordinator-2"]


def test_a_template_that_crashes_at_once_does_not_reach_those_who_wait_for_it() -> None:
    world = World(workers={"min": 3, "max": 3})
    world.settle()
    world.start()
    world.train()
    world.settle()
    world.change(workers={"min": 3, "max": 3, "image": "broken"})
    for _ in range(8):
        world.settle()
        world.vanish()
        world.settle()
        world.start()
        for name in world.live().values():
            if not name.endswith("-1"):
                world.end(name, 1)
        world.tick(30)
        for name in world.live().values():
            world.say(name, 1, phase="quorum")
    assert len([name for name in world.live().values() if name.endswith("-1")]) == 2
    world.change(workers={"min": 3, "max": 3, "image": "good"})
    world.settle()
    assert len([name for name in world.live().values() if not name.endswith("-1")]) >= 1


def test_what_was_corrected_does_not_wait_for_the_back_off_of_what_was_wrong() -> None:
    world = World(restart={"maxBackOffSeconds": 3600})
    world.settle()
    for _ in range(6):
        world.start()
        world.end(world.live()[0], 1)
        world.missed_for()
    world.start()
    world.end(world.live()[0], 1)
    world.settle()
    assert not world.live()
    world.change(workers={"image": "good"})
    world.settle()
    assert world.live()


def test_workers_that_cannot_be_asked_may_train_and_a_crash_beside_them_does_not_count() -> None:
    world = training()
    for minutes, counts in ((1, True), (11, False)):
        world.tick(60 * minutes)
        world.answers.clear()
        world.end(world.live()[1], 1)
        world.settle()
        assert world.status.attempts[-1].counts is counts
        world.start()


def learned(world: World, update: int, seconds: float) -> None:
    """Those who run have done an update, and those who were deleted are gone."""
    world.tick(seconds)
    world.train(update)
    world.settle()
    world.vanish()
    world.settle()


@pytest.mark.parametrize("code", [1, 64, 128, 137])
def test_what_only_some_workers_fail_of_does_not_end_what_the_others_learn(code: int) -> None:
    world = training(4)
    world.change(workers={"min": 1, "max": 4, "image": "broken"})
    for update in range(2, 200):
        learned(world, update, seconds=10)
        for name, body in list(world.pods.items()):
            if body["status"]["phase"] == "Pending":
                world.start(name)
                if name in world.live().values():
                    world.end(name, code, words="no such file")
    assert world.status.phase is Phase.RUNNING
    assert world.status.restarts.total > 10
    assert len([name for name in world.live().values() if name.endswith("-1")]) == 3


def test_a_container_that_never_began_has_not_run_since_1970() -> None:
    world = training(3)
    for _ in range(60):
        world.tick(1)
        world.train()
        for name in list(world.live().values()):
            if world.pods[name]["status"]["phase"] == "Pending" or name == "key-worker-2-1":
                world.end(name, 128)
                (its,) = world.pods[name]["status"]["containerStatuses"]
                its["state"]["terminated"]["startedAt"] = "1970-01-01T00:00:00Z"
        world.settle()
    assert 3 < world.status.restarts.total < 10, "with a back-off"


def test_what_ends_one_worker_does_not_end_a_run_whose_others_load_or_wait_for_it() -> None:
    world = World(workers={"min": 4, "max": 4})
    world.settle()
    world.start()
    world.settle()
    world.end("key-worker-2-1", 66, words="NoProgress: update 7 failed 3 times: no GPU")
    world.settle()
    assert world.condition("Failed") is None
    assert world.status.restarts.crashed == 1, "it counts: nobody trains"
    for index in (0, 1, 3):
        world.end(f"key-worker-{index}-1", 66, words="NoProgress: update 7 failed 3 times")
        world.settle()
    assert condition(world, "Failed")[1] == "NoProgress"


def test_a_limit_ends_a_run_whose_workers_all_fail() -> None:
    world = training(2, restart={"limit": 4})
    for _ in range(60):
        world.tick(20)
        for name in list(world.live().values()):
            world.start()
            world.end(name, 1, words="no such file")
        world.settle()
        if world.status.phase is Phase.FAILED:
            break
    assert condition(world, "Failed")[1] == "RestartLimit"
    assert world.status.restarts.total < 12


def test_after_a_long_pull_the_kubelet_may_fail_for_five_minutes_and_no_more() -> None:
    world = World()
    world.settle()
    world.wait_for("key-worker-0-1", "ContainerCreating", "")
    world.tick(360)
    world.settle()
    for seconds, reason in ((0, "ErrImagePull"), (280, "ImagePullBackOff")):
        world.tick(seconds)
        world.wait_for("key-worker-0-1", reason, "connection reset by peer")
        world.settle()
        assert world.status.phase is Phase.PENDING
    world.tick(21)
    world.settle()
    assert condition(world, "Failed")[1] == "ImagePullBackOff"


def test_a_container_that_comes_before_the_workers_is_named_and_counts() -> None:
    world = World(restart={"limit": 2})
    world.settle()
    for _ in range(4):
        name = world.live().get(0)
        if name is not None:
            ended = {"exitCode": 3, "message": "no token"}
            world.pods[name]["status"] |= {
                "phase": "Failed",
                "initContainerStatuses": [{"name": "vault", "state": {"terminated": ended}}],
            }
        world.settle()
        world.tick(60)
        world.settle()
    assert "init container vault: exit code 3: no token" in condition(world, "Failed")[2]


def test_a_template_without_room_costs_no_second_worker_however_often_its_pod_is_lost() -> None:
    world = training(8)
    large = {"requests": {"memory": "900Gi"}}
    world.change(workers={"min": 1, "max": 8, "resources": large})
    for update in range(2, 40):
        learned(world, update, seconds=120)
        for name, body in list(world.pods.items()):
            if body["status"]["phase"] == "Pending":
                world.unschedulable(name, "no room")
        world.settle()
        waits = [n for n, body in world.pods.items() if body["status"]["phase"] == "Pending"]
        world.vanish(*waits)  # somebody tidies up
    assert len([name for name in world.live().values() if name.endswith("-1")]) == 7


def test_a_deadline_for_the_first_worker_does_not_end_a_run_that_had_one() -> None:
    world = training(1, pendingDeadlineSeconds=60)
    world.tick(3600)
    world.train(2)
    world.vanish("key-worker-0-1")
    world.step()
    assert world.status.phase is not Phase.FAILED
    assert world.live()[0] == "key-worker-0-2"


def test_a_pod_that_waited_long_for_a_node_may_have_a_bad_pull() -> None:
    world = World()
    world.settle()
    world.unschedulable("key-worker-0-1", "no node")
    world.tick(3600)
    world.settle()
    at = (world.now - timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": at}
    world.pods["key-worker-0-1"]["status"]["conditions"] = [scheduled]
    world.wait_for("key-worker-0-1", "ErrImagePull", "too many requests")
    world.settle()
    assert world.status.phase is Phase.PENDING


@pytest.mark.parametrize("change", [{"goal": {"episodes": 7}}, {"suspend": True}])
def test_a_pod_that_is_stuck_on_a_dead_node_keeps_nobody_waiting(change: dict[str, Any]) -> None:
    world = training(2)
    world.delete("key-worker-0-1")  # and it never goes
    world.settle()
    world.start()
    world.change(**change)
    for _ in range(5):
        world.settle()
        for name in [name for name in world.pods if name != "key-worker-0-1"]:
            if "deletionTimestamp" in world.pods[name]["metadata"]:
                world.vanish(name)
        world.tick(60)
    world.settle()
    assert "key-worker-0-1" in world.pods
    if "suspend" in change:
        assert world.status.phase is Phase.SUSPENDED
        assert not world.coordinators()
    else:
        assert set(world.live()) == {0, 1}


def test_a_template_is_rolled_though_one_worker_finds_no_node() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.settle()
    world.unschedulable("key-worker-2-2", "no node")
    relabelled(world, "worker-2", lambda name: world.unschedulable(name, "no node"))
    assert world.live() == {0: "key-worker-0-2", 1: "key-worker-1-2", 2: "key-worker-2-3"}


def relabelled(
    world: World, lacking: str, befalls: Callable[[str], object], seconds: int = 10
) -> None:
    """Labels are changed, and the kubelet starts all but one worker."""
    world.change(workers={**world.run_body["spec"]["workers"], "labels": {"team": "a"}})
    for _ in range(10):
        live = world.live()
        world.settle()
        assert len(set(live.values()) - set(world.live().values())) <= 1
        world.vanish()
        for name in world.live().values():
            if lacking in name:
                befalls(name)
            else:
                world.start(name)
        for _ in range(seconds // 10):
            world.tick(10)
            world.train(int(world.now.timestamp()))


def gated(world: World, name: str) -> None:
    """Kueue holds a pod back."""
    found = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}
    world.pods[name]["status"]["conditions"] = [found]


def test_a_template_is_rolled_though_one_worker_waits_in_a_queue() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.settle()
    gated(world, "key-worker-2-2")
    relabelled(world, "worker-2", lambda name: gated(world, name))
    assert world.live() == {0: "key-worker-0-2", 1: "key-worker-1-2", 2: "key-worker-2-3"}


def test_a_template_is_rolled_though_the_volume_of_one_worker_does_not_come() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.settle()
    relabelled(
        world, "worker-2", lambda name: world.wait_for(name, "ContainerCreating", ""), seconds=120
    )
    assert world.live() == {0: "key-worker-0-2", 1: "key-worker-1-2", 2: "key-worker-2-3"}


def test_a_template_is_rolled_though_a_quota_keeps_one_worker_out() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.refused = "403: exceeded quota"
    relabelled(world, "worker-2", lambda name: world.vanish(name))
    assert world.live()[0] == "key-worker-0-2"
    assert world.live()[1] == "key-worker-1-2"


def pending(world: World) -> list[str]:
    """Workers' pods that wait, the oldest first."""
    return [pod.name for pod in world.workers() if pod.live and pod.phase == "Pending"]


@pytest.mark.parametrize("cpus", [["999"], ["999", "500", "400"]])
def test_a_template_for_which_there_is_no_room_harms_one_worker_only(cpus: list[str]) -> None:
    world, update = training(3), 1
    for cpu in cpus:
        world.change(workers={"min": 1, "max": 3, "resources": {"requests": {"cpu": cpu}}})
        for _ in range(8):
            world.settle()
            world.vanish()
            for name in pending(world):
                world.unschedulable(name, "insufficient cpu")
            world.tick(100)
            update += 1
            world.train(update)
    live = {0: "key-worker-0-1", 1: "key-worker-1-1", 2: f"key-worker-2-{1 + len(cpus)}"}
    assert world.live() == live


def test_a_template_is_rolled_though_the_room_goes_to_another() -> None:
    """Room for two of three: a worker that had none takes that of the one that is replaced."""
    world = World(workers={"min": 1, "max": 3})
    world.settle()
    for update in range(1, 40):
        if update == 4:
            world.change(workers={"min": 1, "max": 3, "labels": {"team": "a"}})
        world.settle()
        world.vanish()
        world.start(*world.coordinators())
        for name in pending(world):
            room = sum(pod.phase == "Running" for pod in world.workers()) < 2
            if room:
                world.start(name)
            else:
                world.unschedulable(name, "insufficient cpu")
        world.tick(10)
        world.train(update)
        assert len(pending(world)) == 1, "one at a time"
    wanted = pods.wanted(world.run, SETTINGS).worker
    assert {pod.hash for pod in world.workers() if pod.live} == {wanted}


def test_a_worker_that_was_lost_meanwhile_is_waited_for() -> None:
    world = training(3)
    world.vanish("key-worker-0-1")
    world.settle()
    world.change(workers={"min": 1, "max": 3, "labels": {"team": "a"}})
    world.settle()
    assert world.live() == {0: "key-worker-0-3", 1: "key-worker-1-1", 2: "key-worker-2-1"}
    world.wait_for("key-worker-0-3", "ContainerCreating", "")
    world.settle()
    world.start()
    world.settle()
    assert world.live() == {0: "key-worker-0-3", 1: "key-worker-1-1", 2: "key-worker-2-1"}


def loading(world: World, seconds: int = 60) -> None:
    """All workers answer, and load for ever."""
    for _ in range(seconds // 10):
        world.tick(10)
        for name in world.live().values():
            world.say(name, None)
        world.settle()


def test_a_template_with_which_nobody_trains_is_corrected_at_once() -> None:
    world = World(workers={"min": 1, "max": 3, "image": "broken"})
    world.settle()
    world.start()
    loading(world)
    world.change(workers={"min": 1, "max": 3, "image": "right"})
    world.settle()
    assert world.live() == {index: f"key-worker-{index}-2" for index in range(3)}
    assert world.status.restarts.total == 0


def test_a_group_that_stands_still_takes_another_template_at_once() -> None:
    world = training(3)
    for _ in range(20):
        world.tick(20)
        world.train(1, phase="confirm")  # not a hang, and then it is
        world.settle()
    for _ in range(7):
        world.tick(20)
        world.train(1)
    assert world.observe().training(world.now) == set()
    world.change(workers={"min": 1, "max": 3, "image": "right"})
    world.settle()
    assert {name[-1] for name in world.live().values()} == {"2"}


def test_a_rollout_that_does_not_get_on_is_corrected_while_the_others_train() -> None:
    world = training(3)
    world.change(workers={"min": 1, "max": 3, "image": "broken"})
    world.settle()
    world.vanish()
    world.start()
    for update in range(2, 12):
        world.tick(10)
        world.say("key-worker-0-1", update)
        world.say("key-worker-1-1", update)
        world.say("key-worker-2-2", None)
        world.settle()
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-2"}
    world.change(workers={"min": 1, "max": 3, "image": "right"})
    world.settle()
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-3"}


def test_those_who_wait_for_the_first_of_another_template_keep_what_they_have_learned() -> None:
    world = training(3)
    world.change(workers={"min": 3, "max": 3, "image": "next"})
    world.settle()
    world.vanish()
    for _ in range(30):
        world.tick(10)
        for name in ("key-worker-0-1", "key-worker-1-1"):
            world.say(name, 1, phase="quorum")
        world.wait_for("key-worker-2-2", "ContainerCreating", "")
        world.settle()
    assert world.status.phase is Phase.PENDING
    world.start()
    for _ in range(6):
        world.tick(10)
        for name in ("key-worker-0-1", "key-worker-1-1"):
            world.say(name, 1, phase="quorum")
        world.say("key-worker-2-2", None)
        world.settle()
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-2"}


def test_a_second_wrong_image_harms_nobody_else() -> None:
    world = training(3)
    for image in ("typo", "another-typo"):
        world.change(workers={"min": 1, "max": 3, "image": image})
        for _ in range(10):
            world.settle()
            world.vanish()
            for name, body in world.pods.items():
                if body["status"]["phase"] == "Pending":
                    world.wait_for(name, "ImagePullBackOff", f"no such image: {image}")
            world.tick(100)
            world.train(int(world.now.timestamp()))
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-1", 2: "key-worker-2-3"}


def test_who_is_not_heard_any_more_is_not_taken_for_idle() -> None:
    world = training(3)
    world.tick(3600)  # the operator slept, or the network between them did
    world.missed = dict.fromkeys(world.pods, 100)
    world.change(workers={"min": 1, "max": 3, "labels": {"team": "a"}})
    world.settle()
    assert world.live() == {index: f"key-worker-{index}-1" for index in range(3)}


@pytest.mark.parametrize(("code", "phase"), [(0, Phase.RUNNING), (2, Phase.RUNNING)])
def test_what_workers_with_an_earlier_goal_end_with_says_nothing_of_this_one(
    code: int, phase: Phase
) -> None:
    world = training(2)
    world.change(goal={"successRate": 0.99}, budget={"frames": 10**9})
    world.end("key-worker-0-1", code)
    world.settle()
    assert world.status.phase is not Phase.COMPLETE
    assert world.status.phase is not Phase.FAILED
    assert world.status.attempts[-1].cause is Cause.REPLACED
    world.vanish()
    world.settle()
    world.start()
    world.train(9)
    world.settle()
    assert world.status.phase is phase


def test_what_the_api_server_refuses_is_told() -> None:
    world = World()
    world.refused = "403: pods is forbidden: exceeded quota"
    world.step()
    assert condition(world, "Running") == (
        "False",
        "Refused",
        "403: pods is forbidden: exceeded quota",
    )
    world = training(2)
    world.refused = "403: exceeded quota"
    world.vanish("key-worker-1-1")
    world.decide()
    world.step()
    status, reason, message = condition(world, "Running")
    assert (status, reason) == ("True", "Training")
    assert "exceeded quota" in message


def test_a_coordinator_that_cannot_start_is_named() -> None:
    world = World()
    world.settle()
    world.wait_for("key-coordinator-1", "ImagePullBackOff", "no such image")
    world.settle()
    assert "coordinator: ImagePullBackOff: no such image" in condition(world, "Running")[2]


def outage(world: World) -> None:
    """All pods are lost, and no image can be had for ten minutes."""
    world.vanish(*world.names("worker"))
    for _ in range(60):
        world.settle()
        for name in world.live().values():
            world.wait_for(name, "ImagePullBackOff", "the registry is away")
        world.tick(10)
    world.settle()


@pytest.mark.parametrize("resumed", [False, True])
def test_an_outage_of_the_registry_does_not_end_a_run_that_has_trained(resumed: bool) -> None:
    world = training(2)
    if resumed:
        world.change(suspend=True)
        world.settle()
        world.vanish()
        world.settle()
        world.change(suspend=False)
        world.settle()
    outage(world)
    assert world.status.phase is not Phase.FAILED
    assert condition(world, "Running") == (
        "False",
        "ImagePullBackOff",
        "worker 0, worker 1: ImagePullBackOff: the registry is away",
    )
    names = set(world.live().values())
    world.change(workers={"min": 1, "max": 2, "image": "another-registry/trainer"})
    world.settle()
    assert not names & set(world.live().values())
    world.start()
    world.train(9)
    world.settle()
    assert world.status.phase is Phase.RUNNING


def test_an_operator_that_has_asked_nobody_yet_ends_no_run() -> None:
    world = training(3)
    world.pods["key-worker-2-1"]["status"]["phase"] = "Pending"
    world.wait_for("key-worker-2-1", "ImagePullBackOff", "no such image")
    world.tick(3600)
    world.answers.clear()
    world.settle()
    assert world.status.phase is Phase.RUNNING


def test_workers_that_never_answer_do_not_count_as_training_for_ever() -> None:
    world = training(2)
    world.answers.clear()
    world.missed = dict.fromkeys(world.pods, 100)
    world.settle()
    assert world.status.phase is Phase.PENDING


def test_workers_that_the_kubelet_reaches_and_the_operator_does_not_are_named() -> None:
    world = training(2)
    world.answers.clear()
    world.missed = dict.fromkeys(world.pods, 100)
    for body in world.pods.values():
        body["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    world.settle()
    told = "worker 0, worker 1: ready, but the operator cannot reach port 9400"
    assert condition(world, "Running") == ("False", "Unreachable", told)
    explained = why(world.run, world.now)
    assert explained.startswith("key is not heard of; the start stands at frame ")
    assert "They may train meanwhile." in explained


def test_a_long_confirmation_is_no_standstill() -> None:
    world = training(2)
    for _ in range(20):
        world.tick(20)
        world.train(1, phase="confirm")
        world.settle()
    assert world.status.phase is Phase.RUNNING


def test_a_volume_that_is_in_use_is_there() -> None:
    world = training(1)
    kept = {"update": 7, "ageSeconds": 3.0, "bytes": 9, "error": None}
    world.train(8, checkpoint=kept)
    for body in world.pods.values():
        body["spec"]["nodeName"] = "node1"
    world.settle()
    del world.children["PersistentVolumeClaim", "key-data"]
    world.step()
    assert world.status.phase is Phase.RUNNING


def test_pending_pods_that_the_operator_replaces_are_no_losses() -> None:
    world = World(workers={"min": 1, "max": 3})
    world.settle()
    world.change(workers={"min": 1, "max": 3, "nodeSelector": {"disk": "fast"}})
    for _ in range(4):
        world.settle()
    assert world.status.restarts.total == 0
    assert set(world.live()) == {0, 1, 2}


def test_a_run_does_not_begin_anew_in_silence_when_its_volume_is_gone() -> None:
    world = training(1)
    world.answers.clear()
    kept = {"update": 7, "ageSeconds": 3.0, "bytes": 9, "error": None}
    world.train(8, checkpoint=kept)
    world.settle()
    world.change(suspend=True)
    world.settle()
    world.vanish()
    world.settle()
    del world.children["PersistentVolumeClaim", "key-data"]
    world.change(suspend=False)
    world.settle()
    status, reason, message = condition(world, "Failed")
    assert (status, reason) == ("True", "VolumeLost")
    assert "key-data is gone" in message


def test_workers_that_answer_and_stand_still_do_not_count_as_training() -> None:
    world = training(2)
    for _ in range(20):
        world.tick(20)
        world.train(1)
        world.settle()
    status, reason, _ = condition(world, "Running")
    assert (status, reason) == ("False", "NoUpdates")


def test_long_words_of_kubernetes_are_cut() -> None:
    world = training(1, restart={"limit": 0})
    world.pods["key-worker-0-1"]["status"] |= {"reason": "Evicted", "message": "x" * 5000}
    world.end("key-worker-0-1", 137)
    world.settle()
    assert len(world.status.attempts[-1].message) <= 1024
    world.wait_for("key-worker-0-2", "CreateContainerError", "y" * 5000)
    world.settle()
    assert "yyy" in condition(world, "Running")[2]


def test_a_smaller_and_then_larger_group_uses_no_name_twice() -> None:
    world = training(3)
    for count in (1, 3):
        world.change(workers={"min": 1, "max": count})
        world.settle()
        world.vanish()
        world.settle()
    assert world.live()[2] == "key-worker-2-2"
    assert world.status.restarts.total == 0


def test_evictions_in_a_row_wait_too() -> None:
    world = training(1)
    waits = []
    for number in range(1, 5):
        world.pods[f"key-worker-0-{number}"]["status"]["reason"] = "OutOfcpu"
        world.pods[f"key-worker-0-{number}"]["status"].pop("containerStatuses", None)
        world.pods[f"key-worker-0-{number}"]["status"]["phase"] = "Failed"
        waits.append(world.missed_for())
    assert waits == [0, 1, 2, 4]
    assert world.status.restarts.counted == 0


def test_the_ledger_keeps_the_latest() -> None:
    world = training(1, restart={"limit": 1000, "backOffSeconds": 0})
    for number in range(1, 30):
        world.end(f"key-worker-0-{number}", 1)
        world.settle()
        world.start()
    kept: list[Attempt] = world.status.attempts
    assert [one.attempt for one in kept] == list(range(10, 30))
    assert world.status.restarts.total == 29
