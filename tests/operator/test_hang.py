"""A group that stands still though its workers answer: who is replaced, when, and who is not."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from demoreset_api.status import Cause, ConditionType, Phase
from demoreset_operator import story
from world import World, training, worker_status

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


def test_the_one_furthest_behind_goes_first_and_who_waits_for_others_last() -> None:
    world = training(3)
    for _ in range(STAND // 5):
        world.tick(5)
        world.say("key-worker-0-1", 4)
        world.say("key-worker-1-1", 5)
        world.say("key-worker-2-1", 3, phase="quorum")
        world.settle()
    assert [one.pod for one in world.recorded] == ["key-worker-0-1"]


def test_one_that_sits_out_is_told_of_and_not_replaced() -> None:
    world = training(3)
    for update in range(2, 400):
        world.tick(5)
        world.say("key-worker-0-1", update)
        world.say("key-worker-1-1", update)
        back = update % 60 == 0  # for a moment: it tries again
        world.say("key-worker-2-1", 1, phase="quorum" if back else "aside")
        world.settle()
    assert world.recorded == []
    assert world.status.workers.ready == 2
    running = story.find(world.status, ConditionType.RUNNING)
    assert running is not None
    assert "2 of 3 workers train; worker 2 on " in running.message
    assert "sits out" in running.message


def test_one_that_is_frozen_is_named_before_it_is_replaced() -> None:
    world = training(3)
    told = set()
    for update in range(2, 60):
        world.tick(5)
        world.say("key-worker-0-1", update)
        world.say("key-worker-1-1", update)
        world.say("key-worker-2-1", 1)
        world.settle()
        running = story.find(world.status, ConditionType.RUNNING)
        assert running is not None
        told.add(running.message)
        if world.recorded:
            break
    assert "2 of 3 workers train; worker 2: no update for a while" in told


def test_who_waits_for_one_that_sits_out_is_not_replaced() -> None:
    world = training(2)
    world.change(workers={"min": 2, "max": 2})
    for _ in range(STAND):
        world.tick(5)
        world.say("key-worker-0-1", 1, phase="quorum")
        world.say("key-worker-1-1", 1, phase="aside")
        world.settle()
    assert world.recorded == []
    running = story.find(world.status, ConditionType.RUNNING)
    assert running is not None
    assert "worker 1 on " in running.message
    assert running.message.endswith("sits out: the network to the others is too slow")


def test_the_others_are_not_spared_by_one_that_sits_out() -> None:
    world = training(3)
    for _ in range(STAND // 5):
        world.tick(5)
        world.say("key-worker-0-1", 1)
        world.say("key-worker-1-1", 1)
        world.say("key-worker-2-1", 1, phase="aside")
        world.settle()
    assert [one.pod for one in world.recorded] == ["key-worker-1-1"]


def test_one_that_sits_out_goes_first_where_another_template_may_help() -> None:
    world = training(3)

    def say(*names: str, aside: str) -> None:
        for update in range(2, 20):
            world.tick(5)
            for name in names:
                world.say(name, update)
            world.say(aside, 1, phase="aside")
            world.settle()
            world.vanish()
            world.start()

    say("key-worker-0-1", "key-worker-2-1", aside="key-worker-1-1")
    world.change(workers={"min": 1, "max": 3, "image": "next"})
    world.settle()
    world.vanish()
    world.start()
    assert world.live()[1] == "key-worker-1-2"
    # The new one sits out as well: the others, which train, are left as they are.
    say("key-worker-0-1", "key-worker-2-1", aside="key-worker-1-2")
    assert world.live() == {0: "key-worker-0-1", 1: "key-worker-1-2", 2: "key-worker-2-1"}


def test_a_crash_between_record_and_deletion_replaces_it_once() -> None:
    world = training(2)
    for _ in range(STAND // 5):
        world.tick(5)
        world.train(1)
        if world.decide().delete_pods:
            break
        world.settle()
    plan = world.decide()
    assert plan.status is not None
    world.write(plan.status)  # and the operator dies
    world.answers.clear()
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
    world = training(3)
    stand(world)
    assert len(world.recorded) == 1
    for _ in range(100):  # its pod takes its time to go, then its successor to load
        world.tick(5)
        for name in ("key-worker-0-1", "key-worker-1-1"):
            world.say(name, 1, phase="quorum")
        world.settle()
    world.vanish()
    world.start()
    for _ in range(100):
        world.tick(5)
        for name in ("key-worker-0-1", "key-worker-1-1"):
            world.say(name, 1, phase="quorum")
        world.say("key-worker-2-2", None)
        world.settle()
    assert len(world.recorded) == 1
    stand(world)  # it is in the group, and nothing moves
    assert len(world.recorded) == 2


def test_one_that_does_not_get_in_while_the_others_train_is_replaced_in_the_end() -> None:
    world = training(2)
    for update in range(2, 110):
        world.tick(5)
        world.say("key-worker-0-1", update)
        world.say("key-worker-1-1", 1)
        world.settle()
    assert world.recorded == []
    for update in range(110, 130):
        world.tick(5)
        world.say("key-worker-0-1", update)
        world.say("key-worker-1-1", 1)
        world.settle()
    assert [one.pod for one in world.recorded] == ["key-worker-1-1"]


# What was waited for is there at last: the time begins anew


def test_one_that_waited_for_enough_others_is_not_replaced_when_they_come() -> None:
    world = World(workers={"min": 2, "max": 2})
    world.settle()
    world.start()
    world.train(5)
    world.vanish("key-worker-1-1")
    world.settle()
    world.unschedulable("key-worker-1-2", "no room")
    for _ in range(120):
        world.tick(5)
        world.say("key-worker-0-1", 5, phase="quorum")
        world.settle()
    world.pods["key-worker-1-2"]["status"]["conditions"] = []
    world.start("key-worker-1-2")
    for _ in range(60):
        world.tick(5)
        world.say("key-worker-0-1", 5, phase="quorum")
        world.say("key-worker-1-2", None)
        world.settle()
    assert causes(world) == [Cause.DELETED]


def test_nobody_is_replaced_when_the_coordinator_comes_back() -> None:
    world = training(3)
    world.vanish(*world.coordinators())
    world.settle()
    stand(world, phase="quorum")
    world.start()
    stand(world, 100, phase="quorum")
    assert world.recorded == []


def test_a_coordinator_that_crashes_again_and_again_costs_no_worker() -> None:
    world = training(3)
    (name,) = world.coordinators()
    world.wait_for(name, "CrashLoopBackOff", "back-off 5m0s")
    stand(world, 600, phase="quorum")
    assert world.recorded == []


def test_a_machine_that_slept_with_all_of_it_loses_nobody() -> None:
    world = training(2)
    world.tick(3600)
    stand(world, 100)
    assert world.recorded == []


def test_who_has_played_its_share_of_a_confirmation_waits_for_the_others() -> None:
    world = World(workers={"min": 2, "max": 2})
    world.settle()
    world.start()
    world.train(5)
    for _ in range(120):
        world.tick(5)
        world.say("key-worker-0-1", 5, phase="confirm")
        world.say("key-worker-1-1", 5, phase="quorum")
        world.settle()
    assert world.recorded == []


def test_a_change_of_what_is_learned_blames_nobody() -> None:
    world = training(2)
    for _ in range(STAND // 5):
        world.tick(5)
        world.train(1)
    world.change(ppo={"learningRate": 1e-4})
    world.settle()
    assert Cause.HUNG not in causes(world)


def test_an_image_that_cannot_be_had_does_not_end_a_group_that_stands_still() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.settle()
    world.wait_for("key-worker-2-2", "ImagePullBackOff", "no such image")
    for update in range(2, 80):
        world.tick(5)
        world.train(update)
        world.settle()
    stand(world, update=79)
    assert world.status.phase is not Phase.FAILED
    assert causes(world) == [Cause.DELETED, Cause.HUNG]


def test_a_run_that_hangs_for_ever_ends() -> None:
    world = training(1, restart={"hangLimit": 2, "backOffSeconds": 0})
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


# With many workers each is asked seldom: 4,000 of them every 160 s


def answer(world: World, update: int, **more: object) -> None:
    """All workers are asked, and nobody asks them again for 160 s."""
    for name in world.live().values():
        world.answer(name, worker_status(update, 3, **more), timedelta(seconds=495))


def pass_by(world: World, seconds: int = 160) -> None:
    """Time between two questions; the run is looked at meanwhile."""
    for _ in range(seconds // 20):
        world.tick(20)
        world.settle()
        assert world.status.phase is Phase.RUNNING


def test_workers_that_are_asked_seldom_train_between_two_questions() -> None:
    world = training(3)
    for update in range(100, 1100, 100):
        answer(world, update)
        pass_by(world)
    assert world.recorded == []


def test_what_is_not_seen_between_two_questions_is_no_hang() -> None:
    world = training(3)
    for phase in ("rollout", "confirm", "rollout", "optimise"):
        answer(world, 100, phase=phase)
        pass_by(world)
    assert world.recorded == []


def test_workers_that_are_asked_seldom_and_stand_still_are_found() -> None:
    world = training(3)
    for _ in range(6):
        answer(world, 100)
        world.tick(160)
        world.settle()
    assert causes(world) == [Cause.HUNG]


def test_who_does_not_answer_has_not_shown_that_it_stands_still() -> None:
    world = training(2)
    stand(world, 110)
    world.tick(25)  # its words still hold
    world.settle()
    assert world.status.phase is Phase.RUNNING
    world.tick(10)  # and now they do not
    world.settle()
    assert world.condition("Running") == (
        "False",
        "NoUpdates",
        "workers answer, and have done no update for a while",
    )
    assert world.recorded == []


def test_who_loads_is_judged_by_its_answers_too() -> None:
    world = World()
    world.settle()
    world.start()
    for _ in range(596 // 4):
        world.tick(4)
        world.say("key-worker-0-1", None)
        world.settle()
    world.tick(25)  # its words still hold
    world.settle()
    assert world.recorded == []
    world.say("key-worker-0-1", None)
    world.settle()
    assert causes(world) == [Cause.HUNG]


def test_one_that_its_node_cannot_start_is_not_waited_for_for_ever() -> None:
    world = training(3)
    world.vanish("key-worker-2-1")
    world.settle()
    world.wait_for("key-worker-2-2", "ContainerCreating", "")  # another node has its volume
    for _ in range(120):
        world.tick(15)
        for name in ("key-worker-0-1", "key-worker-1-1"):
            world.say(name, 7)
        world.settle()
    assert any(one.cause is Cause.HUNG for one in world.recorded)
