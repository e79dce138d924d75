"""The objects of a run, built purely: what a run wants is what this and `pods` say."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from demoreset_api.names import (
    ANNOTATION_HASH,
    ANNOTATION_IMAGE,
    API_VERSION,
    COMPONENT_COORDINATOR,
    COMPONENT_WORKER,
    COORDINATOR_PORT,
    KIND,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_RUN,
    LABEL_RUN_UID,
    LABEL_VERSION,
    METRICS_PORT,
    OPERATOR_NAME,
)
from demoreset_api.spec import AccessMode, Retention
from demoreset_operator.observation import Child, Json, Run

INSTANCE = "app.kubernetes.io/instance"
DATA = "/data"  # where a worker finds its volume
# A policy sees the port of the pods behind the Service: vCluster's, OpenShift's, Gardener's.
DNS_PORTS = (53, 1053, 5353, 8053)
VERSION = version("demoreset").partition("+")[0]  # as a label may have it
# What changes nothing for a worker: the operator's business, or the pods' template.
NOT_CONFIG = {
    "suspend",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "pendingDeadlineSeconds",
    "managedBy",
    "restart",
}
CONFIG_OF_WORKERS = {"membersPerWorker", "gpus", "collectives"}


@dataclass(frozen=True)
class Settings:
    """What the operator was told for all runs.

    image, pull_policy: of workers of runs that name none. namespace: the operator's own.
    """

    image: str
    pull_policy: str | None = None
    namespace: str = "default"


def digest(content: Any) -> str:
    """A short name for a content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def config(run: Run) -> Json:
    """The run file that workers read: what is other than the defaults.

    So a field that a later version adds changes nothing for runs that do not use it, and an older
    image of the trainer does not meet a field that it does not know.
    """
    spec = run.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    kept = {key: value for key, value in spec.items() if key not in NOT_CONFIG}
    parts = {
        "checkpoint": {k: v for k, v in spec.get("checkpoint", {}).items() if k != "volume"},
        "workers": {k: v for k, v in spec.get("workers", {}).items() if k in CONFIG_OF_WORKERS},
    }
    for key, part in parts.items():
        kept.pop(key, None)
        if part:
            kept[key] = part
    if run.spec.demo.path is not None:
        kept["demo"] = {**spec["demo"], "path": f"{DATA}/{run.spec.demo.path.lstrip('/')}"}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": run.name},
        "spec": kept,
    }


def labels(run: Run, component: str) -> dict[str, str]:
    """What every object of a run carries."""
    return {
        "app.kubernetes.io/name": "demoreset",
        INSTANCE: run.name,
        LABEL_COMPONENT: component,
        "app.kubernetes.io/part-of": "demoreset",
        LABEL_MANAGED_BY: OPERATOR_NAME,
        LABEL_RUN: run.name,
        LABEL_RUN_UID: run.uid,
    }


def selector(run: Run) -> str:
    """The label selector that finds a run's workers."""
    return f"{LABEL_RUN_UID}={run.uid},{LABEL_COMPONENT}={COMPONENT_WORKER}"


def children(run: Run, settings: Settings) -> list[Json]:
    """All objects of a run but its pods, as they are to be."""
    made = [config_map(run, settings), service(run), network_policy(run, settings)]
    if run.spec.checkpoint.volume.claim is None:
        made.append(claim(run))
    if run.spec.workers.max > 1:
        made.append(disruption_budget(run))
    return made


def object_of(
    run: Run,
    api: str,
    kind: str,
    name: str,
    component: str,
    *,
    owned: bool = True,
    annotations: Mapping[str, str] | None = None,
    **content: Any,
) -> Json:
    """An object with its labels, its owner and the hash of what it is made of."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": run.name,
        "uid": run.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    made: Json = {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name, "namespace": run.namespace, "labels": labels(run, component)},
        **content,
    }
    if annotations is not None:
        made["metadata"]["annotations"] = annotations
    made["metadata"]["annotations"] = {**(annotations or {}), ANNOTATION_HASH: digest(made)}
    made["metadata"]["labels"][LABEL_VERSION] = VERSION  # of which nothing is made anew
    if owned:
        made["metadata"]["ownerReferences"] = [owner]
    else:  # Argo CD may take what has this label, and no owner, for its own, and delete it
        del made["metadata"]["labels"][INSTANCE]
    return made


def config_name(run: Run) -> str:
    """The ConfigMap's name, another one for another content: pods that live keep what they have."""
    return f"{run.name}-{digest(config(run))}"


def config_map(run: Run, settings: Settings) -> Json:
    """The run file. JSON, which is YAML. And the image that reads what was learned by it."""
    text = json.dumps(config(run), indent=2, ensure_ascii=False) + "\n"
    return object_of(
        run,
        "v1",
        "ConfigMap",
        config_name(run),
        "config",
        annotations={ANNOTATION_IMAGE: run.spec.workers.image or settings.image},
        immutable=True,
        data={"run.json": text},
    )


def claim_name(run: Run) -> str:
    """The name of the claim on the volume that holds the run's folder."""
    return run.spec.checkpoint.volume.claim or f"{run.name}-data"


def claim(run: Run) -> Json:
    """The run's own volume; where it is retained, nobody owns it."""
    volume = run.spec.checkpoint.volume
    many = run.spec.workers.max > 1
    mode = volume.access_mode or (AccessMode.MANY if many else AccessMode.ONCE)
    spec: Json = {
        "accessModes": [mode.value],
        "resources": {"requests": {"storage": volume.size}},
    }
    if volume.storage_class_name is not None:
        spec["storageClassName"] = volume.storage_class_name
    return object_of(
        run,
        "v1",
        "PersistentVolumeClaim",
        claim_name(run),
        "volume",
        owned=volume.retention is Retention.DELETE,
        spec=spec,
    )


def one_node(run: Run, children: Sequence[Child]) -> bool:
    """Whether the run's own volume can be used from one node at a time only.

    By the claim that is there: it stays as it was made when the group grows.
    """
    if run.spec.checkpoint.volume.claim is not None:
        return False  # somebody else's: nothing is known of it
    made = [one.access for one in children if one.kind == "PersistentVolumeClaim"]
    access = made[0] if made else claim(run)["spec"]["accessModes"]
    return AccessMode.MANY.value not in access


def coordinator_name(run: Run) -> str:
    """The name of the Service, under which members find the coordinator."""
    return f"{run.name}-coordinator"


def service(run: Run) -> Json:
    """The coordinator's address, whichever pod it is."""
    return object_of(
        run,
        "v1",
        "Service",
        coordinator_name(run),
        COMPONENT_COORDINATOR,
        spec={
            "selector": {LABEL_RUN_UID: run.uid, LABEL_COMPONENT: COMPONENT_COORDINATOR},
            "ports": [{"name": "coordinator", "port": COORDINATOR_PORT, "protocol": "TCP"}],
        },
    )


def network_policy(run: Run, settings: Settings) -> Json:
    """Only a run's own pods talk to one another; its metrics are for the operator and Prometheus.

    The ports of members and coordinator know no passwords.
    """
    own = {"podSelector": {"matchLabels": {LABEL_RUN_UID: run.uid}}}
    readers = [
        {
            "namespaceSelector": {
                "matchLabels": {"kubernetes.io/metadata.name": settings.namespace}
            },
            "podSelector": {"matchLabels": {LABEL_COMPONENT: "operator"}},
        },
        {
            "namespaceSelector": {},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
        },
    ]
    dns = [{"port": at, "protocol": how} for at in DNS_PORTS for how in ("UDP", "TCP")]
    return object_of(
        run,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        run.name,
        "network",
        spec={
            "podSelector": {"matchLabels": {LABEL_RUN_UID: run.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": readers, "ports": [{"port": METRICS_PORT, "protocol": "TCP"}]},
            ],
            "egress": [{"to": [own]}, {"ports": dns}],
        },
    )


def disruption_budget(run: Run) -> Json:
    """Drains leave as many workers as the run needs to train, and one where it has several."""
    workers = run.spec.workers
    return object_of(
        run,
        "policy/v1",
        "PodDisruptionBudget",
        run.name,
        COMPONENT_WORKER,
        spec={
            "minAvailable": max(1, min(workers.min, workers.max - 1)),
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {
                "matchLabels": {LABEL_RUN_UID: run.uid, LABEL_COMPONENT: COMPONENT_WORKER}
            },
        },
    )
