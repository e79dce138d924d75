"""What the API server refuses, with the field's path and a sentence that helps."""

import json
from typing import Any

import pytest

from kube import Cluster

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no demo": ({"demo": None}, "spec.demo: Required value"),
    "neither name nor path": ({"demo": {}}, "spec.demo: Invalid value: set exactly one of name"),
    "name and path": ({"demo": {"name": "a", "path": "b"}}, "set exactly one of name"),
    "a name that is none": (
        {"demo": {"name": "A B"}},
        'spec.demo.name: Invalid value: "A B": it is one of `demoreset demo list`',
    ),
    "an empty path": ({"demo": {"path": ""}}, "spec.demo.path"),
    "a short hash": (
        {"demo": {"name": "a", "sha256": "0"}},
        'spec.demo.sha256: Invalid value: "0": it is 64 of 0-9 and a-f',
    ),
    "frame 0": ({"demo": {"name": "a", "endFrame": 0}}, "spec.demo.endFrame"),
    "a number as text": ({"seed": "three"}, "spec.seed: Invalid value"),
    "a negative seed": ({"seed": -1}, "spec.seed"),
    "success above 1": ({"goal": {"successRate": 1.1}}, "spec.goal.successRate"),
    "success 0": ({"goal": {"successRate": 0}}, "spec.goal.successRate"),
    "no episodes": ({"goal": {"episodes": 0}}, "spec.goal.episodes"),
    "another after": ({"goal": {"after": "Sleep"}}, 'supported values: "Stop", "PlayOn"'),
    "another mode": ({"curriculum": {"mode": "adaptive"}}, 'supported values: "Adaptive"'),
    "threshold 1": ({"curriculum": {"threshold": 1}}, "spec.curriculum.threshold"),
    "a share above 1": ({"curriculum": {"windowShare": 2}}, "spec.curriculum.windowShare"),
    "another preset": ({"policy": {"preset": "Huge"}}, "spec.policy.preset"),
    "learning rate 0": ({"ppo": {"learningRate": 0}}, "spec.ppo.learningRate"),
    "gamma above 1": ({"ppo": {"gamma": 1.5}}, "spec.ppo.gamma"),
    "lambda below 0": ({"ppo": {"lambda": -1}}, "spec.ppo.lambda"),
    "no epochs": ({"ppo": {"epochs": 0}}, "spec.ppo.epochs"),
    "slots and minibatches": (
        {"environment": {"slots": 30}, "ppo": {"minibatches": 4}},
        "environment.slots must be a multiple of ppo.minibatches",
    ),
    "a maximum over more than a decision": (
        {"environment": {"frameSkip": 1}},
        "spec.environment: Invalid value: maxOverFrames must not be more than frameSkip",
    ),
    "no slots": ({"environment": {"slots": 0}}, "spec.environment.slots"),
    "sticky above 1": ({"environment": {"stickyProbability": 2}}, "stickyProbability"),
    "another reward": ({"environment": {"reward": "Money"}}, "spec.environment.reward"),
    "no budget": ({"budget": {"frames": 0}}, "spec.budget.frames"),
    "interval 0": ({"checkpoint": {"intervalSeconds": 0}}, "spec.checkpoint.intervalSeconds"),
    "keep 1": ({"checkpoint": {"keep": 1}}, "spec.checkpoint.keep"),
    "a size in words": (
        {"checkpoint": {"volume": {"size": "large"}}},
        'spec.checkpoint.volume.size: Invalid value: "large"',
    ),
    "a claim that none can be": (
        {"checkpoint": {"volume": {"claim": "My_Claim"}}},
        'spec.checkpoint.volume.claim: Invalid value: "My_Claim": it is the name of a Persistent',
    ),
    "a claim and a class": (
        {"checkpoint": {"volume": {"claim": "mine", "storageClassName": "fast"}}},
        "spec.checkpoint.volume: Invalid value: claim is an existing one",
    ),
    "max below min": (
        {"workers": {"min": 3, "max": 2}},
        "max must be at least min",
    ),
    "no workers": ({"workers": {"min": 0}}, "spec.workers.min"),
    "17 gpus": ({"workers": {"gpus": 17}}, "spec.workers.gpus"),
    "nccl without gpus": (
        {"workers": {"collectives": "Nccl"}},
        "spec.workers: Invalid value: collectives: Nccl needs gpus",
    ),
    "memory in words": (
        {"workers": {"resources": {"limits": {"memory": "much"}}}},
        'spec.workers.resources.limits.memory: Invalid value: "much"',
    ),
    "half a core without quotes": (
        {"workers": {"resources": {"requests": {"cpu": 0.5}}}},
        "spec.workers.resources.requests.cpu",
    ),
    "another pull policy": ({"workers": {"imagePullPolicy": "Often"}}, "imagePullPolicy"),
    "a negative limit": ({"restart": {"limit": -1}}, "spec.restart.limit"),
    "a deadline of 0": ({"activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
    "a deadline after our time": (
        {"activeDeadlineSeconds": 10**12},
        "spec.activeDeadlineSeconds in body should be less than or equal to 2147483647",
    ),
    "less than no core": (
        {"workers": {"resources": {"limits": {"cpu": -1}}}},
        "spec.workers.resources.limits.cpu in body should be greater than or equal to 0",
    ),
    "two on a volume for one": (
        {"workers": {"max": 2}, "checkpoint": {"volume": {"accessMode": "ReadWriteOncePod"}}},
        "ReadWriteOncePod is for a single worker",
    ),
    "a demo beside the volume": ({"demo": {"path": "../my.demo"}}, "has no .. in it"),
    "a negative ttl": ({"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    "a manager without a domain": (
        {"managedBy": "multikueue"},
        "managedBy: a domain and a path after it, as demoreset.dev/operator or",
    ),
    "suspend in words": ({"suspend": "yes please"}, "spec.suspend"),
    "an unknown field": ({"ppo": {"learnRate": 1}}, 'unknown field "spec.ppo.learnRate"'),
    "an unknown topic": ({"optimiser": {}}, 'unknown field "spec.optimiser"'),
}


def run(name: str = "right", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "demoreset.dev/v1alpha1",
        "kind": "DemoResetRun",
        "metadata": {"name": name},
        "spec": {"demo": {"name": "montezuma-first-key"}, **spec},
    }


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_right_is_refused(cluster: Cluster, operator: str, wrong: str) -> None:
    spec, expected = REFUSED[wrong]
    body = run(**spec)
    body["spec"] = {key: value for key, value in body["spec"].items() if value is not None}
    command = ["create", "--validate=strict", "--dry-run=server", "-n", operator, "-f", "-"]
    said = cluster.kubectl(*command, given=json.dumps(body), check=False)
    assert expected in said
    assert "created" not in said


def test_a_long_name_is_refused_with_the_reason(cluster: Cluster, operator: str) -> None:
    said = cluster.apply(operator, run("x" * 52), check=False)
    assert "at most 51 of a-z, 0-9 and -" in said


@pytest.fixture(scope="module")
def suspended(cluster: Cluster, operator: str) -> Any:
    cluster.apply(operator, run("fixed", suspend=True))
    yield "fixed"
    cluster.kubectl("delete", "drr", "fixed", "-n", operator)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"demo": {"name": "freeway-crossing"}}, "spec.demo"),
        ({"seed": 3}, "spec.seed"),
        ({"policy": {"preset": "Base"}}, "spec.policy"),
        ({"curriculum": {"mode": "Original"}}, "spec.curriculum.mode"),
        ({"environment": {"slots": 128}}, "spec.environment.slots"),
        ({"environment": {"frameSkip": 2}}, "spec.environment.frameSkip"),
        ({"checkpoint": {"volume": {"size": "20Gi"}}}, "spec.checkpoint.volume"),
        ({"managedBy": "kueue.x-k8s.io/multikueue"}, "spec.managedBy"),
    ],
)
def test_what_checkpoints_depend_on_cannot_be_changed(
    cluster: Cluster, operator: str, suspended: str, changed: dict[str, Any], field: str
) -> None:
    patch = json.dumps({"spec": changed})
    command = ["patch", "drr", suspended, "-n", operator, "--type=merge", "-p", patch]
    said = cluster.kubectl(*command, check=False)
    assert field in said
    assert "cannot be changed" in said


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": {"max": 3}},
        {"budget": {"frames": 10}},
        {"goal": {"successRate": 0.5}},
        {"ppo": {"learningRate": 1e-4}},
        {"restart": {"limit": 0}},
        {"ttlSecondsAfterFinished": 60},
    ],
)
def test_what_may_change_can_be(
    cluster: Cluster, operator: str, suspended: str, changed: dict[str, Any]
) -> None:
    patch = json.dumps({"spec": changed})
    cluster.kubectl("patch", "drr", suspended, "-n", operator, "--type=merge", "-p", patch)


def test_it_is_shown_among_all_with_its_columns(
    cluster: Cluster, operator: str, suspended: str
) -> None:
    shown = cluster.kubectl("get", "all", "-n", operator)
    assert f"demoresetrun.demoreset.dev/{suspended}" in shown
    header, *_ = cluster.kubectl("get", "drr", "-n", operator).splitlines()
    columns = ["NAME", "PHASE", "START", "PROGRESS", "SUCCESS", "WORKERS", "RESTARTS", "AGE"]
    assert header.split() == columns


def test_a_size_that_no_group_can_have_is_refused(
    cluster: Cluster, operator: str, suspended: str
) -> None:
    said = cluster.kubectl("scale", "drr", suspended, "-n", operator, "--replicas=0", check=False)
    assert "spec.workers.max" in said
    assert "scaled" not in said


def test_explain_teaches(cluster: Cluster, operator: str) -> None:
    said = cluster.kubectl("explain", "drr.spec.workers")
    assert "Least members that train" in " ".join(said.split())


def test_defaults_are_filled_in(cluster: Cluster, operator: str, suspended: str) -> None:
    spec = cluster.get(operator, "drr", suspended)["spec"]
    assert spec["environment"]["frameSkip"] == 4
    assert spec["checkpoint"]["volume"]["retention"] == "Retain"
