"""The run's reference for people, made from the models.

`python -m demoreset_api.reference > docs/run.md`
"""

import sys
from collections.abc import Iterator
from typing import Any

from demoreset_api.crd import COLUMNS, RULES, UNCHANGED, model_schema
from demoreset_api.spec import RunSpec
from demoreset_api.status import RunStatus

HEAD = """# A run's fields

Made from the models (`python -m demoreset_api.reference > docs/run.md`): do not edit. The same
file runs on one machine (`demoreset run -f`) and on a cluster (`kubectl apply -f`). There `kubectl
explain drr.spec` has names, types and meanings; defaults, limits and rules are here alone. Only
`demo` must be said.

```yaml
apiVersion: demoreset.dev/v1alpha1
kind: DemoResetRun
metadata: {name: my-run}        # at most 51 of a-z, 0-9 and -, a letter first, no - last
spec:
  demo: {name: montezuma-first-key}
  workers: {min: 1, max: 4, gpus: 1}
```

*Fixed* fields cannot be changed once a run is on a cluster: its checkpoints depend on them, its
folder is there (`volume`), or its pods are another's (`managedBy`). Of the others, `workers.max`
resizes the group without restarting those who stay; what concerns pods (image, resources,
placement) is rolled through the group, one worker at a time; what concerns the learning, and
`workers.gpus`, `membersPerWorker` and `collectives`, lets all workers save, leave and come back.
"""


def reference() -> str:
    """The page."""
    spec = model_schema(RunSpec)
    lines = [HEAD, "## spec", ""]
    simple = {name: one for name, one in spec["properties"].items() if not _topic(one)}
    lines += _table(simple, _fixed(spec)) + _rules(spec)
    for name, one in spec["properties"].items():
        if _topic(one):
            lines += _section(f"spec.{name}", one, fixed=name in _fixed(spec))
    lines += ["## status", ""]
    status = model_schema(RunStatus, defaults=False)
    lines += ["| field | type | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{path}` | {kind} | {text} |" for path, kind, text in _fields(status)]
    lines += ["", "## Columns of `kubectl get drr`", "", "| column | meaning |", "| --- | --- |"]
    lines += [
        f"| {name}{' (`-o wide`)' if priority else ''} | {text} |"
        for name, _, _, text, priority in COLUMNS
    ]
    return "\n".join(lines) + "\n"


def _topic(node: dict[str, Any]) -> bool:
    return "properties" in node


def _section(path: str, node: dict[str, Any], *, fixed: bool) -> list[str]:
    lines = [f"## {path}", "", node["description"], ""]
    own = set(node["properties"]) if fixed else _fixed(node)
    simple = {name: one for name, one in node["properties"].items() if not _topic(one)}
    lines += _table(simple, own)
    lines += _rules(node)
    for name, one in node["properties"].items():
        if _topic(one):
            lines += _section(f"{path}.{name}", one, fixed=name in own)
    return lines


def _rules(node: dict[str, Any]) -> list[str]:
    lines = []
    for rule in node.get(RULES, ()):
        if "oldSelf" not in rule["rule"]:
            lines += [f"Rule: {rule['message']}.", ""]
    return lines


def _fixed(node: dict[str, Any]) -> set[str]:
    return {
        name
        for name, one in node["properties"].items()
        if any(rule["rule"] == UNCHANGED for rule in one.get(RULES, ()))
    }


def _table(fields: dict[str, dict[str, Any]], fixed: set[str]) -> list[str]:
    if not fields:
        return []
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, one in fields.items():
        default = "" if one.get("default") in (None, {}, []) else f"`{_value(one['default'])}`"
        text = one["description"] + (" *Fixed.*" if name in fixed else "")
        lines.append(f"| `{name}` | {_type(one)} | {default} | {text} |")
    return [*lines, ""]


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind = str(node["type"])
    if kind == "array":
        return f"list of {_type(node['items'])}"
    if isinstance(node.get("additionalProperties"), dict):
        return f"map to {_type(node['additionalProperties'])}"
    limits = [
        f"{sign}{'' if node.get(strict) else '='} {node[end]}"
        for end, strict, sign in (
            ("minimum", "exclusiveMinimum", ">"),
            ("maximum", "exclusiveMaximum", "<"),
        )
        if end in node and abs(node[end]) < 2**62
    ]
    return " ".join([kind, *limits])


def _fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    for name, one in node["properties"].items():
        inner = one.get("items", one)
        if _topic(inner):
            yield from _fields(inner, f"{path}{name}{'[]' if inner is not one else ''}.")
        else:
            yield f"{path}{name}", _type(one), one["description"]


def main() -> None:
    """Print the page."""
    sys.stdout.write(reference())


if __name__ == "__main__":
    main()
