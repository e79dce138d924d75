"""Nodes that are lost, and nodes that are cut off and come back."""

import time
from typing import Any

import pytest

from kube import Cluster, until
from told import RUN, Told


@pytest.fixture
def run(cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]) -> Told:
    """Two workers, one on each node."""
    if cluster.tools is None:
        pytest.skip("only the test cluster can lose a node")
    key = "kubernetes.io/hostname"
    spread = {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"demoreset.dev/run": RUN}},
    }
    wanted["spec"]["workers"]["topologySpreadConstraints"] = [spread]
    cluster.apply(namespace, wanted)
    told = Told(cluster, namespace, RUN)
    told.ready(2)
    return told


def workers(run: Told) -> dict[str, str]:
    """Pods that are to train, and their nodes."""
    return {
        name: body["spec"].get("nodeName", "")
        for name, body in run.pods().items()
        if "deletionTimestamp" not in body["metadata"]
    }


@pytest.mark.parametrize(("loss", "back"), [("stop", "start"), ("cut", "heal")])
def test_a_node_is_lost_and_the_run_goes_on_without_waiting_for_its_pods(
    cluster: Cluster, run: Told, loss: str, back: str
) -> None:
    if loss == "cut":
        bring_the_coordinator_to(cluster, run, "node2")
    before = run.update
    cluster.node(loss, "node2")
    try:
        begun = time.monotonic()
        until(
            lambda: set(workers(run).values()) == {"node1"} and run.update > before + 2,
            "both workers are on the node that is left",
            180,
        )
        print(f"{loss}: replaced and training again after {time.monotonic() - begun:.0f} s")
        until(
            lambda: "NodeLost" in [attempt["cause"] for attempt in run.status["attempts"]],
            "the loss is told of",
        )
        run.ready(2)
        assert run.status["restarts"]["counted"] == 0
        if loss == "cut":  # who is cut off has a coordinator, and reaches the volume
            time.sleep(10)  # some checkpoints' worth
            assert run.life == 2, "it has not taken the run back"
            saved = run.saved()
            assert saved is not None
            assert saved.name.startswith("ckpt-l000002")
    finally:
        cluster.node(back, "node2")
    run.goes_on()
    assert run.life <= 2
    cluster.kubectl("wait", "--for=condition=Ready", "node/node2", "--timeout=90s")
    until(
        lambda: len(run.pods()) == 2,
        "what was on the lost node has gone",
        150,
    )
    run.goes_on()
    assert run.update > before


def bring_the_coordinator_to(cluster: Cluster, run: Told, node: str) -> None:
    """So that workers which are cut off with that node may train on there."""

    def there() -> bool:
        pods = run.pods("coordinator").values()
        return [pod["spec"].get("nodeName") for pod in pods] == [node]

    (other,) = {"node1", "node2"} - {node}
    cluster.kubectl("cordon", other)
    try:
        if not there():
            for name in run.pods("coordinator"):
                cluster.kubectl("delete", "pod", name, "-n", run.namespace)
        until(there, f"the coordinator is on {node}")
    finally:
        cluster.kubectl("uncordon", other)
    run.ready(2)
    run.goes_on()


def drain(cluster: Cluster, node: str) -> None:
    away = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s")
    cluster.kubectl("drain", node, *away)


def test_a_node_is_drained_and_nothing_is_lost(cluster: Cluster, run: Told) -> None:
    run.goes_on()
    drain(cluster, "node2")
    try:
        until(lambda: set(workers(run).values()) == {"node1"}, "both are on the other node")
        run.ready(2)
        run.goes_on()
        (attempt,) = run.status["attempts"]
        assert attempt["cause"] == "Evicted"
        assert run.status["restarts"]["total"] == 1
        assert run.status["restarts"]["counted"] == 0
        assert attempt["lostFrames"] == 0
        life = run.life
        assert life <= 2, "nobody has read it from the disk; the coordinator may have gone, too"
        # The node of all of them: the last one that trains stays until another has joined it.
        cluster.kubectl("uncordon", "node2")
        drain(cluster, "node1")
        until(lambda: set(workers(run).values()) == {"node2"}, "both are back on it")
        run.ready(2)
        run.goes_on()
        assert run.life <= life + 1
        assert not any(attempt.get("lostFrames") for attempt in run.status["attempts"])
        # There is no room for a third, however long it is waited for.
        cluster.kubectl("cordon", "node2")
        pods = workers(run)
        cluster.kubectl("scale", "drr", RUN, "-n", run.namespace, "--replicas=3")
        said = "worker 2: Unschedulable"
        until(lambda: said in run.condition("Running").get("message", ""), "it says so")
        run.goes_on()
        assert run.status["workers"]["shown"] == "2/3"
        assert pods.items() <= workers(run).items(), "nobody gave way to it"
    finally:
        cluster.kubectl("uncordon", "node1", "node2")
