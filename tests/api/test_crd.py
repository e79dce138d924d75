"""The CustomResourceDefinition is what the models say, in the words that Kubernetes knows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from demoreset_api.crd import COLUMNS, RULES, UNCHANGED, crd, schema
from demoreset_api.names import MANAGER
from demoreset_api.reference import reference
from demoreset_api.spec import DemoRef, RunSpec

ROOT = Path(__file__).parents[2]


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema."""
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from nodes(node[key], f"{path}[{key}]")


def test_the_file_is_current() -> None:
    kept = yaml.safe_load((ROOT / "manifests/base/crd.yaml").read_text())
    assert kept == crd(), "python -m demoreset_api.crd > manifests/base/crd.yaml"


def test_the_reference_is_current() -> None:
    kept = (ROOT / "docs/run.md").read_text()
    assert kept == reference(), "python -m demoreset_api.reference > docs/run.md"


def test_every_field_is_described() -> None:
    for path, node in nodes(schema()):
        if path.count(".") > 1 and "[" not in path.rpartition(".")[2]:
            assert node.get("description"), path


def test_every_column_shows_a_field_that_there_is() -> None:
    fields = dict(nodes(schema()))
    for name, kind, path, text, _ in COLUMNS:
        if not path.startswith(".metadata."):
            shown = fields[path]
            assert kind == ("date" if shown.get("format") == "date-time" else shown["type"]), name
        assert text, name


def test_no_rule_needs_a_field_that_its_own_default_does_not_have() -> None:
    """The API server checks a part's default, an empty object, before it has those of its fields.

    It refuses the whole definition then.
    """
    found = 0
    for path, node in nodes(schema()):
        for rule in node.get(RULES, []) if node.get("default") == {} else []:
            found += 1
            if "oldSelf" not in rule["rule"]:  # such rules are of changes alone
                assert rule["rule"].startswith("!has(self."), f"{path}: {rule['rule']}"
    assert found


def test_there_is_nothing_that_kubernetes_does_not_know() -> None:
    for path, node in nodes(schema()):
        assert not {"$ref", "title", "const", "$defs"} & set(node), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        for key in ("exclusiveMinimum", "exclusiveMaximum"):
            assert isinstance(node.get(key, False), bool), path


def test_who_writes_a_text_wrong_is_told_what_is_right() -> None:
    """Of a `pattern` the API server tells the regular expression."""
    rules = []
    for path, node in nodes(schema()):
        assert "pattern" not in node or node.get("x-kubernetes-int-or-string"), path
        rules += [one for one in node.get(RULES, ()) if "self.matches(" in one["rule"]]
    assert len(rules) >= 3
    for rule in rules:
        assert "\\" not in rule["rule"], "a text in CEL has escapes of its own"
        assert "^" not in rule["message"]


def test_what_is_fixed_says_why_and_never_to_delete_the_run() -> None:
    said = {
        rule.get("fieldPath", path).rpartition(".")[2]: rule["message"]
        for path, node in nodes(schema())
        for rule in node.get(RULES, ())
        if "oldSelf" in rule["rule"]
    }
    assert {"demo", "seed", "volume", "managedBy"} <= said.keys()
    for name, message in said.items():
        assert message.startswith(f"{name} cannot be changed: the run's ")
        assert message.endswith("; make a new run with another name")
        depends = name not in ("volume", "managedBy")
        assert ("checkpoints depend on it" in message) is depends


def test_what_is_fixed_neither_comes_nor_goes() -> None:
    """A field's own rule is asked only where the field is there, and was."""
    found = set()
    for path, node in nodes(schema()):
        for name, one in node.get("properties", {}).items():
            if UNCHANGED in [rule["rule"] for rule in one.get(RULES, ())]:
                found.add(name)
                always = name in node.get("required", ()) or "default" in one
                both = f"has(self.{name}) == has(oldSelf.{name})"
                assert always or both in [rule["rule"] for rule in node[RULES]], path
    assert {"demo", "seed", "policy", "managedBy", "mode", "slots", "volume"} <= found


def test_every_rule_between_fields_is_the_same_in_both_worlds() -> None:
    spec = schema()["properties"]["spec"]
    assert {one["rule"] for one in spec[RULES]} > {rule.cel for rule in RunSpec.rules}


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        ("demos/mine.demo", True),
        ("/demos/..mine/a...b", True),
        ("../mine.demo", False),
        ("demos/../../etc/passwd", False),
        ("demos/..", False),
    ],
)
def test_on_a_cluster_a_demo_is_on_the_volume_and_on_one_machine_anywhere(
    path: str, stays: bool
) -> None:
    demo = schema()["properties"]["spec"]["properties"]["demo"]
    rule = next(rule for rule in DemoRef.rules if rule.cluster)
    assert rule.cel in [one["rule"] for one in demo[RULES]]
    (pattern,) = re.findall(r"matches\('(.*)'\)", rule.cel)
    assert rule.holds(DemoRef(path=path)) is (re.search(pattern, path) is None) is stays


@pytest.mark.parametrize(
    ("manager", "right"),
    [
        (None, True),
        (MANAGER, True),
        ("kueue.x-k8s.io/multikueue", True),
        ("mine.org/a/b_c", True),
        ("multikueue", False),
        ("/operator", False),
        ("mine.org/", False),
        ("Mine.org/operator", False),
        ("mine.org/an operator", False),
    ],
)
def test_a_manager_is_named_as_kubernetes_names_controllers(
    manager: str | None, right: bool
) -> None:
    (rule,) = (rule for rule in RunSpec.rules if "managedBy" in rule.cel)
    assert rule.cluster, "what was stored before there was a rule is still read"
    assert rule.holds(RunSpec(demo=DemoRef(name="x"), managed_by=manager)) is right
    if manager is not None:
        (pattern,) = re.findall(r"matches\('(.*)'\)", rule.cel)
        assert (re.search(pattern, manager) is not None) is right


def test_defaults_fill_in_what_was_not_said() -> None:
    spec = schema()["properties"]["spec"]["properties"]
    assert spec["goal"]["default"] == {}
    assert spec["goal"]["properties"]["successRate"]["default"] == 0.9
    assert "default" not in spec["curriculum"]["properties"]["guide"], "the mode decides"
    assert "default" not in spec["demo"]
