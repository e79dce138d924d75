"""`kubectl demoreset`, as somebody types it who has a run on the cluster."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kube import Cluster, until
from told import RUN, Told

SMALL = {
    "environment": {"slots": 8},
    "ppo": {"rolloutLength": 16, "epochs": 1, "minibatches": 2},
    "checkpoint": {"intervalSeconds": 2, "volume": {"size": "1Gi"}},
}
Plugin = Callable[..., str]


@pytest.fixture
def plugin(cluster: Cluster, namespace: str) -> Plugin:
    """What it says."""

    def said(*words: object) -> str:
        command = (sys.executable, "-m", "demoreset_operator.plugin", "-n", namespace)
        return cluster.run(*command, *map(str, words))

    return said


def test_a_run_is_asked_fetched_branched_and_stopped(
    cluster: Cluster,
    operator: str,
    namespace: str,
    wanted: dict[str, Any],
    plugin: Plugin,
    tmp_path: Path,
) -> None:
    wanted["spec"] |= SMALL
    wanted["spec"]["workers"]["max"] = 1
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    until(lambda: (run.status.get("checkpoint") or {}).get("update", 0) > 3, "checkpoints")
    assert "Running" in plugin("list")
    assert "startFrame" in plugin("status", RUN)
    assert plugin("why", RUN).startswith(f"{RUN} trains with 1 of 1 workers")
    assert f"{RUN}-worker-0-1" in plugin("logs", RUN)
    assert "ckpt-l000001-u" in plugin("checkpoints", RUN)
    # A new run goes on from where this one stands, with other settings.
    plugin("branch", RUN, "slower", "--set", "spec.ppo.learningRate=1e-4")
    other = Told(cluster, namespace, "slower")
    # Meanwhile this one ends.
    run.patch(budget={"frames": 1}, goal={"successRate": 1})  # another than may be met by now
    other.ready(1)
    other.goes_on()
    assert other.status["training"]["learningRate"] < 1.1e-4
    assert other.update > 3
    plugin("suspend", "slower")
    until(lambda: other.status["phase"] == "Suspended", "suspended")
    stood = other.update
    # The pods of a run that is over are given back; its volume can be read all the same.
    until(lambda: run.status["phase"] == "Failed", "the budget is spent")
    assert "spec.budget.frames" in plugin("why", RUN)
    assert "ckpt-l" in plugin("checkpoints", "slower")  # nor has a suspended run a pod
    plugin("resume", "slower")
    out = tmp_path / "fetched"
    assert f"demoreset evaluate {out}" in plugin("fetch", RUN, "--out", out)
    assert list(out.glob("checkpoints/ckpt-*/model.safetensors"))
    best = tmp_path / "best"
    plugin("fetch", RUN, "--best", "--out", best)
    marked = (best / "checkpoints/BEST").read_text()
    assert [path.name for path in best.glob("checkpoints/ckpt-*")] == [marked.strip()]
    cluster.run(sys.executable, "-m", "demoreset_trainer.cli", "plot", str(out))
    # Meanwhile the other one has come back.
    other.ready(1)
    other.goes_on()
    assert other.done() > stood
    names = ("get", "pods", "-o", "name", "-n", namespace)
    until(lambda: "reader" not in cluster.kubectl(*names), "what was made for reading is gone")
