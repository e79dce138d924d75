"""The definition, the chart and the manifests say the same."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from demoreset_api.crd import crd

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/demoreset"
FILES = ("manifests/base/crd.yaml", "charts/demoreset/files/crd.yaml")
REFRESH = f"run: python -m demoreset_api.crd | tee {FILES[0]} > {FILES[1]}"

Object = dict[str, Any]
Render = Callable[..., list[Object]]
Kustomize = Callable[[str], list[Object]]


def alike(objects: list[Object]) -> dict[tuple[str, str, str], Object]:
    """By kind, namespace and name; without what only one of both has."""
    made = {}
    for one in objects:
        meta = one["metadata"]
        if one["kind"] == "Namespace" or "helm.sh/hook" in meta.get("annotations", {}):
            continue  # Helm makes no namespace, and kustomize has no tests
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            meta["labels"].pop(label, None)
        if one["kind"] == "CustomResourceDefinition":
            meta.pop("annotations", None)
        if one["kind"] == "Deployment":
            for container in one["spec"]["template"]["spec"]["containers"]:
                container["env"].sort(key=lambda variable: variable["name"])
        made[one["kind"], meta.get("namespace", ""), meta["name"]] = one
    return made


@pytest.mark.parametrize("path", FILES)
def test_the_definition_is_current(path: str) -> None:
    assert yaml.safe_load((ROOT / path).read_text()) == crd(), REFRESH


def test_both_definitions_are_the_same_file() -> None:
    one, other = (ROOT.joinpath(path).read_bytes() for path in FILES)
    assert one == other, REFRESH


def test_the_chart_renders_the_definition_to_the_last_digit(render: Render) -> None:
    (made,) = (one for one in render() if one["kind"] == "CustomResourceDefinition")
    assert made["spec"] == crd()["spec"]


def test_an_amount_below_nothing_is_refused_as_a_number_too() -> None:
    spec = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    resources = spec["properties"]["workers"]["properties"]["resources"]["properties"]
    size = spec["properties"]["checkpoint"]["properties"]["volume"]["properties"]["size"]
    for amount in (size, *(one["additionalProperties"] for one in resources.values())):
        assert amount["minimum"] == 0


@pytest.mark.parametrize(
    ("folder", "namespace", "settings"),
    [
        ("base", "demoreset-system", ()),
        (
            "overlays/dev",
            "demoreset-system",
            ("image.tag=dev", "trainer.image.tag=dev", "logFormat=text"),
        ),
        ("overlays/namespaced", "demoreset", ("namespaces={demoreset}",)),
    ],
)
def test_kustomize_and_helm_make_the_same_objects(
    render: Render, kustomize: Kustomize, folder: str, namespace: str, settings: tuple[str, ...]
) -> None:
    manifests = alike(kustomize(folder))
    chart = alike(render(*settings, namespace=namespace))
    assert set(manifests) == set(chart)
    for key, one in manifests.items():
        assert one == chart[key], key


@pytest.mark.parametrize(
    ("folder", "name"), [("base", "demoreset-system"), ("overlays/namespaced", "demoreset")]
)
def test_the_namespace_of_the_manifests_is_restricted(
    kustomize: Kustomize, folder: str, name: str
) -> None:
    (namespace,) = (one for one in kustomize(folder) if one["kind"] == "Namespace")
    assert namespace["metadata"]["name"] == name
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_folder_of_manifests_is_compared() -> None:
    found = {path.parent.name for path in (ROOT / "manifests").rglob("kustomization.yaml")}
    assert found == {"base", "dev", "namespaced"}


def test_versions_are_that_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    base = yaml.safe_load((ROOT / "manifests/base/kustomization.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    assert base["labels"][0]["pairs"]["app.kubernetes.io/version"] == version
    assert base["images"][0]["newTag"] == version
    assert all(
        image["image"].endswith(f":{version}")
        for image in yaml.safe_load(chart["annotations"]["artifacthub.io/images"])
    )
