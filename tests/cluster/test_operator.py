"""The operator as platform people know it: installed, tested, upgraded, killed, uninstalled."""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import kube
from kube import CHART, Cluster, until
from told import RUN, Told, kill


def test_the_installation_tests_itself(cluster: Cluster, operator: str) -> None:
    said = cluster.helm("test", "demoreset", "--namespace", operator, "--timeout", "90s")
    assert "Succeeded" in said


def test_its_metrics_can_be_scraped(cluster: Cluster, operator: str) -> None:
    holder = until(lambda: kube.leader(cluster), "a leader")
    path = f"/api/v1/namespaces/{operator}/pods/{holder}:8080/proxy/metrics"
    text = until(lambda: cluster.kubectl("get", "--raw", path), "metrics")
    assert "demoreset_operator_is_leader 1.0" in text
    codes = re.findall(r'api_requests_total{code="(\d+)"', text)
    assert codes


def replaced(run: Told, worker: int, strike: Callable[[str], None], most: float) -> float:
    """Seconds from the loss of the operator that acts, and of a worker, until that has another."""
    until(lambda: len(kube.operators(run.cluster)) == 2, "two operators are ready")
    acts = until(lambda: kube.leader(run.cluster), "one of them acts")
    lost, successor = (f"{RUN}-worker-{worker}-{attempt}" for attempt in (1, 2))
    begun = time.monotonic()
    strike(acts)
    run.delete(lost)
    until(lambda: successor in run.pods(), f"{lost} is replaced", most)
    took = time.monotonic() - begun
    until(lambda: kube.leader(run.cluster) not in ("", acts), "another one acts")
    print(f"{strike.__name__}: replaced {took:.1f} s later")
    return took


def test_a_lost_worker_is_replaced_though_the_operator_is_lost_with_it(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    """A second one takes over; the bounds are wide, what was measured is in docs/benchmarks.md."""

    def stopped(pod: str) -> None:  # SIGTERM: it gives the Lease back
        cluster.kubectl("delete", "pod", pod, "-n", operator, "--wait=false")

    def killed(pod: str) -> None:  # it cannot, and does not come back
        kill(cluster, operator, pod)
        cluster.kubectl("delete", "pod", pod, "-n", operator, "--grace-period=0", "--force")

    kube.upgrade(cluster, CHART, "--set", "replicas=2")
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(2)
    coordinator = set(run.pods("coordinator"))
    assert replaced(run, 0, stopped, 10) < 10
    assert replaced(run, 1, killed, 30) < 30
    assert set(run.pods("coordinator")) == coordinator, "nobody else was touched"
    until(lambda: run.status["restarts"]["total"] == 2, "both are told of")  # after they are there
    kube.upgrade(cluster, CHART, "--set", "replicas=1")


def definition(cluster: Cluster) -> Any:
    return cluster.get("", "crd", "demoresetruns.demoreset.dev")


def status_of(crd: Any) -> dict[str, Any]:
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found: dict[str, Any] = schema["properties"]["status"]["properties"]
    return found


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


def test_a_change_is_rolled_and_one_that_is_refused_costs_nobody(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    wanted["spec"]["workers"]["max"] = 1
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(1)
    (first,) = run.live()
    run.patch(workers={"tolerations": [{"key": "gpu", "effect": "NoSchedul"}]})
    until(lambda: "Unsupported value" in run.condition("Running")["message"], "it is refused")
    run.goes_on()
    assert run.live() == [first]
    before = run.done()
    run.patch(workers={"tolerations": [{"key": "gpu", "effect": "NoSchedule"}]})
    until(lambda: run.live() and run.live() != [first], "another worker")
    run.ready(1)
    run.goes_on()
    assert run.condition("Running")["message"] == "all workers train"
    assert run.status["restarts"]["counted"] == 0
    if history := run.history():
        assert history[-1]["resumed_update"] >= before, "SIGTERM saved"


def test_a_claim_that_gets_no_volume_is_told(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    name = f"of-nobody-{namespace}"
    nobodys = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass"}
    nobodys |= {"provisioner": "example.com/nobody", "volumeBindingMode": "WaitForFirstConsumer"}
    cluster.apply(namespace, {**nobodys, "metadata": {"name": name}})
    wanted["spec"]["checkpoint"]["volume"]["storageClassName"] = name
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    until(lambda: run.condition("Running").get("reason") == "ClaimPending", "its claim is told of")
    assert f"ReadWriteMany, of the class {name}" in run.condition("Running")["message"]
    cluster.kubectl("delete", "storageclass", name)


def test_a_run_learns_on_while_its_operator_is_upgraded_and_where_it_goes(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """An upgrade brings new fields and touches no pod; all else stays when the operator goes."""
    older = tmp_path / "demoreset"
    shutil.copytree(CHART, older)
    crd = yaml.safe_load((older / "files/crd.yaml").read_text())
    del status_of(crd)["evaluation"]
    (older / "files/crd.yaml").write_text(yaml.safe_dump(crd))
    kube.upgrade(cluster, older)
    assert "evaluation" not in status_of(definition(cluster))
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(2)
    pods = set(run.pods())
    kube.upgrade(cluster, CHART)
    assert "evaluation" in status_of(definition(cluster))
    run.goes_on()
    assert set(run.pods()) == pods
    # Now there is none.
    kube.uninstall(cluster)
    until(lambda: not cluster.get(operator, "pods"), "no operator")
    assert set(run.live()) == pods
    # One of another namespace, with a Role alone, has its own runs to look after.
    with kube.applied(cluster, "namespaced", "demoreset", tmp_path):
        wanted["spec"]["demo"] = {"name": "no-such-demo"}
        cluster.apply("demoreset", wanted)
        other = Told(cluster, "demoreset", RUN)
        until(lambda: other.condition("Failed").get("reason") == "WrongRun", "it has tried")
    assert set(run.live()) == pods
    told = run.update
    kube.install(cluster)
    until(lambda: run.update > told, "an operator that tells how it goes")
    assert set(run.pods()) == pods
    assert run.status["restarts"]["total"] == 0
