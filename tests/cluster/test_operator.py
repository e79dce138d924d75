"""The operator as platform people know it: installed, tested, upgraded, killed, uninstalled."""

import re
import time
from typing import Any

from kube import ROOT, Cluster, until
from told import RUN, Told


def lease(cluster: Cluster, namespace: str) -> str:
    found = cluster.get(namespace, "lease", "demoreset-operator")
    return str(found["spec"].get("holderIdentity", ""))


def test_the_installation_tests_itself(cluster: Cluster, operator: str) -> None:
    said = cluster.helm("test", "demoreset", "--namespace", operator, "--timeout", "90s")
    assert "Succeeded" in said


def test_its_metrics_can_be_scraped(cluster: Cluster, operator: str) -> None:
    holder = until(lambda: lease(cluster, operator), "a leader")
    path = f"/api/v1/namespaces/{operator}/pods/{holder}:8080/proxy/metrics"
    text = until(lambda: cluster.kubectl("get", "--raw", path), "metrics")
    assert "demoreset_operator_is_leader 1.0" in text
    codes = re.findall(r'api_requests_total{code="(\d+)"', text)
    assert codes


def test_the_second_takes_over(cluster: Cluster, operator: str) -> None:
    chart = str(ROOT / "charts/demoreset")
    same = ("upgrade", "demoreset", chart, "--namespace", operator, "--reuse-values", "--wait")
    cluster.helm(*same, "--set", "replicas=2", "--timeout", "90s")
    first = until(lambda: lease(cluster, operator), "a leader", 60)
    # SIGTERM: it gives the lease back.
    begun = time.monotonic()
    cluster.kubectl("delete", "pod", first, "-n", operator, "--wait=false")
    second = until(lambda: (now := lease(cluster, operator)) not in ("", first) and now, "another")
    print(f"taken over {time.monotonic() - begun:.1f} s after a SIGTERM")
    # kill -9 of all its processes: it cannot.
    until(
        lambda: (
            len(cluster.get(operator, "pods", selector="app.kubernetes.io/component=operator")) == 2
        ),
        "two of them again",
    )
    begun = time.monotonic()
    cluster.kubectl("delete", "pod", second, "-n", operator, "--grace-period=0", "--force")
    until(lambda: lease(cluster, operator) not in ("", second), "another", 40)
    print(f"taken over {time.monotonic() - begun:.1f} s after a kill")
    cluster.helm(*same, "--set", "replicas=1", "--timeout", "90s")


def test_a_run_of_the_longest_name_is_deleted_and_applied_at_once(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    name = "a" * 51
    wanted["metadata"]["name"] = name
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, name)
    until(lambda: len(run.live()) == 2, "its workers run")
    first = run.uid
    cluster.kubectl("delete", "drr", name, "-n", namespace)
    cluster.apply(namespace, wanted)
    run.ready(2)
    assert run.uid != first
    assert {
        body["metadata"]["labels"]["demoreset.dev/run-uid"] for body in run.pods().values()
    } == {run.uid}


def test_a_retained_volume_is_gone_on_from(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    wanted["spec"]["checkpoint"] = {"intervalSeconds": 1, "volume": {"size": "1Gi"}}
    wanted["spec"]["workers"]["max"] = 1
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    until(lambda: (run.status.get("checkpoint") or {}).get("update", 0) > 3, "checkpoints")
    before = run.update
    cluster.kubectl("delete", "drr", RUN, "-n", namespace)
    wanted["spec"]["workers"]["max"] = 2
    cluster.apply(namespace, wanted)
    run.ready(2)
    assert run.update >= before - 1, "SIGTERM saved"


def test_everything_else_stays_when_the_operator_goes(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(2)
    pods = set(run.pods())
    cluster.kubectl("scale", "deployment", "--all", "-n", operator, "--replicas=0")
    until(lambda: not cluster.get(operator, "pods"), "no operator")
    assert set(run.live()) == pods
    cluster.kubectl("scale", "deployment", "--all", "-n", operator, "--replicas=1")
    run.goes_on()
    assert set(run.pods()) == pods
    assert run.status["restarts"]["total"] == 0
