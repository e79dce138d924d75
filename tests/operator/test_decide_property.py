"""Whatever befalls a run and its operator, in whatever order: no duplicate, no orphan, no lie."""

from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from demoreset_api.status import Cause, Phase
from world import Crash, World

CODES = st.sampled_from([1, 137, 139, 143, 75])


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(workers={"min": 1, "max": 3}, restart={"limit": 10_000})
        self.crashes = 0
        self.update = 1

    @rule()
    def look(self) -> None:
        self.world.step()

    @rule(requests=st.integers(0, 6))
    def look_and_die(self, requests: int) -> None:
        with suppress(Crash):
            self.world.step(crash_after=requests)

    @rule(seconds=st.sampled_from([1, 7, 61, 400]))
    def wait(self, seconds: int) -> None:
        self.world.tick(seconds)

    @rule()
    def kubelet(self) -> None:
        self.world.start()
        self.world.vanish()

    @rule()
    def train(self) -> None:
        self.update += 1
        self.world.train(self.update)

    @rule()
    def stand_still(self) -> None:
        self.world.train(self.update)
        self.world.tick(130)
        self.world.train(self.update)

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data(), code=CODES)
    def crash(self, data: st.DataObject, code: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.pods)))
        if self.world.pods[name]["status"]["phase"] == "Running" and "worker" in name:
            self.world.end(name, code)
            self.crashes += 1

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data(), how=st.sampled_from(["delete", "vanish", "evict"]))
    def lose(self, data: st.DataObject, how: str) -> None:
        getattr(self.world, how)(data.draw(st.sampled_from(sorted(self.world.pods))))

    @rule(count=st.integers(1, 4))
    def scale(self, count: int) -> None:
        workers = {**self.world.run_body["spec"]["workers"], "max": count}
        self.world.change(workers=workers)

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        self.world.change(suspend=suspend)

    @rule(team=st.sampled_from("ab"))
    def relabel(self, team: str) -> None:
        workers = {**self.world.run_body["spec"]["workers"], "labels": {"team": team}}
        self.world.change(workers=workers)

    @rule(rate=st.sampled_from([0.5, 0.9]))
    def another_goal(self, rate: float) -> None:
        self.world.change(goal={"successRate": rate})

    @invariant()
    def one_pod_of_a_worker(self) -> None:
        live = [pod.worker for pod in self.world.workers() if pod.live]
        assert len(live) == len(set(live))
        assert len(self.world.coordinators()) <= 2, "the old one stays until the new one runs"

    @invariant()
    def each_end_is_recorded_once(self) -> None:
        ends = [(one.worker, one.attempt) for one in self.world.recorded]
        assert len(ends) == len(set(ends))
        lost = [one for one in self.world.recorded if one.cause is not Cause.REPLACED]
        assert self.world.status.restarts.total == len(lost)

    @invariant()
    def only_crashes_and_hangs_count(self) -> None:
        hung = [one for one in self.world.recorded if one.cause is Cause.HUNG]
        assert self.world.status.restarts.counted <= self.crashes + len(hung)

    def teardown(self) -> None:
        """Left alone it becomes what its spec says."""
        world = self.world
        for _ in range(30):
            world.settle()
            world.vanish()
            world.start()
            self.update += 1
            world.train(self.update)
            world.tick(301)
            self.update += 1
            world.train(self.update)
        world.settle()
        if world.run.spec.suspend:
            assert not world.live()
            assert world.status.phase is Phase.SUSPENDED
        else:
            assert set(world.live()) == set(range(world.run.spec.workers.max))
            assert world.status.phase is Phase.RUNNING
            assert len(world.coordinators()) == 1
            assert len([1 for kind, _ in world.children if kind == "ConfigMap"]) == 1


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
