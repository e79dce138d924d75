"""A world for the operator's decisions: an API server's objects, and what befalls them.

Objects go through the same rendering and parsing as in a cluster. A kubelet starts pods and ends
them when told to; a deleted pod stays until it is let go.
"""

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

from demoreset_api.errors import ExitCode
from demoreset_api.names import (
    API_VERSION,
    KIND,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_RUN_UID,
    LABEL_WORKER,
)
from demoreset_api.status import Attempt, RunStatus
from demoreset_operator.decide import Event, Plan, decide
from demoreset_operator.observation import (
    Observation,
    Pod,
    Run,
    failing,
    parse_child,
    parse_pod,
    parse_run,
)
from demoreset_operator.render import Settings
from demoreset_operator.story import urgent
from demoreset_operator.worker_status import Answer, WorkerStatus, next_answer

Json = dict[str, Any]
SETTINGS = Settings("trainer:test", "Never", "operators")
LAST_WORDS = '{"worldSize": 1}'  # of a worker that had nothing to learn
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Crash(Exception):
    """The operator dies in the middle of carrying out a plan."""


class World:
    def __init__(self, **spec: Any) -> None:
        self.now = BEGIN
        self.run_body: Json = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {
                "name": "key",
                "namespace": "games",
                "uid": "u-1",
                "generation": 1,
                "creationTimestamp": stamp(BEGIN),
            },
            "spec": {"demo": {"name": "montezuma-first-key"}, **spec},
        }
        self.pods: dict[str, Json] = {}
        self.children: dict[tuple[str, str], Json] = {}
        self.answers: dict[str, Answer] = {}
        self.missed: dict[str, int] = {}
        self.pods_before: dict[str, Pod] = {}  # as they were last seen
        self.taken: set[str] = set()  # that the operator has deleted
        self.refused = ""
        self.unfit = False  # whether the API server would refuse a pod as the run says now
        self.behind = timedelta(0)  # that the nodes' clocks are
        self.events: list[Event] = []
        self.recorded: list[Attempt] = []
        self.created: list[str] = []
        self.deleted = False
        self.writes = 0
        self.patient = False  # whether status writes that are not urgent wait for 5 s
        self.written = BEGIN - timedelta(days=1)

    # The operator

    @property
    def run(self) -> Run:
        return parse_run(self.run_body)

    @property
    def status(self) -> RunStatus:
        return self.run.status

    def observe(self) -> Observation:
        pods = [parse_pod(body) for body in self.pods.values() if self._own(body)]
        self.pods_before = {
            pod.name: failing(pod, self.pods_before.get(pod.name), self.now) for pod in pods
        }
        return Observation(
            self.run,
            tuple(self.pods_before.values()),
            tuple(parse_child(body) for body in self.children.values() if self._own(body)),
            {name: answer for name, answer in self.answers.items() if name in self.pods},
            {name: count for name, count in self.missed.items() if name in self.pods},
            frozenset(self.taken),
            self.refused,
            self.unfit,
        )

    def _own(self, body: Json) -> bool:
        """Whether it is of this run, and not of an earlier one of its name."""
        return bool(body["metadata"]["labels"][LABEL_RUN_UID] == self.run_body["metadata"]["uid"])

    def decide(self, settings: Settings = SETTINGS) -> Plan:
        return decide(self.observe(), settings, self.now)

    def step(self, *, crash_after: int | None = None, settings: Settings = SETTINGS) -> Plan:
        """One look at the run; what was decided is done, up to a crash."""
        plan = self.decide(settings)
        left = crash_after

        def request() -> None:
            nonlocal left
            if left is not None:
                if left == 0:
                    raise Crash
                left -= 1
            self.writes += 1

        def make(pods: list[Json]) -> None:
            for body in pods:
                request()
                self.create(body)

        if plan.pods_first:
            make(plan.create_pods)
            plan = self.decide(settings)
        if plan.status is not None and not self._may_wait(plan.status):
            request()
            self.write(plan.status)
        for body in plan.apply_children:
            request()
            made = copy.deepcopy(body)
            made["metadata"]["uid"] = f"c-{self.writes}"
            self.children[body["kind"], body["metadata"]["name"]] = made
        for name in plan.delete_pods:
            request()
            self.taken.add(name)
            self.delete(name)
        make(plan.create_pods)
        for key in plan.delete_children:
            request()
            self.children.pop(key, None)
        self.events += plan.events
        self.deleted = self.deleted or plan.delete_run
        return plan

    def settle(self, most: int = 12) -> None:
        """Look until there is nothing left to do now."""
        for _ in range(most):
            plan = self.step()
            work = (plan.apply_children, plan.create_pods, plan.delete_pods, plan.delete_children)
            if not any(work) and (plan.status is None or self._may_wait(plan.status)):
                return
        raise AssertionError(f"the operator does not come to rest: {plan}")

    def _may_wait(self, status: RunStatus) -> bool:
        soon = self.now - self.written < timedelta(seconds=5)
        return self.patient and soon and not urgent(self.status, status)

    def write(self, status: RunStatus) -> None:
        """The run's status is so from now on."""
        self.written = self.now
        known = {(one.worker, one.attempt, one.pod) for one in self.status.attempts}
        for one in status.attempts:
            if (one.worker, one.attempt, one.pod) not in known:
                self.recorded.append(one)
        self.run_body["status"] = status.model_dump(mode="json", by_alias=True, exclude_none=True)

    def create(self, body: Json) -> None:
        """A pod, and a node for it."""
        name = body["metadata"]["name"]
        if name in self.pods:  # the API server answers 409
            return
        if LABEL_WORKER in (labels := body["metadata"]["labels"]) and self._own(body):
            ended = {str(place.worker): place.ended for place in self.status.places}
            over = int(labels[LABEL_ATTEMPT]) <= ended.get(labels[LABEL_WORKER], 0)
            assert not over, f"{name} is on record as ended: names do not come again"
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": f"p-{len(self.created)}", "creationTimestamp": stamp(self.now)}
        made["status"] = {"phase": "Pending", "conditions": [scheduled(self.now)]}
        self.pods[name] = made
        self.created.append(name)

    # What befalls it

    def change(self, **spec: Any) -> None:
        self.run_body["spec"] |= spec
        self.run_body["metadata"]["generation"] += 1

    def tick(self, seconds: float = 1.0) -> None:
        self.now += timedelta(seconds=seconds)

    def start(self, *names: str) -> None:
        """The kubelet starts pods; all that wait if none is named."""
        for name in names or list(self.pods):
            body = self.pods[name]
            if body["status"]["phase"] == "Pending":
                body["status"] = {
                    "phase": "Running",
                    "podIP": "10.0.0.9",
                    "conditions": [scheduled(self.now), {"type": "Ready", "status": "True"}],
                }
                self._container(name, {"running": {"startedAt": stamp(self.now - self.behind)}})

    def train(self, update: int = 1, **more: Any) -> None:
        """All workers that run say that they train."""
        for pod in self.workers():
            if pod.phase == "Running" and pod.live:
                self.say(pod.name, update, **more)

    def go_on(self, seconds: float, *, checkpoint: int) -> None:
        """All workers are new, and train so much later, in life 2, from a checkpoint of life 1."""
        self.start()
        self.tick(seconds)
        resumed = {"life": 1, "update": checkpoint, "frames": 8192 * checkpoint}
        self.train(checkpoint + 1, life=2, resumed=resumed)
        self.settle()

    def say(self, name: str, update: int | None, **more: Any) -> None:
        """A worker tells of an update; None: it has loaded nothing yet."""
        loads = {"phase": "starting", "worldSize": 1, "generation": 0}
        content = loads if update is None else worker_status(update, len(self.workers()), **more)
        self.answer(name, content, timedelta(seconds=30))

    def answer(self, name: str, content: Json, holds: timedelta) -> None:
        """A worker's /status has this content, and is believed for so long."""
        status = WorkerStatus.model_validate(content)
        self.answers[name] = next_answer(self.answers.get(name), status, self.now, holds)

    def end(self, name: str, code: int, reason: str = "Error", words: str = "") -> None:
        """A pod's container ends."""
        if code in (ExitCode.DONE, ExitCode.BUDGET_SPENT):
            words = words or LAST_WORDS
        status = self.pods[name]["status"]
        running = status.get("containerStatuses", [{}])[0].get("state", {}).get("running")
        ended = {"exitCode": code, "reason": reason, "message": words, **(running or {})}
        status["phase"] = "Failed" if code else "Succeeded"
        finished = stamp(self.now - self.behind)
        self._container(name, {"terminated": {**ended, "finishedAt": finished}})

    def wait_for(self, name: str, reason: str, message: str) -> None:
        """A pod's container cannot be started."""
        self._container(name, {"waiting": {"reason": reason, "message": message}})

    def unschedulable(self, name: str, message: str, reason: str = "Unschedulable") -> None:
        """No node takes a pod."""
        found = {"type": "PodScheduled", "status": "False", "reason": reason}
        self.pods[name]["status"]["conditions"] = [{**found, "message": message}]

    def _container(self, name: str, state: Json) -> None:
        container = self.pods[name]["spec"]["containers"][0]["name"]
        self.pods[name]["status"]["containerStatuses"] = [{"name": container, "state": state}]

    def delete(self, name: str) -> None:
        """Deleted: it stays until it has ended."""
        if name in self.pods:
            leaves = self.now + timedelta(seconds=60)
            known = {"deletionTimestamp": stamp(leaves), "deletionGracePeriodSeconds": 60}
            self.pods[name]["metadata"] = known | self.pods[name]["metadata"]
            if self.pods[name]["status"]["phase"] != "Running":
                self.vanish(name)

    def vanish(self, *names: str) -> None:
        """Gone; all that were deleted if none is named."""
        chosen = names or [
            n for n, one in self.pods.items() if "deletionTimestamp" in one["metadata"]
        ]
        for name in chosen:
            self.pods.pop(name, None)
            self.answers.pop(name, None)

    def evict(self, name: str, reason: str = "EvictionByEvictionAPI") -> None:
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
        self.pods[name]["status"]["conditions"].append(condition)
        self.delete(name)

    # What there is

    def workers(self) -> list[Pod]:
        return [pod for pod in self.observe().workers]

    def missed_for(self) -> float:
        """Seconds from now, once the operator has looked, until the first worker is there again."""
        self.settle()
        begun = self.now
        while 0 not in self.live():
            self.tick()
            self.settle()
        return (self.now - begun).total_seconds()

    def live(self) -> dict[int, str]:
        return {pod.index: pod.name for pod in self.workers() if pod.live}

    def coordinators(self) -> list[str]:
        return [pod.name for pod in self.observe().coordinators if pod.live]

    def names(self, component: str) -> list[str]:
        return [
            name
            for name, body in self.pods.items()
            if body["metadata"]["labels"][LABEL_COMPONENT] == component
        ]

    def condition(self, kind: str) -> tuple[str, str, str] | None:
        for one in self.status.conditions:
            if one.type == kind:
                return one.status, one.reason, one.message
        return None


def training(count: int = 3, least: int = 1, **spec: Any) -> World:
    """A run of so many workers, all of which train."""
    world = World(workers={"min": least, "max": count}, **spec)
    world.settle()
    world.start()
    world.train()
    world.settle()
    return world


def saved(**spec: Any) -> World:
    """A run of one worker that has written a checkpoint."""
    world = training(1, **spec)
    kept = {"update": 1, "ageSeconds": 1.0, "bytes": 1, "error": None}
    world.train(2, checkpoint=kept)
    world.settle()
    return world


def worker_status(update: int, members: int, **more: Any) -> Json:
    return {
        "phase": "rollout",
        "worldSize": members,
        "generation": 1,
        "update": update,
        "frames": 8192 * update,
        "seconds": float(update),
        "curriculum": {
            "startFrame": 200,
            "demoFrames": 356,
            "progress": 0.44,
            "successRate": 0.5,
            "goalRate": None,
        },
        "training": {
            "framesPerSecond": 8000.0,
            "scoreMean": None,
            "scoreMax": None,
            "entropy": 1.5,
            "learningRate": 4e-4,
            "stalled": False,
            "etaSeconds": None,
        },
        "checkpoint": {"update": None, "ageSeconds": None, "bytes": None, "error": None},
        **more,
    }


def scheduled(time: datetime) -> Json:
    return {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(time)}


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
