"""What the operator sees of a run, as plain values, parsed once at the edge."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from demoreset_api.names import (
    ANNOTATION_CONFIG,
    ANNOTATION_HASH,
    COMPONENT_COORDINATOR,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_WORKER,
)
from demoreset_api.spec import DemoResetRun, RunSpec
from demoreset_api.status import RunStatus

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A DemoResetRun that passed validation."""

    name: str
    namespace: str
    uid: str
    generation: int
    created: datetime
    labels: dict[str, str]
    spec: RunSpec
    status: RunStatus
    deleting: bool = False

    @property
    def reference(self) -> Json:
        """An object reference to it, for events."""
        return {
            "apiVersion": "demoreset.dev/v1alpha1",
            "kind": "DemoResetRun",
            "name": self.name,
            "namespace": self.namespace,
            "uid": self.uid,
        }


@dataclass(frozen=True)
class Pod:
    """A pod of a run.

    worker: its number; None for a coordinator. phase: Kubernetes' own. reason: of the pod, or of
    what its container waits for. disruption: why Kubernetes itself ended it. message: for people.
    last_words: the container's termination message.
    """

    name: str
    worker: int | None
    attempt: int
    hash: str
    config: str
    phase: str = "Pending"
    ip: str | None = None
    node: str | None = None
    created: datetime | None = None
    started: datetime | None = None
    deleting: bool = False
    reason: str = ""
    message: str = ""
    disruption: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    last_words: str = ""
    memory_limit: str | None = None

    @property
    def ended(self) -> bool:
        """Whether its container will never run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def live(self) -> bool:
        """Whether it trains, or is going to."""
        return not self.ended and not self.deleting


@dataclass(frozen=True)
class Told:
    """What a worker's /status said, and when."""

    at: datetime
    content: Json


@dataclass(frozen=True)
class Child:
    """Another object of a run: a ConfigMap, Service, claim, policy."""

    kind: str
    name: str
    hash: str
    deleting: bool = False


@dataclass(frozen=True)
class Observation:
    """All that a decision may depend on.

    told: by pod name. gone: names of pods of this run that vanished without having ended.
    """

    run: Run
    pods: tuple[Pod, ...] = ()
    children: tuple[Child, ...] = ()
    told: dict[str, Told] = field(default_factory=dict)

    @property
    def workers(self) -> list[Pod]:
        """Pods of workers."""
        return [pod for pod in self.pods if pod.worker is not None]

    @property
    def coordinators(self) -> list[Pod]:
        """Pods of the coordinator: one, and those that it replaces."""
        return [pod for pod in self.pods if pod.worker is None]


def parse_run(body: Json) -> Run:
    """A run as the API server has it.

    Raises:
        pydantic.ValidationError: this version of the operator knows other fields.
    """
    meta = body["metadata"]
    wanted = DemoResetRun.model_validate({k: v for k, v in body.items() if k != "status"})
    return Run(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta.get("generation", 0),
        created=parse_time(meta["creationTimestamp"]),
        labels=dict(meta.get("labels") or {}),
        spec=wanted.spec,
        status=RunStatus.model_validate(body.get("status") or {}),
        deleting="deletionTimestamp" in meta,
    )


def parse_pod(body: Json) -> Pod:
    """A pod as the API server has it."""
    meta, status = body["metadata"], body.get("status") or {}
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    container: Json = next(iter(status.get("containerStatuses") or []), {})
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    reason = status.get("reason") or waiting.get("reason") or ""
    message = status.get("message") or waiting.get("message") or ""
    if not reason and scheduled.get("status") == "False":
        reason, message = scheduled.get("reason", ""), scheduled.get("message", "")
    disruption = conditions.get("DisruptionTarget") or {}
    limits = body["spec"]["containers"][0].get("resources", {}).get("limits") or {}
    started = (state.get("running") or ended).get("startedAt")
    component = labels.get(LABEL_COMPONENT)
    return Pod(
        name=meta["name"],
        worker=None if component == COMPONENT_COORDINATOR else int(labels[LABEL_WORKER]),
        attempt=int(labels[LABEL_ATTEMPT]),
        hash=annotations.get(ANNOTATION_HASH, ""),
        config=annotations.get(ANNOTATION_CONFIG, ""),
        phase=status.get("phase", "Pending"),
        ip=status.get("podIP"),
        node=body["spec"].get("nodeName"),
        created=parse_time(meta["creationTimestamp"]),
        started=parse_time(started) if started else None,
        deleting="deletionTimestamp" in meta,
        reason=reason,
        message=message,
        disruption=disruption.get("reason", "") if disruption.get("status") == "True" else "",
        exit_code=ended.get("exitCode"),
        oom_killed=ended.get("reason") == "OOMKilled",
        last_words=ended.get("message") or "",
        memory_limit=limits.get("memory"),
    )


def parse_child(body: Json) -> Child:
    """Another object as the API server has it."""
    meta = body["metadata"]
    return Child(
        kind=body["kind"],
        name=meta["name"],
        hash=(meta.get("annotations") or {}).get(ANNOTATION_HASH, ""),
        deleting="deletionTimestamp" in meta,
    )


def parse_time(text: str) -> datetime:
    """A time of Kubernetes."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)
