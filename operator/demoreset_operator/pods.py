"""The pods of a run, built purely: the coordinator's and the workers'."""

from collections.abc import Mapping
from dataclasses import dataclass

from demoreset_api.names import (
    ANNOTATION_CONFIG,
    ANNOTATION_HASH,
    COMPONENT_COORDINATOR,
    COMPONENT_WORKER,
    COORDINATOR_PORT,
    ENV_ADDRESS,
    ENV_COORDINATOR,
    ENV_CORES,
    ENV_GRACE,
    ENV_ID,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_GENERATION,
    LABEL_RUN_UID,
    LABEL_WORKER,
    METRICS_PORT,
)
from demoreset_api.spec import Opaque
from demoreset_operator.observation import Json, Run
from demoreset_operator.render import (
    DATA,
    Settings,
    claim_name,
    config,
    config_name,
    coordinator_name,
    digest,
    object_of,
)

CONFIG = "/etc/demoreset"  # where a worker finds its run file
QUEUE = "kueue.x-k8s.io/queue-name"  # of the run, passed on to its pods
USER = 10001
LOST_NODE_SECONDS = 5  # that a pod stays on a node which is not heard of


def members_per_worker(run: Run) -> int:
    """Processes that train in one worker, as `demoreset worker` counts them."""
    workers = run.spec.workers
    return workers.members_per_worker or max(1, workers.gpus)


def coordinator(run: Run, settings: Settings, attempt: int) -> Json:
    """The pod that knows which members live; its kubelet starts it again in place."""
    workers = run.spec.workers
    least = workers.min * members_per_worker(run)
    container = {
        "name": "coordinator",
        "args": ["coordinator", "--min", str(least)],
        "ports": [{"name": "coordinator", "containerPort": COORDINATOR_PORT}],
        # One that is stopped and not dead would keep all of the group waiting, for ever. There is
        # no probe of its start: until it passed, a second later, the Service would lead nowhere.
        "livenessProbe": {
            "httpGet": {"path": "/status", "port": "coordinator"},
            "initialDelaySeconds": 60,  # a busy node gives it little of a core
            "periodSeconds": 5,
            "timeoutSeconds": 3,
        },
        "resources": {
            "requests": {"cpu": "10m", "memory": "48Mi"},
            "limits": {"memory": "128Mi"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        **_pod_spec(run, settings, container),
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 2,
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    name = f"{coordinator_name(run)}-{attempt}"
    made = _pod(run, COMPONENT_COORDINATOR, name, attempt, spec, {})
    # A quota of CPU limits refuses pods without one; the beats of some 700 members need a core.
    # It is not in the hash: a coordinator that was made without it is not replaced.
    made["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "1"
    _add(made, workers.common_labels, workers.common_annotations)
    return made


def worker_name(run: Run, worker: int, attempt: int) -> str:
    """A name of its own for every incarnation, so that none waits for another's end."""
    return f"{run.name}-worker-{worker}-{attempt}"


def worker(
    run: Run, settings: Settings, index: int, attempt: int, *, together: bool = False
) -> Json:
    """A pod that trains.

    Args:
        run: Whose worker it is.
        settings: The operator's.
        index: The worker's number.
        attempt: Which incarnation of it, from 1.
        together: Rather on a node with others of the run, which has their volume.
    """
    workers = run.spec.workers
    resources = _resources(run)
    address = f"{coordinator_name(run)}.{run.namespace}.svc:{COORDINATOR_PORT}"
    container = {
        "name": "worker",
        "args": [
            *("worker", "--file", f"{CONFIG}/run.json"),
            *("--dir", f"{DATA}/{run.name}", "--log", "json"),
        ],
        "env": [
            {"name": ENV_COORDINATOR, "value": address},
            {"name": ENV_ADDRESS, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": ENV_ID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": ENV_GRACE, "value": str(workers.grace_seconds)},
            {"name": "HOME", "value": "/tmp"},  # the root is read-only
            *_cores(resources),
        ],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": resources,
        # Long enough for imports and the replay of a long demo; a member that hangs is the
        # worker's own business, this is for a worker that does.
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": "metrics"},
            "initialDelaySeconds": 60,
            "periodSeconds": 20,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        # It trains: only then does it count for the disruption budget, so that a drain leaves the
        # last one that does until another has joined it.
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "metrics"},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",  # a crash before it can say anything
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "data", "mountPath": DATA},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    spec = {
        **_pod_spec(run, settings, container),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": workers.grace_seconds,
        "volumes": [
            {"name": "config", "configMap": {"name": config_name(run)}},
            {"name": "data", "persistentVolumeClaim": {"claimName": claim_name(run)}},
            {"name": "tmp", "emptyDir": {}},
            # What the environments' processes share; the default of 64 MB is soon full.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    for key, value in (
        ("affinity", workers.affinity),
        ("topologySpreadConstraints", workers.topology_spread_constraints),
        ("runtimeClassName", workers.runtime_class_name),
        ("schedulerName", workers.scheduler_name),
    ):
        if value:
            spec[key] = value
    # Of what is a wish of ours no pod is replaced.
    labels = {**workers.common_labels, **workers.labels}
    annotations = {**workers.common_annotations, **workers.annotations}
    mark = digest([spec, labels, annotations])
    if together and not workers.affinity:
        spec["affinity"] = {"podAffinity": _near(run)}
    made = _pod(
        run,
        COMPONENT_WORKER,
        worker_name(run, index, attempt),
        attempt,
        spec,
        {LABEL_WORKER: str(index)},
    )
    _add(made, labels, annotations)
    if queue := run.labels.get(QUEUE):
        made["metadata"]["labels"][QUEUE] = queue
    made["metadata"]["annotations"] |= {
        ANNOTATION_HASH: mark,
        ANNOTATION_CONFIG: digest(config(run)),
    }
    return made


@dataclass(frozen=True)
class Wanted:
    """What pods are to be made of; one with another hash is to be replaced.

    config: what workers are told to learn.
    """

    worker: str
    coordinator: str
    config: str


def wanted(run: Run, settings: Settings) -> Wanted:
    """The hashes of a run as its spec says now."""
    made = worker(run, settings, 0, 0)["metadata"]["annotations"]
    other = coordinator(run, settings, 0)["metadata"]["annotations"]
    return Wanted(made[ANNOTATION_HASH], other[ANNOTATION_HASH], made[ANNOTATION_CONFIG])


def _pod_spec(run: Run, settings: Settings, container: Json) -> Json:
    """What worker and coordinator have in common: which nodes they may run on, and as whom.

    How workers keep together or apart is not the coordinator's business: with one worker a node
    there might be none left for it, and nobody trains without it.
    """
    workers = run.spec.workers
    policy = workers.image_pull_policy or (None if workers.image else settings.pull_policy)
    ours = container.get("env", [])
    names = {one["name"] for one in ours}
    theirs = [{"name": k, "value": v} for k, v in workers.env.items() if k not in names]
    container = {
        "image": workers.image or settings.image,
        **({"imagePullPolicy": policy} if policy else {}),
        **container,
        **({"env": [*theirs, *ours]} if theirs else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec: Json = {
        "containers": [container],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    for key, value in (
        ("nodeSelector", workers.node_selector),
        ("tolerations", [*_leaves_lost_nodes(workers.tolerations), *workers.tolerations]),
        ("affinity", {k: v for k, v in (workers.affinity or {}).items() if k == "nodeAffinity"}),
        ("priorityClassName", workers.priority_class_name),
        ("imagePullSecrets", [{"name": name} for name in workers.image_pull_secrets]),
    ):
        if value:
            spec[key] = value
    return spec


def _resources(run: Run) -> Json:
    """What a worker asks for; without GPUs half a core a member, where nothing is said.

    A member then computes with one thread. Half of it is promised, so that small nodes hold some.
    """
    workers = run.spec.workers
    resources = workers.resources.model_dump(mode="json")
    requests, limits = resources["requests"], resources["limits"]
    if workers.gpus:
        limits["nvidia.com/gpu"] = str(workers.gpus)
    elif "cpu" not in requests | limits:
        requests["cpu"] = f"{500 * members_per_worker(run)}m"
    return resources


def _cores(resources: Json) -> list[Json]:
    """The variable that tells a worker its cores, rounded up by the kubelet; else it takes all.

    Three workers with as many threads each as their node had cores, two, trained at a fifth of the
    speed that they had with one thread each.
    """
    for kind in ("limits", "requests"):
        if "cpu" in resources[kind]:
            its = {"containerName": "worker", "resource": f"{kind}.cpu", "divisor": "1"}
            return [{"name": ENV_CORES, "valueFrom": {"resourceFieldRef": its}}]
    return []


def _near(run: Run) -> Json:
    """An affinity that prefers nodes with workers of this run; not more: the node may be lost."""
    found = {LABEL_RUN_UID: run.uid, LABEL_COMPONENT: COMPONENT_WORKER}
    term = {
        "labelSelector": {"matchLabels": found},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "podAffinityTerm": term}
        ]
    }


def _leaves_lost_nodes(tolerations: list[Opaque]) -> list[Json]:
    """Tolerations without which a pod stays bound to a lost node for five minutes.

    They come first: of several that match a taint the first one counts, and one that tolerates
    everything would keep it there for ever.
    """
    keys = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    wanted = {one.get("key") for one in tolerations}
    return [
        {
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": LOST_NODE_SECONDS,
        }
        for key in keys
        if key not in wanted
    ]


def _pod(
    run: Run, component: str, name: str, attempt: int, spec: Json, more: dict[str, str]
) -> Json:
    made = object_of(run, "v1", "Pod", name, component, spec=spec)
    made["metadata"]["labels"] |= {
        LABEL_ATTEMPT: str(attempt),
        LABEL_GENERATION: str(run.generation),
        **more,
    }
    made["metadata"]["annotations"] = {ANNOTATION_HASH: digest(spec)}
    return made


def _add(pod: Json, labels: Mapping[str, str], annotations: Mapping[str, str]) -> None:
    """Give a pod more labels and annotations; its own win."""
    for kind, more in (("labels", labels), ("annotations", annotations)):
        pod["metadata"][kind] = {**more, **pod["metadata"][kind]}
