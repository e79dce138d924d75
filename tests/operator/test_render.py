"""The objects of a run: what they say, what changes them, and what they must never say."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from demoreset_api.names import (
    ANNOTATION_HASH,
    LABEL_COMPONENT,
    LABEL_RUN_UID,
    LABEL_VERSION,
    LABEL_WORKER,
)
from demoreset_api.spec import DemoResetRun
from demoreset_operator import pods, render
from demoreset_operator.observation import Run
from world import SETTINGS, World

Json = dict[str, Any]


def run(labels: dict[str, str] | None = None, **spec: Any) -> Run:
    world = World(**spec)
    world.run_body["metadata"]["labels"] = labels or {}
    return world.run


def worker(labels: dict[str, str] | None = None, **spec: Any) -> Json:
    return pods.worker(run(labels, **spec), SETTINGS, 0, 1)


def child(kind: str, **spec: Any) -> Json:
    found = {one["kind"]: one for one in render.children(run(**spec), SETTINGS)}
    return found[kind]


def test_workers_read_a_run_file_that_is_valid_and_has_nothing_else() -> None:
    wanted = run(
        ppo={"learningRate": 1e-3}, workers={"max": 4, "membersPerWorker": 2}, suspend=False
    )
    content = render.config(wanted)
    parsed = DemoResetRun.model_validate(content)
    assert parsed.spec.ppo.learning_rate == 1e-3
    assert parsed.spec.workers.members_per_worker == 2
    assert "suspend" not in content["spec"]
    assert "max" not in content["spec"]["workers"]


def test_a_demo_on_the_volume_is_found_there() -> None:
    content = render.config(run(demo={"path": "demos/mine.demo.safetensors"}))
    assert content["spec"]["demo"]["path"] == "/data/demos/mine.demo.safetensors"


@pytest.mark.parametrize(
    ("change", "which"),
    [
        ({"workers": {"max": 5}}, ""),
        ({"suspend": True}, ""),
        ({"restart": {"limit": 3}}, ""),
        ({"ttlSecondsAfterFinished": 5}, ""),
        ({"workers": {"max": 5, "min": 2}}, "coordinator"),
        ({"workers": {"image": "other:1"}}, "worker coordinator"),
        ({"workers": {"labels": {"team": "a"}}}, "worker"),
        ({"workers": {"runtimeClassName": "nvidia"}}, "worker"),
        ({"workers": {"commonLabels": {"team": "a"}}}, "worker"),
        ({"workers": {"affinity": {"podAntiAffinity": {"a": 1}}}}, "worker"),
        ({"workers": {"priorityClassName": "high"}}, "worker coordinator"),
        ({"workers": {"resources": {"limits": {"memory": "2Gi"}}}}, "worker"),
        ({"goal": {"episodes": 7}}, "worker config"),
        ({"budget": {"frames": 7}}, "worker config"),
        ({"workers": {"membersPerWorker": 2}}, "worker coordinator config"),
    ],
)
def test_what_a_change_replaces(change: Json, which: str) -> None:
    before = pods.wanted(run(), SETTINGS)
    after = pods.wanted(run(**change), SETTINGS)
    changed = {
        name
        for name in ("worker", "coordinator", "config")
        if getattr(before, name) != getattr(after, name)
    }
    assert changed == set(which.split())


def test_all_workers_of_a_run_are_made_alike() -> None:
    one, other = (pods.worker(run(), SETTINGS, index, index + 3) for index in (0, 1))
    assert one["spec"] == other["spec"]
    assert one["metadata"]["name"] != other["metadata"]["name"]


def test_pods_satisfy_pod_security_restricted_and_have_no_token() -> None:
    for pod in (worker(), pods.coordinator(run(), SETTINGS, 1)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize(
    ("workers", "asked", "cores"),
    [
        ({}, {"requests": {"cpu": "500m"}, "limits": {}}, "requests.cpu"),
        ({"membersPerWorker": 3}, {"requests": {"cpu": "1500m"}, "limits": {}}, "requests.cpu"),
        (
            {"resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": 2}}},
            {"requests": {"cpu": "500m"}, "limits": {"cpu": "2"}},
            "limits.cpu",
        ),
        (
            {"resources": {"limits": {"cpu": 2}}},  # the API server makes a request of it
            {"requests": {}, "limits": {"cpu": "2"}},
            "limits.cpu",
        ),
        (
            {"resources": {"requests": {"memory": "2Gi"}}},
            {"requests": {"memory": "2Gi", "cpu": "500m"}, "limits": {}},
            "requests.cpu",
        ),
        ({"gpus": 1}, {"requests": {}, "limits": {"nvidia.com/gpu": "1"}}, None),
    ],
)
def test_a_worker_knows_its_cores_and_asks_for_half_a_core_a_member(
    workers: Json, asked: Json, cores: str | None
) -> None:
    container = worker(workers=workers)["spec"]["containers"][0]
    assert container["resources"] == asked
    sources = [one["valueFrom"] for one in container["env"] if one["name"] == "DEMORESET_CORES"]
    field = {"containerName": "worker", "resource": cores, "divisor": "1"}
    assert sources == ([{"resourceFieldRef": field}] if cores else [])


def test_gpus_and_placement_pass_through() -> None:
    pod = worker(
        {"kueue.x-k8s.io/queue-name": "research"},
        workers={
            "gpus": 2,
            "resources": {"requests": {"cpu": 4}, "limits": {"memory": "8Gi"}},
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "topologySpreadConstraints": [{"maxSkew": 1}],
            "priorityClassName": "low",
            "runtimeClassName": "nvidia",
            "schedulerName": "volcano",
            "imagePullSecrets": ["registry"],
            "labels": {"team": "a", LABEL_RUN_UID: "forged"},
            "annotations": {"note": "b"},
            "env": {"DEMORESET_HANG_SECONDS": "60", "DEMORESET_COORDINATOR": "elsewhere:1"},
            "graceSeconds": 90,
        },
    )
    spec, container = pod["spec"], pod["spec"]["containers"][0]
    assert container["resources"] == {
        "requests": {"cpu": "4"},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": "2"},
    }
    assert spec["nodeSelector"] == {"disk": "fast"}
    assert spec["tolerations"][-1] == {"key": "gpu", "operator": "Exists"}
    assert spec["affinity"] == {"nodeAffinity": {}}
    assert spec["topologySpreadConstraints"] == [{"maxSkew": 1}]
    assert spec["priorityClassName"] == "low"
    assert (spec["runtimeClassName"], spec["schedulerName"]) == ("nvidia", "volcano")
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert pod["metadata"]["labels"]["demoreset.dev/generation"] == "1"
    assert re.fullmatch(r"[\w.-]+", pod["metadata"]["labels"]["app.kubernetes.io/version"])
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert pod["metadata"]["labels"][LABEL_RUN_UID] == "u-1", "ours cannot be forged"
    assert pod["metadata"]["annotations"]["note"] == "b"
    environment = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
    assert environment["DEMORESET_HANG_SECONDS"] == "60"
    assert environment["DEMORESET_COORDINATOR"] == "key-coordinator.games.svc:29510", "ours wins"


def test_a_lost_node_is_left_within_seconds_unless_the_user_says_otherwise() -> None:
    key = "node.kubernetes.io/unreachable"
    by_default = {one["key"]: one for one in worker()["spec"]["tolerations"]}
    assert by_default[key]["tolerationSeconds"] == pods.LOST_NODE_SECONDS
    theirs = {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 600}
    tolerations = worker(workers={"tolerations": [theirs]})["spec"]["tolerations"]
    assert [one for one in tolerations if one["key"] == key] == [theirs]


def test_the_group_trains_with_the_least_of_its_members() -> None:
    wanted = run(workers={"min": 2, "max": 4, "gpus": 2})
    container = pods.coordinator(wanted, SETTINGS, 1)["spec"]["containers"][0]
    assert container["args"] == ["coordinator", "--min", "4"]


def test_a_coordinator_fits_a_quota_and_one_that_was_made_without_a_limit_stays() -> None:
    made = pods.coordinator(run(), SETTINGS, 1)
    resources = made["spec"]["containers"][0]["resources"]
    assert all(resources[kind].keys() == {"cpu", "memory"} for kind in ("requests", "limits"))
    del resources["limits"]["cpu"]
    assert made["metadata"]["annotations"][ANNOTATION_HASH] == render.digest(made["spec"])


def test_what_a_cluster_demands_of_every_pod_the_coordinator_has_too() -> None:
    mesh = {"sidecar.istio.io/inject": "false"}
    common = {"commonLabels": {"team": "a", LABEL_COMPONENT: "forged"}, "commonAnnotations": mesh}
    wanted = run(workers={**common, "labels": {"rank": "b"}})
    for made in (pods.coordinator(wanted, SETTINGS, 1), pods.worker(wanted, SETTINGS, 0, 1)):
        component = "worker" if LABEL_WORKER in made["metadata"]["labels"] else "coordinator"
        assert made["metadata"]["labels"]["team"] == "a"
        assert made["metadata"]["labels"][LABEL_COMPONENT] == component, "ours cannot be forged"
        assert made["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
        # By a label of its own a group is kept apart; the coordinator must not take a place of it.
        assert ("rank" in made["metadata"]["labels"]) is (component == "worker")


def test_the_coordinator_is_not_kept_from_nodes_that_have_workers() -> None:
    nodes: Json = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
    wanted = run(
        workers={
            "max": 2,
            "affinity": {"nodeAffinity": nodes, "podAntiAffinity": {}, "podAffinity": {}},
            "topologySpreadConstraints": [{"maxSkew": 1}],
            "priorityClassName": "high",
        }
    )
    spec = pods.coordinator(wanted, SETTINGS, 1)["spec"]
    assert spec["containers"][0]["livenessProbe"]["httpGet"]["port"] == "coordinator"
    assert spec["affinity"] == {"nodeAffinity": nodes}
    assert spec["priorityClassName"] == "high"
    assert "topologySpreadConstraints" not in spec
    apart = run(workers={"max": 2, "affinity": {"podAntiAffinity": {"a": 1}}})
    assert "affinity" not in pods.coordinator(apart, SETTINGS, 1)["spec"]
    assert "podAntiAffinity" in pods.worker(apart, SETTINGS, 0, 1)["spec"]["affinity"]


def test_a_volume_is_made_unless_there_is_one() -> None:
    claim = child("PersistentVolumeClaim", workers={"max": 2})
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "ownerReferences" not in claim["metadata"], "it outlives the run"
    assert child("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]
    deleted = child("PersistentVolumeClaim", checkpoint={"volume": {"retention": "Delete"}})
    assert deleted["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    given = run(checkpoint={"volume": {"claim": "mine"}})
    kinds = {one["kind"] for one in render.children(given, SETTINGS)}
    assert "PersistentVolumeClaim" not in kinds
    volumes = pods.worker(given, SETTINGS, 0, 1)["spec"]["volumes"]
    assert {"claimName": "mine"} in [one.get("persistentVolumeClaim") for one in volumes]


def test_a_volume_that_one_pod_may_mount_is_for_one_worker() -> None:
    spec: Json = {"checkpoint": {"volume": {"accessMode": "ReadWriteOncePod"}}}
    assert child("PersistentVolumeClaim", **spec)["spec"]["accessModes"] == ["ReadWriteOncePod"]
    with pytest.raises(ValidationError, match=r"single worker; several \(2\) need ReadWriteMany"):
        run(workers={"max": 2}, **spec)


def test_a_single_worker_has_no_budget_that_would_block_a_drain() -> None:
    kinds = {one["kind"] for one in render.children(run(), SETTINGS)}
    assert "PodDisruptionBudget" not in kinds


def test_only_the_operator_and_prometheus_reach_a_runs_metrics_from_outside() -> None:
    rules = child("NetworkPolicy")["spec"]["ingress"]
    assert rules[0]["from"] == [{"podSelector": {"matchLabels": {LABEL_RUN_UID: "u-1"}}}]
    assert [port["port"] for port in rules[1]["ports"]] == [9400]
    assert rules[1]["from"][0]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": SETTINGS.namespace
    }


def test_workers_stay_near_a_volume_that_one_node_can_use() -> None:
    world = World(workers={"min": 1, "max": 1})
    world.settle()
    world.start()
    world.train()
    world.change(workers={"min": 1, "max": 3})
    world.settle()
    assert set(world.live()) == {0, 1, 2}
    assert world.live()[0] == "key-worker-0-1", "nothing has changed for it"
    for name in world.live().values():
        (near,) = world.pods[name]["spec"]["affinity"]["podAffinity"].values()
        assert near[0]["podAffinityTerm"]["labelSelector"]["matchLabels"][LABEL_RUN_UID] == "u-1"


def test_a_claim_that_nobody_owns_has_no_mark_by_which_a_tool_takes_it_for_its_own() -> None:
    kept = render.claim(run(checkpoint={"volume": {"retention": "Retain"}}))
    goes = render.claim(run(checkpoint={"volume": {"retention": "Delete"}}))
    assert "ownerReferences" not in kept["metadata"]
    assert "app.kubernetes.io/instance" not in kept["metadata"]["labels"]
    assert goes["metadata"]["ownerReferences"]
    assert goes["metadata"]["labels"]["app.kubernetes.io/instance"] == "key"


def test_a_wish_of_ours_replaces_no_pod() -> None:
    near = pods.worker(run(), SETTINGS, 0, 1, together=True)
    assert near["metadata"]["annotations"] == worker()["metadata"]["annotations"]


def test_workers_may_go_anywhere_where_the_volume_does() -> None:
    world = World(workers={"min": 1, "max": 2})
    world.settle()
    assert all("affinity" not in body["spec"] for body in world.pods.values())


def objects(wanted: Run) -> list[Json]:
    """All objects of a run."""
    return [
        *render.children(wanted, SETTINGS),
        pods.worker(wanted, SETTINGS, 0, 1),
        pods.coordinator(wanted, SETTINGS, 1),
    ]


def test_every_object_says_which_operator_made_it_and_another_makes_none_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = run(workers={"max": 2})
    monkeypatch.setattr(render, "VERSION", "9.9.8")
    before = objects(wanted)
    monkeypatch.setattr(render, "VERSION", "9.9.9")
    after = objects(wanted)
    assert {one["metadata"]["labels"][LABEL_VERSION] for one in before} == {"9.9.8"}
    assert {one["metadata"]["labels"][LABEL_VERSION] for one in after} == {"9.9.9"}
    for one, other in zip(before, after, strict=True):
        assert one["metadata"]["annotations"] == other["metadata"]["annotations"], one["kind"]
