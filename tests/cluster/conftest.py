import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kube
from kube import ROOT, TOOLS, Cluster

OPERATOR, TRAINER = "demoreset-operator:test", "demoreset-trainer:test"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real cluster: the one of KUBECONFIG, else one that is started for the tests."""
    if given := os.environ.get("KUBECONFIG"):
        yield Cluster(Path(given), None, None)
        return
    if not (TOOLS / "cluster").exists():
        pytest.skip("no cluster: set KUBECONFIG, or DEMORESET_TEST_CLUSTER")
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("the test cluster needs root on Linux; or set KUBECONFIG")
    made = kube.start(nodes=2)
    try:
        kube.make_image("operator", OPERATOR)
        kube.make_image("trainer", TRAINER)
        yield made
    finally:
        kube.stop()


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Iterator[str]:
    """The operator, installed with Helm as a user does it; its namespace."""
    repository, tag = os.environ.get("DEMORESET_OPERATOR_IMAGE", OPERATOR).rsplit(":", 1)
    trainer, trainer_tag = os.environ.get("DEMORESET_TRAINER_IMAGE", TRAINER).rsplit(":", 1)
    settings = {
        "image.repository": repository,
        "image.tag": tag,
        "trainer.image.repository": trainer,
        "trainer.image.tag": trainer_tag,
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    namespace = "demoreset-system"
    cluster.kubectl("create", "namespace", namespace, check=False)
    cluster.kubectl("label", "namespace", namespace, RESTRICTED, "--overwrite")
    cluster.helm(
        *("install", "demoreset", str(ROOT / "charts/demoreset"), "--namespace", namespace),
        *("--wait", "--timeout", "90s", *given),
    )
    yield namespace
    cluster.helm("uninstall", "demoreset", "--namespace", namespace, "--wait")


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace that admits restricted pods only."""
    name = request.node.name.replace("_", "-").removeprefix("test-")[:40].rstrip("-")
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, RESTRICTED)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
