"""docs/install.md names every value of the chart, and its commands name what there is."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/install.md").read_text()
VALUES = (ROOT / "charts/demoreset/values.yaml").read_text()

Object = dict[str, Any]


def explained() -> Iterator[tuple[str, Any, str]]:
    """Path, default and explanation of every value that a `# -- ` stands above."""
    path: list[tuple[int, str]] = []
    text: str | None = None
    for line in VALUES.splitlines():
        if found := re.match(r" *# -- (.*)", line):
            text = found[1]
        elif (found := re.match(r" *# (.*)", line)) and text is not None:
            text += " " + found[1]
        elif found := re.match(r"( *)(\w+):", line):
            path = [*(one for one in path if one[0] < len(found[1])), (len(found[1]), found[2])]
            if text is not None:
                names = [name for _, name in path]
                yield ".".join(names), value(names), text
            text = None


def value(names: list[str]) -> Any:
    found = yaml.safe_load(VALUES)
    for name in names:
        found = found[name]
    return found


def table() -> str:
    rows = [
        f"| `{path}` | `{json.dumps(default, separators=(', ', ': '))}` | {text} |"
        for path, default, text in explained()
    ]
    return "\n".join(["| value | default | meaning |", "| --- | --- | --- |", *rows])


def leaves(found: Any, path: str = "") -> Iterator[str]:
    if isinstance(found, dict) and found:
        for name, inner in found.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path


def test_every_value_is_explained() -> None:
    paths = [path for path, _, _ in explained()]
    for leaf in leaves(yaml.safe_load(VALUES)):
        assert [path for path in paths if f"{leaf}.".startswith(f"{path}.")], leaf


def test_the_page_has_the_table_of_values() -> None:
    assert table() in PAGE, f"put this into docs/install.md:\n{table()}"


def test_folders_and_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"\b((?:charts|manifests|docs)/[\w/.-]*\w)", PAGE)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_values_that_the_page_sets_are_known(render: Callable[..., list[Object]]) -> None:
    settings = re.findall(r"--set '?([^\s'`]+)", PAGE)
    assert settings
    for setting in settings:
        assert render(setting)


def test_runs_on_the_page_are_valid() -> None:
    from demoreset_api.spec import DemoResetRun

    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    runs = [one for block in blocks if (one := yaml.safe_load(block)).get("kind") == "DemoResetRun"]
    assert runs
    for run in runs:
        DemoResetRun.model_validate(run)
