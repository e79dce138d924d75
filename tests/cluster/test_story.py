"""A user's story: apply a run, watch it, hurt it, and see it finish."""

import json
from itertools import pairwise
from typing import Any

import kube
from demoreset_api.names import COORDINATOR_PORT, METRICS_PORT
from kube import Cluster, until
from told import RUN, Told, kill


def test_a_run_survives_what_clusters_do_and_completes(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    wanted["spec"]["workers"]["max"] = 3
    wanted["spec"]["environment"]["slots"] = 16  # it must learn
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    run.ready(3)
    run.goes_on()
    # Its ports, which know no passwords, are its own pods' alone.
    if cluster.tools is not None:  # another cluster may have nobody who keeps policies
        ports = {"coordinator": COORDINATOR_PORT, "worker": METRICS_PORT}
        doors = {
            f"{body['status']['podIP']}:{port}"
            for component, port in ports.items()
            for body in run.pods(component).values()
        }
        assert kube.reached_by(cluster, namespace, run.live()[0], doors) == doors
        with kube.stranger(cluster, operator) as pod:
            assert kube.reached_by(cluster, operator, pod, doors) == set()
    # A worker is killed, and one is deleted; the first one is the writer.
    strikes = ((sorted(run.live())[0], run.kill), (sorted(run.live())[-1], run.delete))
    for number, (name, strike) in enumerate(strikes, 1):
        before = run.done()
        strike(name)
        until(lambda: run.status["restarts"]["total"] == number, "it is missed")  # noqa: B023
        run.goes_on()
        run.ready(3)
        assert run.done() > before
    saved = run.status["checkpoint"]["update"]
    until(lambda: run.status["checkpoint"]["update"] > saved, "another one writes, and is heard")
    causes = [attempt["cause"] for attempt in run.status["attempts"]]
    assert causes == ["Crashed", "Deleted"]
    assert (run.status["restarts"]["total"], run.status["restarts"]["counted"]) == (2, 0)
    until(lambda: all("recoverySeconds" in one for one in run.status["attempts"]), "both are over")
    for attempt in run.status["attempts"]:
        assert 0 <= attempt["recoverySeconds"] < 60
        assert attempt["lostFrames"] == 0
        assert "resumedFrom" not in attempt, "the others went on"
    # The coordinator: killed, it comes again in its place; deleted, there is another.
    ((coordinator, times),) = kube.begun(run.pods("coordinator"))
    run.kill(coordinator)
    until(lambda: kube.begun(run.pods("coordinator")) == {(coordinator, times + 1)}, "it is back")
    run.goes_on()
    run.delete(coordinator)
    run.goes_on()
    assert coordinator not in run.pods("coordinator")
    # The operator: the run does not need it.
    before_it = kube.begun(kube.operators(cluster))
    for name, _ in before_it:
        kill(cluster, operator, name)
    run.goes_on()
    until(
        lambda: (now := kube.begun(kube.operators(cluster))) and not now & before_it,
        "another one is ready",
    )
    assert run.status["restarts"]["total"] == 2, "no pod was touched"
    assert run.life == 1, "somebody always knew where the run stood: nothing was lost"
    # Smaller and larger, while it learns.
    cluster.kubectl("scale", "drr", RUN, "-n", namespace, "--replicas=1")
    run.ready(1)
    (stays,) = run.live()
    cluster.kubectl("scale", "drr", RUN, "-n", namespace, "--replicas=2")
    run.ready(2)
    assert stays in run.live()
    assert run.life == 1, "who stayed went on"
    # All workers at once: from the checkpoint.
    saved = run.status["checkpoint"]["update"]
    for name in run.live():
        run.kill(name)
    kept = run.saved()
    until(lambda: run.status["restarts"]["total"] == 4, "both are missed")
    run.ready(2)
    assert run.life == 2
    assert run.update >= saved
    assert run.status["restarts"]["counted"] in (1, 2), "while none of them trains it counts"
    for attempt in run.status["attempts"][-2:]:
        assert attempt["resumedFrom"] >= saved
        assert attempt["lostFrames"] >= 0
        if kept is not None:
            assert kept.name == f"ckpt-l000001-u{attempt['resumedFrom']:010d}", "the latest one"
    assert "Recovered" in cluster.kubectl("describe", "drr", RUN, "-n", namespace)
    # Suspended and resumed, from where it was.
    before = run.update
    run.patch(suspend=True)
    until(lambda: run.condition("Suspended").get("status") == "True", "suspended", 150)
    assert run.pods() == {} or not run.live()
    run.patch(suspend=False)
    run.ready(2)
    assert run.update >= before, "nothing was lost"
    assert run.life == 3
    # Now it may end: both leave, the last one saves, and others find the goal met, or meet it.
    before = run.update
    run.patch(goal={"after": "Stop"})
    cluster.kubectl(
        "wait", "--for=condition=Complete", f"drr/{RUN}", "-n", namespace, "--timeout=300s"
    )
    assert run.status["phase"] == "Complete"
    assert run.status["curriculum"]["startFrame"] == 0
    until(lambda: not run.live(), "the pods are given back")
    assert run.status["training"]["life"] in (3, 4)
    assert run.update >= before, "nothing was lost"
    if (newest := run.saved()) is not None:
        assert json.loads((newest / "state.json").read_text())["goal"]["met"]
        history = run.history()
        assert {line["life"] for line in history} >= {1, 2, 3}
        for line, following in pairwise(history):
            assert line["update"] < following["update"]
            assert line["frames"] < following["frames"]
            if (
                line["life"] < following["life"]
            ):  # it begins at a checkpoint, not before what is told
                assert line["update"] <= following["resumed_update"] < following["update"]
                assert line["frames"] <= following["resumed_frames"] < following["frames"]
    run.patch(ttlSecondsAfterFinished=1)
    cluster.kubectl("wait", "--for=delete", f"drr/{RUN}", "-n", namespace, "--timeout=60s")
    kinds = ("pods", "services", "configmaps", "networkpolicies", "poddisruptionbudgets", "pvc")
    its = f"demoreset.dev/run={RUN}"
    until(
        lambda: not any(cluster.get(namespace, kind, selector=its) for kind in kinds),
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
    wanted["spec"]["restart"] = {"outOfMemoryLimit": 1}
    cluster.apply(namespace, wanted)
    run = Told(cluster, namespace, RUN)
    until(lambda: run.condition("Failed").get("status") == "True", "failed", 150)
    assert "more than its limit of 150Mi" in run.condition("Failed")["message"]
    assert [attempt["cause"] for attempt in run.status["attempts"]] == ["OutOfMemory"] * 2
