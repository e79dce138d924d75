"""Whatever befalls a run and its operator, in whatever order: no duplicate, no orphan, no lie.

The operator is the real one, but for kopf and HTTP. Its watches tell late, each kind by itself; its
requests are refused, or their answers lost; it dies between any two of them, with all that it knew.
Others write to what it writes to, delete what it has made, and apply the run anew. The server (see
`apiserver`) takes no change of a pod, and no pod that is on record as ended.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apiserver import Server, key
from demoreset_api.names import KIND
from demoreset_api.status import Cause, Phase, RunStatus
from demoreset_operator import controller as controllers
from demoreset_operator import pods, render
from demoreset_operator.api import ApiError
from demoreset_operator.cache import Cache
from demoreset_operator.controller import Controller, Queue
from demoreset_operator.metrics import Metrics
from demoreset_operator.watch import CHILDREN, OURS, Watch
from demoreset_operator.worker_status import WorkerStatus
from world import BEGIN, SETTINGS, Crash, World, stamp, worker_status

CODES = st.sampled_from([1, 137, 139, 143, 75])
KINDS = (KIND, *CHILDREN)
FATES = ["", "", "", "die", "refused", "answer lost", "somebody writes", "all is heard"]
METRICS = Metrics()


class Operator:
    """One process of it: what it knows dies with it."""

    def __init__(self, server: Any, clock: Callable[[], float]) -> None:
        self.server, self.clock = server, clock
        self.cache = Cache(clock)
        self.controller = Controller(server, self.cache, SETTINGS, METRICS)
        self.queue = self.controller.queue = Queue(clock)
        self.watch = Watch(server, self.cache, self.controller.wake, [], "games", lambda: None)
        self.heard = dict.fromkeys(KINDS, len(server.log))  # how far each kind's watch has told

    async def look(self, uid: str) -> None:
        try:
            await self.controller.reconcile(uid)
        except ApiError as error:
            self.controller._failed(uid, error)

    async def rest(self) -> None:
        """All is heard, and all that is due is done."""
        for _ in range(50):
            await self.hear_all()
            if not any(due <= self.clock() for due in self.queue._due.values()):
                return
            await self.look(await self.queue.get())
        raise AssertionError("the operator does not come to rest")

    async def hear(self, kind: str, most: int) -> None:
        """A watch tells of so many changes, the oldest first."""
        while most and self.heard[kind] < len(self.server.log):
            change, body = self.server.log[self.heard[kind]]
            self.heard[kind] += 1
            if body["kind"] == kind:
                most -= 1
                await self._tell(change, body)

    async def hear_all(self) -> None:
        for kind in KINDS:
            await self.hear(kind, len(self.server.log))

    async def begin_watch(self, kind: str) -> None:
        """A watch was cut off for too long: it tells what is there, and not what went."""
        self.heard[kind] = len(self.server.log)
        for body in self.server.found(kind, "", OURS if kind != KIND else ""):
            await self._tell(None, body)

    async def _tell(self, change: str | None, body: Any) -> None:
        event = {"type": change, "object": body}
        if body["kind"] == KIND:
            await self.watch._on_run(event)
        else:
            await self.watch._on_child(event, param=body["kind"])

    def ask(self, world: World, update: int) -> None:
        """Those whom it believes to run tell of an update, if they do."""
        for uid in self.cache.runs:
            for pod in self.cache.pods(uid):
                if pod.worker is None or not pod.live or pod.phase != "Running":
                    continue
                truth = world.pods.get(pod.name)
                if truth is not None and truth["status"]["phase"] == "Running":
                    status = WorkerStatus.model_validate(worker_status(update, 3))
                    self.cache.answered(uid, pod.name, status, world.now, timedelta(seconds=30))
                else:
                    self.cache.missed(uid, pod.name)
            self.controller.wake(uid)


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        limits = dict.fromkeys(("limit", "outOfMemoryLimit", "hangLimit"), 10_000)
        self.world = World(workers={"min": 1, "max": 3}, restart=limits)
        self.server = Server(self.world)
        self.server.befalls = {"somebody writes": self._note, "all is heard": self._hear_all}
        self.alive: Operator | None = None
        self.crashes = 0
        self.update = 1
        self.before = self.world.status
        self.runs = 1
        self.loop = asyncio.Runner()
        self.times = mock.patch.multiple(
            controllers,
            datetime=SimpleNamespace(now=lambda _zone: self.world.now),
            time=SimpleNamespace(monotonic=self._clock, time_ns=time.time_ns),
        )
        self.times.start()

    def _clock(self) -> float:
        return (self.world.now - BEGIN).total_seconds()

    async def _note(self) -> None:
        self.world.run_body["metadata"]["annotations"] = {"note": str(self.server.version)}
        self.server.notice()

    async def _hear_all(self) -> None:
        await self._operator().hear_all()

    def _operator(self) -> Operator:
        """One that lives: where it has died, the next one, which has listed everything."""
        if self.alive is None:
            self.server.dead = False
            self.alive = Operator(self.server, self._clock)
            self.loop.run(self.alive.watch.fill())
        return self.alive

    @initialize(begun=st.booleans())
    def begin(self, begun: bool) -> None:
        if begun:
            self.all_goes_well()

    @rule()
    def all_goes_well(self) -> None:
        """The operator keeps up, pods come and go, workers train."""
        for _ in range(2):
            self._rest(self._operator())
            self.kubelet()
            self.server.notice()
        self.train()
        self._rest(self._operator())

    # The operator

    @rule(fate=st.lists(st.sampled_from(FATES), max_size=8))
    def look(self, fate: list[str]) -> None:
        operator = self._operator()
        self.server.fate = iter(fate)
        for uid in list(operator.cache.runs):
            try:
                self.loop.run(operator.look(uid))
            except Crash:
                break
        self.server.fate = iter(())
        if self.server.dead:
            self.alive = None

    @rule()
    def die(self) -> None:
        self.alive = None

    @rule(kind=st.sampled_from(KINDS), most=st.sampled_from([1, 2, 1000]))
    def hear(self, kind: str, most: int) -> None:
        self.loop.run(self._operator().hear(kind, most))

    @rule(kind=st.sampled_from(KINDS))
    def begin_watch(self, kind: str) -> None:
        self.loop.run(self._operator().begin_watch(kind))

    @rule()
    def list_all(self) -> None:
        self.loop.run(self._operator().watch.fill())

    @rule()
    def train(self) -> None:
        self.update += 1
        self._operator().ask(self.world, self.update)

    @rule()
    def stand_still(self) -> None:
        """Workers answer, and do no update, for longer than anybody waits."""
        for _ in range(40):
            self._operator().ask(self.world, self.update)
            self.world.tick(20)

    # What befalls it

    @rule(seconds=st.sampled_from([1, 7, 61, 400]))
    def wait(self, seconds: int) -> None:
        self.world.tick(seconds)

    @rule()
    def kubelet(self) -> None:
        self.server.collect()
        self.world.start()
        self.server.notice()
        self.world.vanish()

    @precondition(lambda self: self._running())
    @rule(data=st.data(), code=CODES)
    def crash(self, data: st.DataObject, code: int) -> None:
        self.world.end(data.draw(st.sampled_from(self._running())), code)
        self.crashes += 1

    def _running(self) -> list[str]:
        return [pod.name for pod in self.world.workers() if pod.phase == "Running"]

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data(), how=st.sampled_from(["delete", "vanish", "evict"]))
    def lose(self, data: st.DataObject, how: str) -> None:
        getattr(self.world, how)(data.draw(st.sampled_from(sorted(self.world.pods))))

    @precondition(lambda self: self.world.children)
    @rule(data=st.data())
    def lose_another_object(self, data: st.DataObject) -> None:
        del self.world.children[data.draw(st.sampled_from(sorted(self.world.children)))]

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

    @precondition(lambda self: self.runs < 3)
    @rule()
    def apply_anew(self) -> None:
        """The run is deleted, and another one of its name is there at once."""
        self.runs += 1
        meta = {
            "uid": f"u-{self.runs}",
            "generation": 1,
            "creationTimestamp": stamp(self.world.now),
        }
        self.world.run_body = {
            **self.world.run_body,
            "metadata": {**self.world.run_body["metadata"], **meta},
            "status": {},
        }
        self.world.recorded.clear()
        self.before = self.world.status

    # What holds at any time

    @invariant()
    def all_changes_have_a_version(self) -> None:
        self.server.notice()

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

    @invariant()
    def nothing_that_is_counted_goes_back(self) -> None:
        before, self.before = _counted(self.before), self.world.status
        after = _counted(self.before)
        assert all(after.get(what, 0) >= count for what, count in before.items())

    def teardown(self) -> None:
        try:
            self._left_alone_it_becomes_what_its_spec_says()
            self._deleted_it_leaves_its_volume_alone()
        finally:
            self.times.stop()
            self.loop.close()

    def _left_alone_it_becomes_what_its_spec_says(self) -> None:
        world, operator = self.world, self._operator()
        quiet = 0
        for _ in range(30):
            asked = len(self.server.requests)
            self.loop.run(operator.watch.fill())
            self._rest(operator)
            self.server.collect()
            world.vanish()
            world.start()
            for seconds in (301, 6):
                self._rest(operator)
                self.update += 1
                operator.ask(world, self.update)
                world.tick(seconds)
            done = self.server.requests[asked:]
            verbs = {verb for verb, kind in done if kind not in (KIND, "Event")}
            quiet = quiet + 1 if verbs <= {"list"} else 0
            if quiet == 2:
                break
        self._rest(operator)
        asked = len(self.server.requests)
        self.look([])
        assert len(self.server.requests) == asked, "there is nothing left to do"
        if world.run.spec.suspend:
            assert not world.live()
            assert not world.coordinators()
            assert world.status.phase is Phase.SUSPENDED
            return
        assert set(world.live()) == set(range(world.run.spec.workers.max))
        assert world.status.phase is Phase.RUNNING
        assert len(world.coordinators()) == 1
        ended = {place.worker: place.ended for place in world.status.places}
        assert all(pod.attempt > ended.get(pod.index, 0) for pod in world.workers() if pod.live)
        wanted = pods.wanted(world.run, SETTINGS)
        assert {pod.hash for pod in world.workers() if pod.live} == {wanted.worker}
        right = {key(body)[::2] for body in render.children(world.run, SETTINGS)}
        assert set(world.children) == right

    def _deleted_it_leaves_its_volume_alone(self) -> None:
        world, operator = self.world, self._operator()
        self.loop.run(operator.watch.fill())
        world.deleted = True
        world.tick(301)
        self.server.notice()
        self.look([])  # it has not heard of it
        for _ in range(2):
            self.server.collect()
            world.vanish()
        self._rest(operator)
        left = self.server.objects()
        assert {kind for kind, _, _ in left} <= {"PersistentVolumeClaim"}, "it is retained"
        assert operator.cache.identities() == {body["metadata"]["uid"] for body in left.values()}
        assert not operator.queue

    def _rest(self, operator: Operator) -> None:
        self.server.notice()
        self.loop.run(operator.rest())


def _counted(status: RunStatus) -> dict[object, int]:
    """What only grows, by its name."""
    found: dict[object, int] = {
        "all": status.restarts.total,
        "counted": status.restarts.counted,
        "generation": status.observed_generation,
    }
    for place in status.places:
        found |= {(place.worker, "attempt"): place.attempt, (place.worker, "ended"): place.ended}
    return found


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
