import os
import secrets
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kube
from kube import RESTRICTED, ROOT, TOOLS, Cluster
from told import RUN, scene


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.alone)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What fails on a cluster says what was there: afterwards nothing of it is left."""
    report = yield
    given = getattr(item, "funcargs", {})
    if report.failed and report.when == "call" and {"cluster", "namespace"} <= given.keys():
        report.sections.append(("cluster", scene(given["cluster"], given["namespace"])))
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real cluster: the one of KUBECONFIG, else one that is started for the tests."""
    if given := os.environ.get("KUBECONFIG"):
        with kube.reached(Path(given)) as found:
            yield found
        return
    if not (TOOLS / "cluster").exists():
        pytest.skip("no cluster: set KUBECONFIG, or DEMORESET_TEST_CLUSTER")
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("the test cluster needs root on Linux; or set KUBECONFIG")
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("the repository lies in /tmp, which every pod has for itself: move it")
    with kube.started(nodes=2) as made:
        yield made


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Iterator[str]:
    """The operator; its namespace."""
    with kube.installed(cluster) as namespace:
        yield namespace


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace that admits restricted pods only."""
    name = request.node.originalname.replace("_", "-").removeprefix("test-")[:40].rstrip("-")
    name += f"-{secrets.token_hex(2)}"
    metadata = {"name": name, "labels": dict([RESTRICTED.split("=")])}
    cluster.apply(name, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    # What they would save has no reader, and the next test needs the cores.
    at_once = ("--grace-period=0", "--force", "--wait=false")
    cluster.kubectl("delete", "pods", "--all", "-n", name, *at_once)


@pytest.fixture
def wanted() -> dict[str, Any]:
    """The run as it is in the repository, with much to go through; nothing of it is kept.

    It has few environments: making the emulators of 64 is most of what a worker does at its start.
    """
    body: dict[str, Any] = yaml.safe_load((ROOT / f"demos/{RUN}.yaml").read_text())
    body["spec"]["checkpoint"] = {
        "intervalSeconds": 5,
        "volume": {"size": "1Gi", "retention": "Delete"},
    }
    body["spec"]["workers"] = {"min": 1, "max": 2}
    body["spec"]["goal"] = {"after": "PlayOn"}  # however fast it learns, it does not end too soon
    body["spec"]["environment"] = {"slots": 8, "stickyProbability": 0.25}
    return body
