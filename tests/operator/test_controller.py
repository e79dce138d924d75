"""The queue, and a run's turn: requests in order, failures tried again, answers known at once."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from apiserver import as_wanted
from demoreset_operator import controller as controllers
from demoreset_operator.api import ApiError
from demoreset_operator.cache import Cache
from demoreset_operator.controller import Controller, Queue
from demoreset_operator.metrics import Metrics
from demoreset_operator.worker_status import WorkerStatus
from world import SETTINGS, World, worker_status

Json = dict[str, Any]
WRITE = ("apply status", "DemoResetRun")
PENDING = {"phase": "Pending"}


class Server:
    """An API server in this process: objects with versions; strict where ours must be right."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.requests: list[tuple[str, str]] = []
        self.version = 100
        self.broken = 0

    def _took(self, verb: str, kind: str) -> None:
        self.requests.append((verb, kind))
        if self.broken:
            self.broken -= 1
            raise ApiError(500, "no luck")

    def _keep(self, body: Json) -> Json:
        self.version += 1
        key = body["kind"], body["metadata"]["name"]
        meta = {"uid": f"{key}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        meta |= self.objects.get(key, {}).get("metadata", {}) | body["metadata"]
        kept = {**body, "metadata": {**meta, "resourceVersion": str(self.version)}}
        self.objects[key] = kept
        return kept

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        self._took("get", kind)
        return self.objects.get((kind, name))

    async def create(self, body: Json, *, dry_run: bool = False) -> Json | None:
        self._took("try to create" if dry_run else "create", body["kind"])
        if (body["kind"], body["metadata"]["name"]) in self.objects:
            return None
        return body if dry_run else self._keep(body)

    async def apply(self, body: Json) -> Json:
        self._took("apply", body["kind"])
        return self._keep(body)

    async def apply_status(self, body: Json) -> Json:
        self._took("apply status", body["kind"])
        known = self.objects[body["kind"], body["metadata"]["name"]]
        for key in ("uid", "resourceVersion"):
            if known["metadata"][key] != body["metadata"][key]:
                raise ApiError(409, f"another {key}")
        return self._keep({**known, "status": body["status"]})

    async def patch(self, kind: str, namespace: str, name: str, change: Json) -> Json:
        self._took("patch", kind)
        known = self.objects[kind, name]
        return self._keep({**known, "metadata": {**known["metadata"], **change["metadata"]}})

    async def delete(
        self, kind: str, namespace: str, name: str, uid: str = "", version: str = ""
    ) -> None:
        self._took("delete", kind)
        if (found := self.objects.get((kind, name))) and as_wanted(found, uid, version):
            del self.objects[kind, name]


def made(**spec: Any) -> tuple[Server, Controller, str]:
    server, cache = Server(), Cache()
    body = server._keep(World(**spec).run_body)
    cache.put_run(body)
    controller = Controller(server, cache, SETTINGS, Metrics())  # type: ignore[arg-type]
    return server, controller, body["metadata"]["uid"]


def test_the_status_goes_before_what_follows_from_it() -> None:
    server, controller, uid = made(workers={"max": 2})
    asyncio.run(controller.reconcile(uid))
    assert server.requests[0] == ("apply status", "DemoResetRun")
    assert server.requests.count(("create", "Pod")) == 3


def test_what_was_made_is_known_before_the_watch_tells_of_it() -> None:
    server, controller, uid = made(workers={"max": 2})
    asyncio.run(controller.reconcile(uid))
    before = len(server.requests)
    asyncio.run(controller.reconcile(uid))
    assert [one for one in server.requests[before:] if one[0] == "create"] == []


def test_pods_of_an_operator_that_died_are_taken_over() -> None:
    server, controller, uid = made(workers={"max": 2})
    asyncio.run(controller.reconcile(uid))
    names = set(server.objects)
    fresh = Cache()
    fresh.put_run(server.objects["DemoResetRun", "key"])
    again = Controller(server, fresh, SETTINGS, Metrics())  # type: ignore[arg-type]
    asyncio.run(again.reconcile(uid))
    assert set(server.objects) == names


def test_what_has_happened_is_told_though_what_follows_from_it_fails() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    crashed = {"exitCode": 1, "finishedAt": "2026-01-01T00:00:00Z"}
    its = {"name": "worker", "state": {"terminated": crashed}}
    meta = pod["metadata"] | {"resourceVersion": "999"}
    status = {"phase": "Failed", "containerStatuses": [its]}
    controller.cache.put({**pod, "metadata": meta, "status": status})
    refuse(server, "no luck", lambda body: body["kind"] == "Pod", 503)
    with pytest.raises(ApiError, match="no luck"):
        asyncio.run(controller.reconcile(uid))
    events = [body for (kind, _), body in server.objects.items() if kind == "Event"]
    assert [event["reason"] for event in events] == ["WorkerCrashed"]


def test_who_manages_which_field_of_a_run_is_not_kept() -> None:
    cache, body = Cache(), World().run_body
    body["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    assert cache.put_run(body) == body["metadata"]["uid"]
    assert list(cache.runs.values()) == [World().run_body]
    assert "managedFields" in body["metadata"], "what was given is not changed"


def test_a_run_that_is_not_understood_says_so_once_and_is_left_as_it_is() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    known = server.objects["DemoResetRun", "key"]
    new = {**known, "spec": {**known["spec"], "magic": 1}}
    new["metadata"]["generation"] = 2
    new["status"] |= {"ofALaterVersion": 7}
    controller.cache.put_run(server._keep(new))
    before = len(server.requests)
    asyncio.run(controller.reconcile(uid))
    asyncio.run(controller.reconcile(uid))
    assert server.requests[before:] == [("apply status", "DemoResetRun")]
    status = server.objects["DemoResetRun", "key"]["status"]
    (running,) = [one for one in status["conditions"] if one["type"] == "Running"]
    assert (running["status"], running["reason"]) == ("False", "NotUnderstood")
    assert "does not know spec.magic: Extra inputs are not permitted" in running["message"]
    assert (status["observedGeneration"], status["ofALaterVersion"]) == (2, 7)


def test_of_a_run_that_is_not_understood_it_is_known_whether_anybody_trains() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    pod, name = server.objects["Pod", "key-worker-0-1"], "key-worker-0-1"
    controller.cache.put(server._keep({**pod, "status": {"phase": "Running"}}))
    run = server.objects["DemoResetRun", "key"]
    controller.cache.put_run(server._keep({**run, "spec": {**run["spec"], "magic": 1}}))
    fresh = Controller(server, controller.cache, SETTINGS, Metrics())  # type: ignore[arg-type]

    def told() -> tuple[str, str, float | None]:
        asyncio.run(fresh.reconcile(uid))
        status = server.objects["DemoResetRun", "key"]["status"]
        (running,) = [one for one in status["conditions"] if one["type"] == "Running"]
        assert "a worker that is lost is not replaced" in running["message"]
        its = {"namespace": "games", "run": "key"}
        sample = fresh._metrics.registry.get_sample_value
        return running["status"], status["phase"], sample("demoreset_operator_run_training", its)

    assert told() == ("False", "Pending", 0)
    says = WorkerStatus.model_validate(worker_status(3, 1))
    controller.cache.answered(uid, name, says, datetime.now(UTC), timedelta(seconds=30))
    assert told() == ("True", "Running", 1)
    controller.cache.forget(server.objects["Pod", name]["metadata"]["uid"])
    assert told() == ("False", "Pending", 0)
    run = server.objects["DemoResetRun", "key"]
    elsewhere = {**run["spec"], "managedBy": "kueue.x-k8s.io/multikueue"}
    controller.cache.put_run(server._keep({**run, "spec": elsewhere}))
    asyncio.run(fresh.reconcile(uid))
    assert fresh._metrics.registry.get_sample_value("demoreset_operator_runs", PENDING) == 0


def test_a_run_whose_status_is_not_understood_either_is_told_of_by_an_event() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    later = {"type": "Paused", "status": "False", "reason": "x", "message": ""}
    later["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    run = server.objects["DemoResetRun", "key"]
    run["status"]["conditions"].append(later)
    controller.cache.put_run(server._keep(run))
    for _ in range(2):
        asyncio.run(controller.reconcile(uid))
    events = [body for (kind, _), body in server.objects.items() if kind == "Event"]
    assert [event["reason"] for event in events] == ["NotUnderstood"]
    assert "does not know conditions" in events[0]["message"]
    told = controller._metrics.registry.get_sample_value
    assert told("demoreset_operator_runs", PENDING) == 1, "nobody trains"
    run["status"]["phase"] = "Failed"
    controller.cache.put_run(server._keep(run))
    asyncio.run(controller.reconcile(uid))
    assert told("demoreset_operator_runs", {"phase": "Failed"}) == 1


def test_nothing_is_asked_for_nor_told_of_a_run_that_somebody_else_manages() -> None:
    server, controller, uid = made(managedBy="kueue.x-k8s.io/multikueue")
    asyncio.run(controller.reconcile(uid))
    assert server.requests == []
    told = controller._metrics.registry.get_sample_value
    its = {"namespace": "games", "run": "key"}
    assert told("demoreset_operator_run_training", its) is None, "nobody need be alarmed"
    assert told("demoreset_operator_runs", PENDING) == 0


def test_a_claim_that_somebody_has_put_in_the_place_of_a_lost_one_is_no_loss() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    run = server.objects["DemoResetRun", "key"]
    run["status"]["checkpoint"] = {"update": 7}
    controller.cache.put_run(server._keep(run))
    own = server.objects["PersistentVolumeClaim", "key-data"]["metadata"]["uid"]
    del server.objects["PersistentVolumeClaim", "key-data"]
    controller.cache.forget(own)
    other(server, "PersistentVolumeClaim", "key-data")  # as from a snapshot
    conditions(server, controller, uid)  # the first look finds out, and asks for it
    words = conditions(server, controller, uid)
    assert "VolumeLost" not in words
    assert "kubectl label pvc key-data app.kubernetes.io/managed-by=demoreset-operator" in words
    server.objects["PersistentVolumeClaim", "key-data"]["metadata"]["labels"] = OURS
    controller._memories[uid].refusal = None  # its time is over
    asyncio.run(controller.reconcile(uid))
    claim = server.objects["PersistentVolumeClaim", "key-data"]
    assert claim["metadata"]["labels"]["demoreset.dev/run-uid"] == uid


def test_a_claim_that_is_put_back_while_a_run_is_suspended_is_seen() -> None:
    server, controller, uid = made(suspend=True)
    run = server.objects["DemoResetRun", "key"]
    controller.cache.put_run(server._keep({**run, "status": {"checkpoint": {"update": 7}}}))
    assert "VolumeLost" in conditions(server, controller, uid)
    other(server, "PersistentVolumeClaim", "key-data")
    assert "VolumeLost" not in conditions(server, controller, uid)
    assert server.objects["DemoResetRun", "key"]["status"]["phase"] == "Suspended"


def finish(server: Server, controller: Controller, at: datetime) -> None:
    """The run is complete since then."""
    run, since = server.objects["DemoResetRun", "key"], at.strftime("%Y-%m-%dT%H:%M:%SZ")
    complete = {"type": "Complete", "status": "True", "reason": "GoalMet", "message": ""}
    conditions = [complete | {"lastTransitionTime": since}]
    status = {**run["status"], "conditions": conditions, "finished": since}
    controller.cache.put_run(server._keep({**run, "status": status}))


def somebody_extends(server: Server) -> Json:
    run = server.objects["DemoResetRun", "key"]
    meta = {**run["metadata"], "generation": 2}
    spec = {**run["spec"], "ttlSecondsAfterFinished": 2**31 - 1}
    return server._keep({**run, "metadata": meta, "spec": spec})


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("extended", ["", "before", "meanwhile", "meanwhile, and heard"])
def test_a_run_whose_user_has_just_given_it_longer_is_not_deleted(
    extended: str, writes: bool
) -> None:
    server, controller, uid = made(ttlSecondsAfterFinished=3600)
    asyncio.run(controller.reconcile(uid))
    finish(server, controller, datetime.now(UTC))
    asyncio.run(controller.reconcile(uid))
    run = server.objects["DemoResetRun", "key"]
    if writes:
        run["status"]["phase"] = "Running"
    run["status"]["finished"] = "2026-01-01T00:00:00Z"
    controller.cache.put_run(server._keep(run))
    real, before = server.delete, len(server.requests)

    async def delete(kind: str, namespace: str, *more: str) -> None:
        if kind == "Pod" and extended.startswith("meanwhile"):  # its pods go before it does
            now = somebody_extends(server)
            if extended.endswith("heard"):
                controller.cache.put_run(now)
        await real(kind, namespace, *more)

    server.delete = delete  # type: ignore[method-assign, assignment]
    if extended == "before":
        somebody_extends(server)
    with suppress(ApiError):
        asyncio.run(controller.reconcile(uid))
    asked = server.requests[before:]
    assert (WRITE in asked) is writes
    assert (("delete", "DemoResetRun") in asked) is not (writes and extended == "before")
    assert (("DemoResetRun", "key") in server.objects) is bool(extended)


def somebody_suspends(server: Server) -> Json:
    run = server.objects["DemoResetRun", "key"]
    meta = {**run["metadata"], "generation": 2}
    return server._keep({**run, "metadata": meta, "spec": {**run["spec"], "suspend": True}})


def test_nothing_follows_from_what_a_run_was_before_somebody_changed_it() -> None:
    server, controller, uid = made()
    now = somebody_suspends(server)
    with pytest.raises(ApiError, match="409"):
        asyncio.run(controller.reconcile(uid))
    assert server.requests == [("apply status", "DemoResetRun")]
    controller.cache.put_run(now)
    asyncio.run(controller.reconcile(uid))
    assert server.objects["DemoResetRun", "key"]["status"]["phase"] == "Suspended"
    assert not [1 for kind, _ in server.objects if kind == "Pod"]


def test_who_was_too_slow_tries_again_when_it_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "FIRST_WAIT", 0.01)
    server, controller, uid = made()
    now = somebody_suspends(server)

    async def work() -> None:
        controller.queue.add(uid)
        working = asyncio.create_task(controller.run())
        while len(server.requests) < 2:
            await asyncio.sleep(0.01)
        assert set(server.requests) == {("apply status", "DemoResetRun")}
        controller.cache.put_run(now)
        while "status" not in server.objects["DemoResetRun", "key"]:
            await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(asyncio.wait_for(work(), 20))
    assert server.objects["DemoResetRun", "key"]["status"]["phase"] == "Suspended"


def test_a_failure_is_tried_again() -> None:
    server, controller, uid = made()
    server.broken = 1

    async def work() -> None:
        controller.queue.add(uid)
        working = asyncio.create_task(controller.run())
        while ("Pod", "key-worker-0-1") not in server.objects:
            await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(asyncio.wait_for(work(), 10))


def refuse(
    server: Server, why: str, which: Callable[[Json], bool], code: int = 403
) -> Callable[[], None]:
    """The server takes some objects no more; what lets it take them again."""
    real = server.create

    async def create(body: Json, *, dry_run: bool = False) -> Json | None:
        if which(body):
            raise ApiError(code, why)
        return await real(body, dry_run=dry_run)

    def take_again() -> None:
        server.create = real  # type: ignore[method-assign]

    server.create = create  # type: ignore[method-assign]
    return take_again


def test_one_request_that_fails_does_not_keep_others_from_being_made() -> None:
    server, controller, uid = made(workers={"max": 3})
    refuse(server, "exceeded quota", lambda body: body["metadata"]["name"] == "key-worker-1-1")
    asyncio.run(controller.reconcile(uid))
    assert ("Pod", "key-worker-2-1") in server.objects
    assert "exceeded quota" in conditions(server, controller, uid)


def change(controller: Controller, server: Server, **workers: Any) -> None:
    """The user edits the run."""
    body = server.objects["DemoResetRun", "key"]
    spec = {**body["spec"], "workers": {**body["spec"].get("workers", {}), **workers}}
    meta = {**body["metadata"], "generation": body["metadata"]["generation"] + 1}
    controller.cache.put_run(server._keep({**body, "metadata": meta, "spec": spec}))


@pytest.mark.parametrize(
    ("code", "why", "stays"),
    [
        (422, "spec.tolerations[0].effect: Unsupported value", True),
        (403, "no PriorityClass with name urgent was found", True),
        (403, "exceeded quota: cpu, requested: 2, used: 2, limited: 2", False),
        (400, "admission webhook does not support dry run", False),
    ],
)
def test_no_worker_goes_for_one_that_the_api_server_would_refuse(
    code: int, why: str, stays: bool
) -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    take_again = refuse(server, why, lambda body: body["kind"] == "Pod", code)
    change(controller, server, tolerations=[{"key": "gpu", "effect": "NoSchedul"}])
    for _ in range(2):
        asyncio.run(controller.reconcile(uid))
        assert (("Pod", "key-worker-0-1") in server.objects) is stays
    assert why in conditions(server, controller, uid)
    take_again()
    change(controller, server, tolerations=[{"key": "gpu", "effect": "NoSchedule"}])
    asyncio.run(controller.reconcile(uid))
    assert {"key-worker-0-1", "key-worker-0-2"} & {name for _, name in server.objects} == {
        "key-worker-0-2"
    }


def test_after_a_refusal_another_one_is_tried_each_time() -> None:
    server, controller, uid = made(workers={"max": 2})
    take_again = refuse(server, "exceeded quota", lambda body: body["kind"] == "Pod")
    asyncio.run(controller.reconcile(uid))
    take_again()
    refuse(server, "no label team", lambda body: body["metadata"]["name"] == "key-coordinator-1")
    for _ in range(3):
        memory = controller._memories[uid]
        assert memory.refusal is not None
        memory.refusal = replace(memory.refusal, until=0.0)
        asyncio.run(controller.reconcile(uid))
    made_now = {name for kind, name in server.objects if kind == "Pod"}
    assert made_now == {"key-worker-0-1", "key-worker-1-1"}


def test_a_pod_that_may_not_be_tidied_up_does_not_keep_its_workers_next_from_coming() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))

    async def delete(kind: str, namespace: str, name: str, uid: str = "") -> None:
        raise ApiError(403, "admission webhook denied the request")

    server.delete = delete  # type: ignore[method-assign, assignment]
    for attempt in (1, 2):
        pod = server.objects["Pod", f"key-worker-0-{attempt}"]
        ended = {"exitCode": 1, "startedAt": "2026-01-01T00:00:00Z"}
        ended["finishedAt"] = "2026-01-01T00:05:00Z"
        its = {"name": "worker", "state": {"terminated": ended}}
        status = {"phase": "Failed", "containerStatuses": [its]}
        controller.cache.put(server._keep({**pod, "status": status}))
        with suppress(ApiError):
            asyncio.run(controller.reconcile(uid))
    assert ("Pod", "key-worker-0-3") in server.objects


def test_a_pod_that_may_not_be_taken_away_is_told_of() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))

    async def delete(kind: str, namespace: str, name: str, uid: str = "") -> None:
        raise ApiError(403, f"admission webhook denied the request: {name} is protected")

    server.delete = delete  # type: ignore[method-assign, assignment]
    run = server.objects["DemoResetRun", "key"]
    suspended = {**run, "spec": {**run["spec"], "suspend": True}}
    controller.cache.put_run(server._keep(suspended))
    asyncio.run(controller.reconcile(uid))
    controller._memories[uid].written -= 5  # that is not urgent
    assert "save and leave; 403: admission webhook denied the request" in conditions(
        server, controller, uid
    )


def other(server: Server, kind: str, name: str, **labels: str) -> None:
    """Somebody's object, there before ours."""
    server._keep({"kind": kind, "metadata": {"name": name, "namespace": "games", "labels": labels}})


def conditions(server: Server, controller: Controller, uid: str) -> str:
    """What the next look puts into the status."""
    asyncio.run(controller.reconcile(uid))
    return str(server.objects["DemoResetRun", "key"]["status"]["conditions"])


OURS = {"app.kubernetes.io/managed-by": "demoreset-operator", "demoreset.dev/run": "key"}


def test_a_pod_of_an_earlier_run_of_this_name_is_waited_for_and_not_taken() -> None:
    server, controller, uid = made()
    earlier = {**OURS, "demoreset.dev/run-uid": "u-0"}
    other(server, "Pod", "key-worker-0-1", **earlier)
    asyncio.run(controller.reconcile(uid))
    assert "of an earlier run is still there" in conditions(server, controller, uid)
    assert "key-worker-0-1" not in {pod.name for pod in controller.cache.pods(uid)}
    del server.objects["Pod", "key-worker-0-1"]
    controller._memories[uid].refusal = None  # its time is over
    asyncio.run(controller.reconcile(uid))
    assert "key-worker-0-1" in {pod.name for pod in controller.cache.pods(uid)}


def test_what_is_somebody_elses_is_left_alone_and_told() -> None:
    server, controller, uid = made()
    other(server, "Service", "key-coordinator", app="shop")
    asyncio.run(controller.reconcile(uid))
    words = conditions(server, controller, uid)
    assert "Service key-coordinator exists and is not this run's" in words
    assert server.objects["Service", "key-coordinator"]["metadata"]["labels"] == {"app": "shop"}


@pytest.mark.parametrize("retention", ["Retain", "Delete"])
def test_a_volume_that_was_retained_is_taken_over_as_it_is(retention: str) -> None:
    volume = {"retention": retention}
    server, controller, uid = made(workers={"max": 4}, checkpoint={"volume": volume})
    earlier = {**OURS, "demoreset.dev/run-uid": "u-0"}
    other(server, "PersistentVolumeClaim", "key-data", **earlier)
    server.objects["PersistentVolumeClaim", "key-data"]["spec"] = {"accessModes": ["ReadWriteOnce"]}
    asyncio.run(controller.reconcile(uid))
    claim = server.objects["PersistentVolumeClaim", "key-data"]
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"]}
    assert claim["metadata"]["labels"]["demoreset.dev/run-uid"] == uid
    assert "ownerReferences" not in claim["metadata"], "it was there before, and stays"
    before = len(server.requests)
    asyncio.run(controller.reconcile(uid))
    assert ("patch", "PersistentVolumeClaim") not in server.requests[before:]


def test_a_webhook_that_is_down_is_told_of_and_asked_again_soon() -> None:
    server, controller, uid = made()
    down = "Internal error occurred: failed calling webhook"
    take_again = refuse(server, down, lambda body: body["kind"] == "Pod", code=500)
    for _ in range(3):
        asyncio.run(controller.reconcile(uid))
    assert "failed calling webhook" in conditions(server, controller, uid)
    take_again()
    refusal = controller._memories[uid].refusal
    assert refusal is not None
    controller._memories[uid].refusal = replace(refusal, until=0.0)
    asyncio.run(controller.reconcile(uid))
    assert ("Pod", "key-worker-0-1") in server.objects


def test_what_is_refused_is_in_the_status_with_the_next_look() -> None:
    server, controller, uid = made()
    take_again = refuse(server, "exceeded quota: pods", lambda body: body["kind"] == "Pod")

    async def work() -> None:
        controller.queue.add(uid)
        working = asyncio.create_task(controller.run())
        while "exceeded quota" not in str(server.objects["DemoResetRun", "key"].get("status")):
            await asyncio.sleep(0.01)
        take_again()
        while "exceeded quota" in str(server.objects["DemoResetRun", "key"].get("status")):
            await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(asyncio.wait_for(work(), 20))


def test_a_refusal_that_is_too_long_for_a_status_is_cut() -> None:
    server, controller, uid = made()
    refuse(server, "no " * 20_000, lambda body: body["kind"] == "Pod")
    asyncio.run(controller.reconcile(uid))
    assert "403: no no" in conditions(server, controller, uid)


def test_a_refusal_keeps_nothing_else_from_being_done() -> None:
    """A quota takes two of three workers: one that crashes is recorded and told all the same."""
    server, controller, uid = made(workers={"max": 3})

    def beyond(body: Json) -> bool:
        return (
            body["kind"] == "Pod" and len([1 for kind, _ in server.objects if kind == "Pod"]) >= 3
        )

    refuse(server, "exceeded quota: pods", beyond)
    for _ in range(5):
        asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    status = {"phase": "Failed", "containerStatuses": [ended("worker", 1)]}
    controller.cache.put(server._keep({**pod, "status": status}))
    asyncio.run(controller.reconcile(uid))
    known = server.objects["DemoResetRun", "key"]["status"]
    assert [one["cause"] for one in known["attempts"]] == ["Crashed"]
    assert any(kind == "Event" for kind, _ in server.objects)


def ended(name: str, code: int) -> Json:
    return {"name": name, "state": {"terminated": {"exitCode": code}}}


def test_a_claim_that_goes_with_an_earlier_run_is_not_taken() -> None:
    server, controller, uid = made()
    other(server, "PersistentVolumeClaim", "key-data", **OURS, **{"demoreset.dev/run-uid": "u-0"})
    claim = server.objects["PersistentVolumeClaim", "key-data"]
    claim["metadata"]["ownerReferences"] = [{"uid": "u-0"}]
    asyncio.run(controller.reconcile(uid))
    assert "of an earlier run is still there" in conditions(server, controller, uid)


def test_somebody_elses_pod_of_this_name_does_not_take_ours_away() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    theirs = {**pod["metadata"], "uid": "theirs", "namespace": "elsewhere"}
    controller.cache.put({**pod, "metadata": theirs})
    controller.cache.put({**pod, "metadata": theirs}, gone=True)
    assert "key-worker-0-1" in {one.name for one in controller.cache.pods(uid)}


def test_all_losses_are_counted_though_a_status_keeps_the_latest_few() -> None:
    server, controller, uid = made(workers={"max": 30})
    asyncio.run(controller.reconcile(uid))
    for name in [name for kind, name in server.objects if kind == "Pod" and "worker" in name]:
        status = {"phase": "Failed", "containerStatuses": [ended("worker", 1)]}
        controller.cache.put(server._keep({**server.objects["Pod", name], "status": status}))
    told = controller._metrics.registry.get_sample_value
    crashed = "demoreset_operator_restarts_total", {"cause": "Crashed"}
    server.broken = 1  # what is not written is not counted: it will be found again
    with pytest.raises(ApiError):
        asyncio.run(controller.reconcile(uid))
    assert told(*crashed) == 0
    for _ in range(2):
        asyncio.run(controller.reconcile(uid))
        assert told(*crashed) == 30


def test_a_failing_run_is_not_looked_at_with_every_answer_of_a_worker() -> None:
    server, controller, uid = made()
    server.broken = 1000

    async def work() -> None:
        controller.queue.add(uid)
        working = asyncio.create_task(controller.run())
        for _ in range(50):
            controller.wake(uid)
            await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(work())
    assert len(server.requests) < 5


def test_far_times_do_not_fill_the_queue() -> None:
    queue = Queue(lambda: 0.0)
    for _ in range(10_000):
        queue.add("a", 1e6)
        queue.add("a", 0)
        asyncio.run(queue.get())
    assert len(queue._heap) < 200


def test_what_is_gone_does_not_come_back_by_a_late_answer() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    controller.cache.put(pod, gone=True)
    controller.cache.put(pod)
    assert "key-worker-0-1" not in {one.name for one in controller.cache.pods(uid)}


@pytest.mark.parametrize(
    "forged",
    [
        {"metadata": {"namespace": "elsewhere"}},
        {"metadata": {"ownerReferences": []}},
        {"metadata": {"labels": {"demoreset.dev/run-uid": "u-1"}}},
    ],
)
def test_a_pod_is_not_a_runs_own_for_its_label_alone(forged: Json) -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    meta = {**pod["metadata"], "name": "forged", "uid": "f", **forged["metadata"]}
    controller.cache.put({**pod, "metadata": meta})
    assert "forged" not in {one.name for one in controller.cache.pods(uid)}


def remembered(controller: Controller, uid: str) -> set[str]:
    """Where a controller, or its metrics, keep something of a run."""
    its = [*vars(controller).items(), *vars(controller._metrics).items()]
    return {name for name, known in its if isinstance(known, dict) and uid in known}


def test_a_run_that_is_gone_is_forgotten() -> None:
    server, controller, uid = made()
    refuse(server, "exceeded quota: pods", lambda body: body["kind"] == "Pod")
    asyncio.run(controller.reconcile(uid))
    run = server.objects["DemoResetRun", "key"]
    puzzle = {**run, "spec": {**run["spec"], "magic": 1}, "status": {"conditions": "?"}}
    controller.cache.put_run(server._keep(puzzle))
    asyncio.run(controller.reconcile(uid))
    controller._failed(uid, ApiError(500, "no luck"))
    assert remembered(controller, uid) == {"_memories", "_known"}
    memory = controller._memories[uid]
    assert memory.failures
    assert memory.refusal
    assert memory.puzzled
    controller.cache.put_run(server.objects["DemoResetRun", "key"], gone=True)
    before = len(server.requests)
    asyncio.run(controller.reconcile(uid))
    assert len(server.requests) == before
    assert remembered(controller, uid) == set()


class Clock:
    """What the controller takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(controllers, "time", found)
    return found


def trains(server: Server, controller: Controller, uid: str, update: int, worker: int = 0) -> None:
    """A worker runs, and tells of an update; none yet: 0."""
    name = f"key-worker-{worker}-1"
    pod = server.objects["Pod", name]
    if "status" not in pod:
        its = {"name": "worker", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
        status = {"phase": "Running", "podIP": "10.0.0.9", "containerStatuses": [its]}
        controller.cache.put(server._keep({**pod, "status": status}))
    if update:
        told = WorkerStatus.model_validate(worker_status(update, 1))
        controller.cache.answered(uid, name, told, datetime.now(UTC), timedelta(seconds=30))


def test_a_run_of_four_workers_is_written_14_times_until_it_trains(clock: Clock) -> None:
    """Six objects, four workers, three statuses, and the event that it trains."""
    server, controller, uid = made(workers={"max": 4})
    for update in (0, 1):
        asyncio.run(controller.reconcile(uid))
        clock.now += 5
        for worker in range(4):
            trains(server, controller, uid, update, worker)
            asyncio.run(controller.reconcile(uid))
    assert server.objects["DemoResetRun", "key"]["status"]["phase"] == "Running"
    assert len([one for one in server.requests if one[0] != "get"]) <= 14


def test_progress_is_written_from_time_to_time_and_the_latest_is_not_forgotten(
    clock: Clock,
) -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    trains(server, controller, uid, 1)
    asyncio.run(controller.reconcile(uid))
    controller.queue = Queue(clock.monotonic)
    written = []
    for second in range(1, 13):
        clock.now += 1
        trains(server, controller, uid, 1 + second)
        before = server.requests.count(WRITE)
        asyncio.run(controller.reconcile(uid))
        written += [second] * (server.requests.count(WRITE) - before)
    assert written == [5, 10]
    assert server.objects["DemoResetRun", "key"]["status"]["training"]["update"] == 11
    clock.now += 3
    assert asyncio.run(asyncio.wait_for(controller.queue.get(), 5)) == uid
    asyncio.run(controller.reconcile(uid))
    assert server.objects["DemoResetRun", "key"]["status"]["training"]["update"] == 13


def test_what_must_not_be_forgotten_is_written_at_once(clock: Clock) -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    trains(server, controller, uid, 1)
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    status = {"phase": "Failed", "containerStatuses": [ended("worker", 1)]}
    controller.cache.put(server._keep({**pod, "status": status}))
    asyncio.run(controller.reconcile(uid))
    assert clock.now == 1000.0, "no time has passed"
    assert server.requests.count(WRITE) == 3
    known = server.objects["DemoResetRun", "key"]["status"]["attempts"]
    assert [one["cause"] for one in known] == ["Crashed"]


def test_while_others_wait_a_new_runs_pods_go_before_its_first_status(clock: Clock) -> None:
    server, controller, uid = made(workers={"max": 2})
    controller.queue.add("another")
    asyncio.run(controller.reconcile(uid))
    assert server.requests.count(("create", "Pod")) == 3
    pod = server.objects["Pod", "key-worker-0-1"]
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    begun = {"phase": "Running", "containerStatuses": [{"name": "worker", "state": state}]}
    controller.cache.put(server._keep({**pod, "status": begun}))
    asyncio.run(controller.reconcile(uid))
    assert WRITE not in server.requests
    clock.now += 5
    asyncio.run(controller.reconcile(uid))
    assert server.requests[-1] == WRITE
    assert server.requests.count(("create", "Pod")) == 3
    assert "begun" in server.objects["DemoResetRun", "key"]["status"]


def test_a_new_runs_first_loss_is_written_at_once_although_others_wait(clock: Clock) -> None:
    server, controller, uid = made()
    controller.queue.add("another")
    asyncio.run(controller.reconcile(uid))
    pod = server.objects["Pod", "key-worker-0-1"]
    status = {"phase": "Failed", "containerStatuses": [ended("worker", 1)]}
    controller.cache.put(server._keep({**pod, "status": status}))
    asyncio.run(controller.reconcile(uid))
    known = server.objects["DemoResetRun", "key"]["status"]["attempts"]
    assert [one["cause"] for one in known] == ["Crashed"]


def test_a_key_waits_once_and_comes_at_its_earliest_time() -> None:
    now = 0.0
    queue = Queue(lambda: now)
    queue.add("a", 5)
    queue.add("b", 3)
    queue.add("a", 1)
    queue.add("a", 9)
    assert len(queue) == 0  # nothing is late
    now = 2.0
    assert len(queue) == 1
    now = 10.0
    assert len(queue) == 2

    async def all_of_them() -> list[str]:
        return [await queue.get(), await queue.get()]

    assert asyncio.run(all_of_them()) == ["a", "b"]
    assert len(queue) == 0


def test_an_older_word_about_an_object_is_not_believed() -> None:
    cache = Cache()
    body = World().run_body
    new = {**body, "metadata": {**body["metadata"], "resourceVersion": "20"}, "status": {}}
    old = {**body, "metadata": {**body["metadata"], "resourceVersion": "19"}}
    uid = body["metadata"]["uid"]
    assert (cache.put_run(new), cache.put_run(old)) == (uid, None)
    assert "status" in cache.runs[uid]


def test_only_what_is_looked_at_is_news() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    cache, pod = controller.cache, server.objects["Pod", "key-worker-0-1"]
    assert cache.put({**pod, "kind": "Pod"}) is None, "an answer has told of it before the watch"
    noted = server._keep({**pod, "metadata": {**pod["metadata"], "annotations": {"a": "b"}}})
    hashed = {**noted["metadata"], "annotations": pod["metadata"]["annotations"] | {"a": "b"}}
    assert cache.put({**noted, "metadata": hashed}) is None, "nobody asks for that annotation"
    ran = server._keep({**pod, "status": {"phase": "Running"}})
    assert [cache.put(ran), cache.put(ran), cache.put(pod)] == [uid, None, None]
    assert [cache.put(ran, gone=True), cache.put(ran, gone=True)] == [uid, None]
    run = server.objects["DemoResetRun", "key"]
    assert [cache.put_run(run), cache.put_run(server._keep(run))] == [None, uid]


def test_what_a_look_has_changed_is_looked_at_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    server, controller, uid = made()
    looks: list[str] = []
    look = controller.reconcile

    async def counted(one: str) -> None:
        looks.append(one)
        await look(one)

    async def until_there_is_nothing_to_do() -> None:
        works = asyncio.create_task(controller.run())
        controller.wake(uid)
        while not looks or len(controller.queue) or controller._busy:
            await asyncio.sleep(0.01)
        works.cancel()

    monkeypatch.setattr(controller, "reconcile", counted)
    asyncio.run(until_there_is_nothing_to_do())
    assert looks == [uid, uid]
    for (kind, _), body in server.objects.items():
        if kind not in ("DemoResetRun", "Event"):
            assert controller.cache.put({**body, "kind": kind}) is None
    assert server.requests.count(("create", "Pod")) == 2  # one is the coordinator's


def written(clock: Clock) -> tuple[Server, Controller, str]:
    """A run with its pods, of which all is written."""
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    clock.now += 5
    asyncio.run(controller.reconcile(uid))
    return server, controller, uid


def deleted(clock: Clock) -> tuple[Server, Controller, str]:
    """The same, and its worker's pod was deleted then."""
    server, controller, uid = written(clock)
    controller.cache.put(server.objects.pop(("Pod", "key-worker-0-1")) | {"kind": "Pod"}, gone=True)
    return server, controller, uid


def test_who_was_lost_at_no_cost_is_replaced_before_one_status_tells_of_both(clock: Clock) -> None:
    server, controller, uid = deleted(clock)
    server.requests.clear()
    asyncio.run(controller.reconcile(uid))
    assert server.requests == [("create", "Pod"), WRITE, ("create", "Event")]
    status = server.objects["DemoResetRun", "key"]["status"]
    assert [one["cause"] for one in status["attempts"]] == ["Deleted"]
    assert [(one["attempt"], one["ended"]) for one in status["places"]] == [(2, 1)]
    assert ("Pod", "key-worker-0-2") in server.objects


def test_the_lost_of_all_runs_are_replaced_before_any_status_tells_of_them(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, controller, uid = written(clock)
    body = World().run_body
    other = {**body, "metadata": {**body["metadata"], "name": "other", "uid": "u-2"}}
    controller.cache.put_run(server._keep(other))
    for _ in range(2):
        asyncio.run(controller.reconcile("u-2"))
        clock.now += 5
    for name in ("key-worker-0-1", "other-worker-0-1"):
        controller.cache.put({**server.objects.pop(("Pod", name)), "kind": "Pod"}, gone=True)
    create = server.create

    async def slow(body: Json, *, dry_run: bool = False) -> Json | None:
        if body["metadata"]["name"].startswith("other"):
            await asyncio.sleep(0.01)
        return await create(body, dry_run=dry_run)

    async def both() -> None:
        await asyncio.gather(controller.reconcile(uid), controller.reconcile("u-2"))

    monkeypatch.setattr(server, "create", slow)
    server.requests.clear()
    asyncio.run(both())
    first = [one for one in server.requests if one in (("create", "Pod"), WRITE)]
    assert first[:2] == [("create", "Pod")] * 2
    assert first.count(WRITE) == 2


def test_a_loss_is_told_though_nobody_can_be_made_in_its_place(clock: Clock) -> None:
    server, controller, uid = deleted(clock)
    refuse(server, "etcd is away", lambda body: body["kind"] == "Pod", code=503)
    with pytest.raises(ApiError, match="etcd is away"):
        asyncio.run(controller.reconcile(uid))
    status = server.objects["DemoResetRun", "key"]["status"]
    assert [one["cause"] for one in status["attempts"]] == ["Deleted"]


def test_who_was_lost_is_judged_as_it_was_first_seen(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its pod vanishes while the next one is made."""
    server, controller, uid = written(clock)
    pod = server.objects["Pod", "key-worker-0-1"] | {"kind": "Pod"}
    evicted = {"phase": "Failed", "reason": "Evicted", "message": "disk pressure"}
    controller.cache.put(server._keep({**pod, "status": evicted}))
    create = controller._create

    async def meanwhile(*of: Any) -> None:
        await create(*of)
        controller.cache.put(pod, gone=True)

    monkeypatch.setattr(controller, "_create", meanwhile)
    asyncio.run(controller.reconcile(uid))
    (attempt,) = server.objects["DemoResetRun", "key"]["status"]["attempts"]
    assert (attempt["cause"], attempt["message"]) == ("Evicted", "Evicted: disk pressure")


def test_an_operator_that_dies_before_it_told_of_a_loss_finds_it_again(clock: Clock) -> None:
    server, controller, uid = deleted(clock)
    died = Controller(server, controller.cache, SETTINGS, Metrics())  # type: ignore[arg-type]
    died._write_status = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        asyncio.run(died.reconcile(uid))
    assert not server.objects["DemoResetRun", "key"]["status"]["attempts"]
    asyncio.run(controller.reconcile(uid))
    status = server.objects["DemoResetRun", "key"]["status"]
    assert [(one["attempt"], one["cause"]) for one in status["attempts"]] == [(1, "Deleted")]
    assert [name for kind, name in server.objects if "worker" in name] == ["key-worker-0-2"]


def test_a_late_word_about_an_earlier_pod_of_the_name_changes_nothing() -> None:
    server, controller, uid = made()
    asyncio.run(controller.reconcile(uid))
    cache, pod = controller.cache, server.objects["Pod", "key-worker-0-1"]
    version = int(pod["metadata"]["resourceVersion"])
    for older, ours in ((version - 1, True), (version + 1, False)):
        meta = {**pod["metadata"], "uid": "another", "resourceVersion": str(older)}
        cache.put({**pod, "metadata": meta, "kind": "Pod"})
        kept = {one.uid for one in cache.pods(uid) if one.name == "key-worker-0-1"}
        assert (pod["metadata"]["uid"] in kept) is ours


def test_what_is_gone_without_a_word_is_forgotten_with_the_next_list() -> None:
    server, controller, uid = made(workers={"max": 2})
    asyncio.run(controller.reconcile(uid))
    cache = controller.cache
    pod = server.objects["Pod", "key-worker-1-1"]["metadata"]["uid"]
    assert pod in cache.identities()
    assert cache.forget(pod) == uid
    assert "key-worker-1-1" not in {one.name for one in cache.pods(uid)}
    assert cache.forget("never seen") is None
