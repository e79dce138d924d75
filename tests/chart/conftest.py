"""helm, kubectl and promtool: on the PATH, or where the test cluster has unpacked them."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/demoreset"
CLUSTER = Path(os.environ.get("DEMORESET_TEST_CLUSTER") or ROOT.parent / "shared/kubernetes")

Object = dict[str, Any]
Run = Callable[..., subprocess.CompletedProcess[str]]


class Loader(yaml.SafeLoader):
    """Reads 1e-05 as a number, as Kubernetes does; YAML 1.1 wants a point in it."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


@functools.cache
def program(name: str) -> Path:
    """Where it is; a test that needs it is skipped where it is not."""
    if found := shutil.which(name):
        return Path(found)
    cluster = CLUSTER / "cluster"
    if not cluster.exists():
        pytest.skip(f"{name}: neither on the PATH nor by the test cluster (DEMORESET_TEST_CLUSTER)")
    if os.geteuid() != 0:
        pytest.skip(f"{name}: not on the PATH, and the test cluster's needs root")
    told = subprocess.run([cluster, "status"], check=True, capture_output=True, text=True)
    there = Path(json.loads(told.stdout)["kubeconfig"]).parents[1] / "bin" / name
    if not there.exists():
        subprocess.run([cluster, "install"], check=True, capture_output=True)
    return there


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs helm, with folders of its own and no cluster."""
    path, home = program("helm"), tmp_path_factory.mktemp("helm")
    folders = {f"HELM_{kind}_HOME": str(home / kind) for kind in ("CACHE", "CONFIG", "DATA")}
    environment = {**os.environ, **folders, "KUBECONFIG": os.devnull}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def render(helm: Run) -> Callable[..., list[Object]]:
    """Objects of a release that is called demoreset, with these `--set`."""

    @functools.cache
    def text(settings: tuple[str, ...], namespace: str) -> str:
        flags = [part for one in settings for part in ("--set", one)]
        made = helm("template", "demoreset", str(CHART), "--namespace", namespace, *flags)
        assert made.returncode == 0, made.stderr
        return made.stdout

    def objects(*settings: str, namespace: str = "demoreset-system") -> list[Object]:
        return [one for one in yaml.safe_load_all(text(settings, namespace)) if one]

    return objects


@pytest.fixture(scope="session")
def kustomize() -> Callable[[str], list[Object]]:
    """Objects of a folder below manifests/."""
    path = program("kubectl")

    def build(folder: str) -> list[Object]:
        command = [str(path), "kustomize", str(ROOT / "manifests" / folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return list(yaml.load_all(made.stdout, Loader))

    return build


@pytest.fixture(scope="session")
def promtool() -> Run:
    """Runs promtool."""
    if (path := shutil.which("promtool")) is None:
        pytest.skip("promtool is not on the PATH; Debian's package prometheus has it")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([path, *arguments], capture_output=True, text=True)

    return run
