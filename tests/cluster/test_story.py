"""A user's story: apply a run, watch it, hurt it, and see it finish."""

import json
from typing import Any

import pytest
import yaml

from kube import ROOT, Cluster, until

RUN = "freeway-crossing"
CORE = {"requests": {"cpu": "500m"}, "limits": {"cpu": 1}}


class Told:
    """A run, as kubectl tells of it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.get(self.namespace, "drr", self.name)
        return dict(found.get("status") or {})

    @property
    def update(self) -> int:
        return int((self.status.get("training") or {}).get("update", 0))

    def pods(self, component: str = "worker") -> dict[str, dict[str, Any]]:
        selector = f"demoreset.dev/run={self.name},app.kubernetes.io/component={component}"
        found = self.cluster.get(self.namespace, "pods", selector=selector)
        return {body["metadata"]["name"]: body for body in found}

    def live(self) -> list[str]:
        return [
            name
            for name, body in self.pods().items()
            if body["status"]["phase"] == "Running" and "deletionTimestamp" not in body["metadata"]
        ]

    def ready(self, count: int, patience: float = 240) -> None:
        until(
            lambda: (
                self.status.get("workers", {}).get("shown") == f"{count}/{count}"
                and self.status["workers"]["members"] == count
            ),
            f"{count} workers train together",
            patience,
        )

    def goes_on(self, patience: float = 150) -> None:
        before = self.update
        until(lambda: self.update > before + 1, f"updates beyond {before}", patience)

    def kill(self, name: str) -> None:
        command = ["delete", "pod", name, "-n", self.namespace]
        self.cluster.kubectl(*command, "--grace-period=0", "--force")

    def patch(self, **spec: Any) -> None:
        patch = json.dumps({"spec": spec})
        command = ["patch", "drr", self.name, "-n", self.namespace, "--type=merge", "-p", patch]
        self.cluster.kubectl(*command)

    def condition(self, kind: str) -> dict[str, Any]:
        found = [one for one in self.status.get("conditions", []) if one["type"] == kind]
        return found[0] if found else {}


@pytest.fixture
def wanted() -> dict[str, Any]:
    """The bundled run that is learned soonest, as it is in the repository; nothing is kept."""
    body: dict[str, Any] = yaml.safe_load((ROOT / f"demos/{RUN}.yaml").read_text())
    body["spec"]["checkpoint"] = {
        "intervalSeconds": 5,
        "volume": {"size": "1Gi", "retention": "Delete"},
    }
    return body


def test_a_run_survives_what_clusters_do_and_completes(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    # On one machine: with one thread each they do not wait for one another.
    wanted["spec"]["workers"] = {"min": 1, "max": 3, "resources": CORE}
    # There is much to go through before its goal may be met: no policy is that good.
    wanted["spec"]["goal"] = {"successRate": 1, "episodes": 300}
    wanted["spec"]["environment"] = {"stickyProbability": 0.25}
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(3)
    run.goes_on()
    # A worker is killed without a grace time; the first one is the writer.
    for name in (sorted(run.live())[-1], sorted(run.live())[0]):
        run.kill(name)
        run.goes_on()
        run.ready(3)
    causes = [attempt["cause"] for attempt in run.status["attempts"]]
    assert causes == ["Deleted", "Deleted"]
    assert run.status["restarts"] == {"total": 2, "counted": 0}
    # The coordinator.
    (coordinator,) = run.pods("coordinator")
    run.kill(coordinator)
    run.goes_on()
    assert coordinator not in run.pods("coordinator")
    # The operator: the run does not need it.
    cluster.kubectl("delete", "pods", "-n", operator, "--all", "--grace-period=0", "--force")
    run.goes_on()
    assert run.status["restarts"]["total"] == 2, "no pod was touched"
    # Smaller and larger, while it learns.
    cluster.kubectl("scale", "drr", RUN, "-n", namespace, "--replicas=1")
    run.ready(1)
    (stays,) = run.live()
    cluster.kubectl("scale", "drr", RUN, "-n", namespace, "--replicas=2")
    run.ready(2)
    assert stays in run.live()
    # Suspended and resumed, from where it was.
    before = run.update
    run.patch(suspend=True)
    until(lambda: run.condition("Suspended").get("status") == "True", "suspended", 150)
    assert run.pods() == {} or not run.live()
    run.patch(suspend=False)
    run.ready(2)
    assert run.update >= before, "nothing was lost"
    # All workers at once: from the checkpoint.
    for name in run.live():
        run.kill(name)
    run.goes_on()
    cluster.kubectl(
        "wait", "--for=condition=Complete", f"drr/{RUN}", "-n", namespace, "--timeout=300s"
    )
    assert run.status["phase"] == "Complete"
    assert run.status["curriculum"]["startFrame"] == 0
    until(lambda: not run.live(), "the pods are given back")
    cluster.kubectl("delete", "drr", RUN, "-n", namespace)
    kinds = "pods,services,configmaps,networkpolicies,poddisruptionbudgets,persistentvolumeclaims"
    until(
        lambda: not cluster.get(namespace, kinds, selector=f"demoreset.dev/run={RUN}"),
        "nothing is left",
    )


def test_a_wrong_run_fails_within_seconds_and_says_why(
    cluster: Cluster, operator: str, namespace: str
) -> None:
    body = {
        "apiVersion": "demoreset.dev/v1alpha1",
        "kind": "DemoResetRun",
        "metadata": {"name": "wrong"},
        "spec": {"demo": {"name": "no-such-demo"}},
    }
    cluster.apply(namespace, body)
    run = Told(cluster, namespace, "wrong")
    until(lambda: run.condition("Failed").get("status") == "True", "failed", 150)
    failed = run.condition("Failed")
    assert failed["reason"] == "WrongRun"
    assert "no-such-demo" in failed["message"]
    assert "montezuma-first-key" in failed["message"], "what there is"
    story = cluster.kubectl("describe", "drr", "wrong", "-n", namespace)
    assert "WrongRun" in story


def test_memory_that_is_too_little_is_named(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    wanted["spec"]["workers"] = {"resources": {"limits": {"memory": "150Mi"}}}
    wanted["spec"]["restart"] = {"limit": 1}
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    until(lambda: run.condition("Failed").get("status") == "True", "failed", 150)
    assert "more than its limit of 150Mi" in run.condition("Failed")["message"]
    assert [attempt["cause"] for attempt in run.status["attempts"]] == ["OutOfMemory"] * 2
