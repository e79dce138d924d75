"""What the operator sees of a run, as plain values, parsed once at the edge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from demoreset_api.names import (
    ANNOTATION_CONFIG,
    ANNOTATION_HASH,
    API_VERSION,
    ASIDE,
    COMPONENT_COORDINATOR,
    KIND,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_WORKER,
    MANAGER,
)
from demoreset_api.spec import DemoResetRun, RunSpec
from demoreset_api.status import RunStatus
from demoreset_operator.worker_status import Answer

Json = dict[str, Any]
# An image that cannot be had, a volume or Secret that is not there: the kubelet tries for ever.
HOPELESS_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
# How a container ended that a node has lost sight of, as when it was started again.
UNKNOWN_REASONS = ("Unknown", "ContainerStatusUnknown")
UNANSWERED = 6  # questions that a worker may leave unanswered before that means something
LOAD = timedelta(minutes=10)  # for a worker to load and join; its own supervisor gives up sooner
STUCK_AFTER = timedelta(seconds=30)  # after a deleted pod's grace, until it counts as gone


@dataclass(frozen=True)
class Run:
    """A DemoResetRun that passed validation."""

    name: str
    namespace: str
    uid: str
    generation: int
    labels: dict[str, str]
    spec: RunSpec
    status: RunStatus
    deleting: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this operator's to look after."""
        return self.spec.managed_by in (None, MANAGER)

    @property
    def reference(self) -> Json:
        """An object reference to it, for events."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "namespace": self.namespace,
            "uid": self.uid,
        }


@dataclass(frozen=True)
class Pod:
    """A pod of a run.

    worker: its number; None for a coordinator. phase: Kubernetes' own. scheduled: onto a node.
    deleted: when it was told to end. leaves_at: when a deleted pod's grace is over. reason: of the
    pod, or of what its container waits for. failing: since when that is hopeless, as far as the
    operator has seen. disruption: why Kubernetes itself ended it. outlived: a worker's container
    has ended for good, and a sidecar that somebody put beside it runs on. unknown: its node does
    not know how its container ended. message: for people. unready: which container that somebody
    put before it failed, and how. last_words: the container's termination message. ready: its
    container is there, and answers where it is asked, a worker's once it trains; between its ends,
    too, one that crashes is `Running`.
    """

    name: str
    worker: int | None
    attempt: int
    hash: str
    config: str
    phase: str = "Pending"
    ip: str | None = None
    node: str | None = None
    scheduled: datetime | None = None
    started: datetime | None = None
    finished: datetime | None = None
    deleted: datetime | None = None
    leaves_at: datetime | None = None
    failing: datetime | None = None
    uid: str = ""
    reason: str = ""
    message: str = ""
    disruption: str = ""
    exit_code: int | None = None
    outlived: bool = False
    oom_killed: bool = False
    unknown: bool = False
    unready: str = ""
    last_words: str = ""
    memory_limit: str | None = None
    ready: bool = False

    @property
    def index(self) -> int:
        """Its worker's number; coordinators have none, and are not asked for it."""
        assert self.worker is not None, f"{self.name} is a coordinator"
        return self.worker

    @property
    def ended(self) -> bool:
        """Whether its container will never run again."""
        return self.phase in ("Succeeded", "Failed") or self.outlived

    @property
    def ended_at(self) -> datetime | None:
        """When its container ended, or it was told to, as far as that is known."""
        return self.finished or self.deleted

    @property
    def lingers(self) -> bool:
        """Whether it has ended, and keeps its node's room all the same."""
        return self.outlived and not self.deleting

    @property
    def deleting(self) -> bool:
        """Whether it was told to end."""
        return self.leaves_at is not None

    @property
    def live(self) -> bool:
        """Whether it trains, or is going to."""
        return not self.ended and not self.deleting

    def present(self, now: datetime) -> bool:
        """Whether it may still do something: what is stuck on a dead node does not.

        Should it come back, its life's order keeps it from doing harm (docs/elastic.md).
        """
        return not self.ended and (self.leaves_at is None or now <= self.leaves_at + STUCK_AFTER)


@dataclass(frozen=True)
class Child:
    """Another object of a run: a ConfigMap, Service, claim, policy.

    access: of a claim, from how many nodes its volume can be used. unbound: whether it is a claim
    that has no volume.
    """

    kind: str
    name: str
    hash: str
    uid: str = ""
    access: tuple[str, ...] = ()
    unbound: bool = False
    deleting: bool = False


@dataclass(frozen=True)
class Observation:
    """All that a decision may depend on.

    answers: the latest of workers, by pod name. missed: how often in a row they did not answer.
    deleted: pods that the operator has deleted. refused: what the API server said of the latest
    request that it would not take. unfit: whether it would not take a pod as the run says now.
    claimed: whether a claim has the name of the run's, and is not known as its.
    """

    run: Run
    pods: tuple[Pod, ...] = ()
    children: tuple[Child, ...] = ()
    answers: dict[str, Answer] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    deleted: frozenset[str] = frozenset()
    refused: str = ""
    unfit: bool = False
    claimed: bool = False

    @property
    def workers(self) -> list[Pod]:
        """Pods of workers."""
        return [pod for pod in self.pods if pod.worker is not None]

    def training(self, now: datetime) -> set[str]:
        """Names of pods whose worker trains: it said so lately."""
        return training(self.pods, self.answers, now)

    def heard(self, now: datetime) -> dict[str, Answer]:
        """The answers of workers that live, by their pods' names, where they still hold."""
        return {
            pod.name: self.answers[pod.name]
            for pod in self.workers
            if pod.live and pod.name in self.answers and now <= self.answers[pod.name].until
        }

    def aside(self, pod: Pod) -> bool:
        """Whether a pod's worker sits out, by its latest answer."""
        return pod.name in self.answers and self.answers[pod.name].status.phase == ASIDE

    @property
    def unasked(self) -> bool:
        """Whether a worker that runs was not heard yet: an operator that has just begun."""
        return any(
            pod.live
            and pod.phase == "Running"
            and pod.name not in self.answers
            and self.missed.get(pod.name, 0) < UNANSWERED
            for pod in self.workers
        )

    @property
    def coordinators(self) -> list[Pod]:
        """Pods of the coordinator: one, and those that it replaces."""
        return [pod for pod in self.pods if pod.worker is None]


def training(pods: Iterable[Pod], answers: Mapping[str, Answer], now: datetime) -> set[str]:
    """Names of pods whose worker trains: it said so lately."""
    heard = {pod.name: answers[pod.name] for pod in pods if pod.live and pod.name in answers}
    return {name for name, answer in heard.items() if answer.trains(now)}


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
        labels=dict(meta.get("labels") or {}),
        spec=wanted.spec,
        status=RunStatus.model_validate(body.get("status") or {}),
        deleting="deletionTimestamp" in meta,
    )


def not_understood(error: ValidationError) -> str:
    """Where a run is other than this version knows."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def parse_pod(body: Json) -> Pod:
    """A pod as the API server has it."""
    meta, status = body["metadata"], body.get("status") or {}
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    component = labels.get(LABEL_COMPONENT)
    own = "coordinator" if component == COMPONENT_COORDINATOR else "worker"  # not a sidecar
    containers = status.get("containerStatuses") or []
    container: Json = _named(own, containers)
    others = [one for one in containers if "running" in (one.get("state") or {})]
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    reason, message = trouble(status, own)
    disruption = conditions.get("DisruptionTarget") or {}
    leaves_at = _time(meta.get("deletionTimestamp"))
    grace = timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0)
    limits = _named(own, body["spec"]["containers"]).get("resources", {}).get("limits") or {}
    return Pod(
        name=meta["name"],
        worker=None if component == COMPONENT_COORDINATOR else int(labels[LABEL_WORKER]),
        attempt=int(labels[LABEL_ATTEMPT]),
        hash=annotations.get(ANNOTATION_HASH, ""),
        config=annotations.get(ANNOTATION_CONFIG, ""),
        phase=status.get("phase", "Pending"),
        ip=status.get("podIP"),
        node=body["spec"].get("nodeName"),
        scheduled=_time(scheduled.get("lastTransitionTime"))
        if scheduled.get("status") == "True"
        else None,
        started=_time((state.get("running") or ended).get("startedAt")),
        finished=_time(ended.get("finishedAt")),
        deleted=leaves_at - grace if leaves_at is not None else None,
        leaves_at=leaves_at,
        uid=meta["uid"],
        reason=reason,
        message=message,
        disruption=disruption.get("reason", "") if disruption.get("status") == "True" else "",
        exit_code=ended.get("exitCode"),
        outlived=own == "worker" and bool(ended and others),
        oom_killed=ended.get("reason") == "OOMKilled",
        unknown=ended.get("reason") in UNKNOWN_REASONS,
        unready=_unready(status.get("initContainerStatuses") or []),
        last_words=ended.get("message") or "",
        memory_limit=limits.get("memory"),
        ready=(conditions.get("Ready") or {}).get("status") == "True",
    )


def trouble(status: Json, container: str) -> tuple[str, str]:
    """What a pod waits for, or why it ended: Kubernetes' word and message; empty where all is well.

    Args:
        status: The pod's.
        container: Whose word counts.
    """
    state = _named(container, status.get("containerStatuses") or []).get("state") or {}
    waiting = state.get("waiting") or {}
    reason = status.get("reason") or waiting.get("reason") or ""
    message = status.get("message") or waiting.get("message") or ""
    for one in status.get("conditions") or []:
        if not reason and one["type"] == "PodScheduled" and one["status"] == "False":
            reason, message = one.get("reason", ""), one.get("message", "")
    return reason, message


def failing(pod: Pod, before: Pod | None, now: datetime) -> Pod:
    """A pod, with since when the kubelet cannot start it; its own words have no time of that."""
    if pod.reason not in HOPELESS_REASONS:
        return pod
    return replace(pod, failing=before.failing if before and before.failing else now)


def _unready(containers: list[Json]) -> str:
    """The first container that failed before the worker's could begin, and how; in words."""
    for one in containers:
        ended = (one.get("state") or {}).get("terminated") or {}
        if code := ended.get("exitCode"):
            message = ended.get("message") or ended.get("reason") or ""
            return f"init container {one['name']}: exit code {code}: {message}".removesuffix(": ")
    return ""


def parse_child(body: Json) -> Child:
    """Another object as the API server has it."""
    meta = body["metadata"]
    return Child(
        kind=body["kind"],
        name=meta["name"],
        hash=(meta.get("annotations") or {}).get(ANNOTATION_HASH, ""),
        uid=meta["uid"],
        access=tuple(body.get("spec", {}).get("accessModes", ())),
        unbound=(body.get("status") or {}).get("phase") == "Pending",
        deleting="deletionTimestamp" in meta,
    )


def _named(name: str, containers: list[Json]) -> Json:
    return next((one for one in containers if one["name"] == name), {})


def _time(text: str | None) -> datetime | None:
    """A time; None where there is none, as of a container that ended before it began (1970)."""
    time = parse_time(text) if text else None
    return time if time is not None and time.year > 1970 else None


def parse_time(text: str) -> datetime:
    """A time of Kubernetes."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)
