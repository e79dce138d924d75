"""A real Prometheus in the cluster, which scrapes what the chart's PodMonitors say.

It is a pod, as the Prometheus operator would make one, so that the runs' NetworkPolicies are tried
as well; its program is Debian's package in the test cluster, an image elsewhere. Questions reach it
through the API server.
"""

import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from kube import CHART, OPERATOR, Cluster, Json

INTERVAL = 1  # second between scrapes, and between evaluations of the alerts
ENABLED = ("podMonitor.enabled=true", "prometheusRule.enabled=true", "dashboards.enabled=true")
PORT = 9090
FILES, DATA = "/etc/prometheus", "/prometheus"
TARGETS = f"{DATA}/pods.json"


class Prometheus:
    """Answers questions about a range of time."""

    def __init__(self, api_server: str, namespace: str) -> None:
        pod = f"namespaces/{namespace}/pods/prometheus:{PORT}"
        self._address = f"{api_server}/api/v1/{pod}/proxy/api/v1"

    def answer(self, what: str, **parameters: str) -> Any:
        """What its HTTP API says of, say, `rules`."""
        with urlopen(f"{self._address}/{what}?{urlencode(parameters)}", timeout=30) as said:
            return json.load(said)["data"]

    def series(self, expression: str, start: float, end: float, step: float) -> list[Json]:
        """Series of an expression: their labels `metric`, and `values` as (time, text)."""
        times = {"start": str(start), "end": str(end), "step": str(step)}
        return list(self.answer("query_range", query=expression, **times)["result"])


def image() -> str | None:
    """An image with a Prometheus: in the test cluster all have this machine's programs."""
    if "KUBECONFIG" in os.environ:
        return os.environ.get("DEMORESET_PROMETHEUS_IMAGE")
    return OPERATOR if shutil.which("prometheus") else None


def rendered(cluster: Cluster, operator: str) -> list[Json]:
    """The chart's objects for monitoring, as it was installed in the operator's namespace."""
    settings = (*ENABLED, f"podMonitor.interval={INTERVAL}s")
    flags = [part for one in settings for part in ("--set", one)]
    text = cluster.helm("template", "demoreset", str(CHART), "--namespace", operator, *flags)
    return [one for one in yaml.safe_load_all(text) if one]


def configuration(objects: list[Json]) -> dict[str, str]:
    """Prometheus' files for the PodMonitors and PrometheusRules among these objects."""
    scrapes = [
        scrape(one, number)
        for one in objects
        if one["kind"] == "PodMonitor"
        for number in range(len(one["spec"]["podMetricsEndpoints"]))
    ]
    groups = [
        group
        for one in objects
        if one["kind"] == "PrometheusRule"
        for group in one["spec"]["groups"]
    ]
    main = {
        "global": {"evaluation_interval": f"{INTERVAL}s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": scrapes,
    }
    return {"prometheus.yml": json.dumps(main), "rules.yml": json.dumps({"groups": groups})}


def scrape(monitor: Json, number: int) -> Json:
    """One endpoint of a PodMonitor, as the Prometheus operator puts it."""
    meta, spec = monitor["metadata"], monitor["spec"]
    endpoint = spec["podMetricsEndpoints"][number]
    return {
        "job_name": f"podMonitor/{meta['namespace']}/{meta['name']}/{number}",
        "scrape_interval": endpoint["interval"],
        "scrape_timeout": endpoint["interval"],
        "honor_labels": endpoint.get("honorLabels", False),
        "file_sd_configs": [{"files": [TARGETS]}],
        "relabel_configs": [
            {**_source("pod_phase"), "regex": "Failed|Succeeded", "action": "drop"},
            *_selected(meta["namespace"], spec),
            {**_source("pod_container_port_name"), "regex": endpoint["port"], "action": "keep"},
            {**_source("namespace"), "target_label": "namespace"},
            {**_source("pod_container_name"), "target_label": "container"},
            {**_source("pod_name"), "target_label": "pod"},
            {"target_label": "job", "replacement": f"{meta['namespace']}/{meta['name']}"},
            {"target_label": "endpoint", "replacement": endpoint["port"]},
            *(
                {_snake(key): value for key, value in one.items()}
                for one in endpoint.get("relabelings", ())
            ),
        ],
    }


def _selected(own: str, spec: Json) -> Iterator[Json]:
    """Keeps the pods that a PodMonitor selects."""
    where = spec.get("namespaceSelector", {"matchNames": [own]})
    if not where.get("any"):
        names = "|".join(where["matchNames"])
        yield {**_source("namespace"), "regex": names, "action": "keep"}
    for label, value in spec["selector"].get("matchLabels", {}).items():
        yield {**_source(f"pod_label_{_plain(label)}"), "regex": value, "action": "keep"}
    for one in spec["selector"].get("matchExpressions", ()):
        assert one["operator"] == "Exists", f"{one}: write down here what it means"
        there = _source(f"pod_labelpresent_{_plain(one['key'])}")
        yield {**there, "regex": "true", "action": "keep"}


def _source(name: str) -> Json:
    return {"source_labels": [f"__meta_kubernetes_{name}"]}


def _plain(label: str) -> str:
    return re.sub(r"\W", "_", label)


def _snake(key: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", key)


def targets(pods: list[Json]) -> list[Json]:
    """All ports of all pods, with the labels that Prometheus' own discovery gives them.

    Debian's Prometheus has no discovery for Kubernetes.
    """
    return [
        {
            "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
            "labels": _meta(pod, container["name"], port),
        }
        for pod in pods
        if "podIP" in pod["status"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    ]


def _meta(pod: Json, container: str, port: Json) -> dict[str, str]:
    meta = pod["metadata"]
    found = {
        "namespace": meta["namespace"],
        "pod_name": meta["name"],
        "pod_phase": pod["status"]["phase"],
        "pod_container_name": container,
        "pod_container_port_name": port.get("name", ""),
    }
    for label, value in meta.get("labels", {}).items():
        found |= {f"pod_label_{_plain(label)}": value, f"pod_labelpresent_{_plain(label)}": "true"}
    return {f"__meta_kubernetes_{name}": value for name, value in found.items()}


def _made(namespace: str, image: str, files: dict[str, str]) -> list[Json]:
    """The pod and its files."""
    name = {"name": "prometheus", "namespace": namespace}
    # The label by which the runs' NetworkPolicies know it.
    labels = {"app.kubernetes.io/name": "prometheus"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": files},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**name, "labels": labels},
            "spec": _pod(image),
        },
    ]


def _pod(image: str) -> Json:
    folders = {"files": FILES, "data": DATA}
    container = {
        "name": "prometheus",
        "image": image,
        "command": ["prometheus"],
        "args": [f"--config.file={FILES}/prometheus.yml", f"--storage.tsdb.path={DATA}"],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": PORT}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in folders.items()],
    }
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65534,
            "fsGroup": 65534,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "files", "configMap": {"name": "prometheus"}},
            {"name": "data", "emptyDir": {}},
        ],
    }


@contextmanager
def started(cluster: Cluster, objects: list[Json], image: str) -> Iterator[Prometheus]:
    """A Prometheus in a namespace of its own, which knows all pods of the cluster."""
    namespace = f"prometheus-{secrets.token_hex(2)}"
    files = configuration(objects)
    made = {"apiVersion": "v1", "kind": "List", "items": _made(namespace, image, files)}
    ready = ("--for=condition=Ready", "--timeout=60s")
    cluster.kubectl("create", "namespace", namespace)
    try:
        cluster.apply(namespace, made)
        cluster.kubectl("wait", "pod/prometheus", "-n", namespace, *ready)
        with _discovery(cluster, namespace):
            yield Prometheus(cluster.api, namespace)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@contextmanager
def _discovery(cluster: Cluster, namespace: str) -> Iterator[None]:
    """Tells it of pods that come and go."""
    over = threading.Event()

    def follow() -> None:
        told = ""
        while not over.is_set():
            if (now := json.dumps(targets(cluster.get("", "pods")))) != told:
                write = ("sh", "-c", f"cat > {TARGETS}.partial && mv {TARGETS}.partial {TARGETS}")
                cluster.kubectl(
                    "exec", "-i", "-n", namespace, "prometheus", "--", *write, given=now
                )
                told = now
            over.wait(1)

    thread = threading.Thread(target=follow, name="discovery")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
