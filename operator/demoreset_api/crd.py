"""The CustomResourceDefinition, made from the models.

    python -m demoreset_api.crd > manifests/base/crd.yaml

The API server checks and fills in what pydantic does on one machine: types, limits, defaults, and,
as CEL, the rules between fields. Fields that a checkpoint depends on are immutable.
"""

import re
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from demoreset_api.names import GROUP, KIND, PLURAL, SHORT, SINGULAR, VERSION
from demoreset_api.spec import NAME, ApiModel, RunSpec
from demoreset_api.status import RunStatus

MAX_TEXT = 4096  # characters of a text without a limit of its own: CEL must know its cost
MAX_EXACT = 2**53  # larger whole numbers JSON does not keep
MAX_ITEMS = 64  # of a mapping without a limit of its own
RULES = "x-kubernetes-validations"
UNCHANGED = "self == oldSelf"  # the rule of a fixed field
# Why a field is fixed where it is not that the run's checkpoints depend on it.
FIXED = {"managedBy": "the run's pods are its manager's", "volume": "the run's folder is there"}

COLUMNS = (
    ("Phase", "string", ".status.phase", "Pending, Running, Suspended, Complete, Failed", 0),
    ("Start", "integer", ".status.curriculum.startFrame", "Where episodes begin; 0: the game's", 0),
    ("Progress", "string", ".status.curriculum.progress", "How far the start has moved back", 0),
    ("Success", "number", ".status.curriculum.successRate", "Around the start", 0),
    ("Workers", "string", ".status.workers.shown", "Ready of wanted", 0),
    ("Restarts", "integer", ".status.restarts.total", "Workers started again", 0),
    ("Age", "date", ".metadata.creationTimestamp", "Since it was applied", 0),
    ("Demo", "string", ".spec.demo.name", "A bundled demonstration", 1),
    ("GPUs", "integer", ".spec.workers.gpus", "Of each worker", 1),
    ("Frames", "integer", ".status.training.frames", "Emulator frames", 1),
    ("Frames/s", "number", ".status.training.framesPerSecond", "Lately", 1),
    ("ETA", "number", ".status.training.etaSeconds", "Seconds until the start is reached", 1),
    ("Goal", "number", ".status.curriculum.goalRate", "Success from the game's own start", 1),
    ("Checkpoint", "date", ".status.checkpoint.time", "The latest", 1),
)


def crd() -> dict[str, Any]:
    """The object that `kubectl apply` takes."""
    columns = [
        {"name": name, "type": kind, "jsonPath": path, "description": text, "priority": priority}
        for name, kind, path, text, priority in COLUMNS
    ]
    scale = {
        "specReplicasPath": ".spec.workers.max",
        "statusReplicasPath": ".status.workers.current",
        "labelSelectorPath": ".status.workers.selector",
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}, "scale": scale},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema()},
                }
            ],
        },
    }


def schema() -> dict[str, Any]:
    """The schema of the whole resource."""
    name = {
        "rule": f"self.metadata.name.matches('{NAME.pattern}')",
        "message": f"metadata.name: {NAME.right}",
    }
    return {
        "type": "object",
        "description": "An agent that learns an Atari game from one demonstration.",
        "required": ["spec"],
        RULES: [name],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": model_schema(RunSpec),
            # It has one writer; who manages which leaf of it is an eighth of what a write costs.
            "status": {
                **model_schema(RunStatus, defaults=False),
                "x-kubernetes-map-type": "atomic",
            },
        },
    }


def model_schema(model: type[BaseModel], *, defaults: bool = True) -> dict[str, Any]:
    """A model's schema as a CRD wants it: in one piece, without what Kubernetes does not know."""
    _, found = models_json_schema([(model, "validation")], by_alias=True)
    return _Schema(found["$defs"], _models(model), defaults).of(found["$defs"][model.__name__])


def _models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _models(kind)
    return found


class _Schema:
    def __init__(
        self, definitions: dict[str, Any], models: dict[str, type[BaseModel]], defaults: bool
    ) -> None:
        self._definitions, self._models, self._defaults = definitions, models, defaults

    def of(self, node: dict[str, Any]) -> dict[str, Any]:
        """The schema of one node, and of all below it."""
        node = dict(node)
        text = node.pop("description", None)
        if "$ref" in node:
            made = self.of(self._definitions[node["$ref"].rpartition("/")[2]])
            if "default" in node and self._defaults:
                # Of an object: its own fields' defaults fill it in.
                made["default"] = {} if made["type"] == "object" else node["default"]
        elif "anyOf" in node:
            (kind,) = (one for one in node["anyOf"] if one.get("type") != "null")
            made = self.of({**kind, **{k: v for k, v in node.items() if k in ("quantity",)}})
        else:
            made = self._plain(node)
        if text is not None:
            made["description"] = " ".join(text.split())
        return made

    def _plain(self, node: dict[str, Any]) -> dict[str, Any]:
        if node.get("quantity"):
            made: dict[str, Any] = {
                "x-kubernetes-int-or-string": True,
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                # Before 1.34 a rule in CEL costs as much as one of the longest text of a request.
                "pattern": node["form"]["pattern"],  # of a text
                "minimum": 0,  # of a number
            }
        elif "const" in node:
            made = {"type": "string", "enum": [node["const"]]}
        else:
            made = {"type": node["type"], **self._typed(node)}
        if (form := node.get("form")) and not node.get("quantity"):
            rule = f"self.matches('{form['pattern']}')"
            made[RULES] = [{"rule": rule, "message": form["right"]}]
        for key in ("enum", "minLength", "maxLength", "maxItems", "format"):
            if key in node:
                made[key] = node[key]
        if self._defaults and node.get("default") is not None:
            made["default"] = node["default"]
        return made

    def _typed(self, node: dict[str, Any]) -> dict[str, Any]:
        match node["type"]:
            case "object":
                return self._object(node)
            case "array":
                made: dict[str, Any] = {"items": self.of(node["items"])}
                if key := node.get("key"):
                    made |= {
                        "x-kubernetes-list-type": "map",
                        "x-kubernetes-list-map-keys": [key],
                    }
                return made
            case "integer":
                return {"format": "int64", **_limits(node, whole=True)}
            case "number":
                return {"format": "double", **_limits(node, whole=False)}
            case "string" if "enum" not in node and "format" not in node:
                return {"maxLength": node.get("maxLength", MAX_TEXT)}
        return {}

    def _object(self, node: dict[str, Any]) -> dict[str, Any]:
        if "properties" not in node:
            inner = node.get("additionalProperties", True)
            if inner is True:
                return {"x-kubernetes-preserve-unknown-fields": True}
            return {"additionalProperties": self.of(inner), "maxProperties": MAX_ITEMS}
        made: dict[str, Any] = {
            "properties": {name: self.of(one) for name, one in node["properties"].items()}
        }
        if node.get("required"):
            made["required"] = node["required"]
        model = self._models[node["title"]]
        rules: list[dict[str, str]] = []
        if issubclass(model, ApiModel):
            rules += _rules(model)
            for name in model.fixed:
                one = made["properties"][name]
                one.setdefault(RULES, []).append(_fixed(name))
                if name not in made.get("required", ()) and "default" not in one:
                    rules.append(_as_absent_as_before(name))
        if rules:
            made[RULES] = rules
        return made


def _limits(node: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    made: dict[str, Any] = {key: node[key] for key in ("minimum", "maximum") if key in node}
    if node.get("exclusiveMaximum", 0) > MAX_EXACT:  # int64 itself is the limit
        node = {key: value for key, value in node.items() if key != "exclusiveMaximum"}
    for end, key, step in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        if key in node and whole:
            made[end] = node[key] + step
        elif key in node:
            made |= {end: node[key], key: True}
    return made


def _rules(model: type[ApiModel]) -> list[dict[str, str]]:
    # An expression for the message, with the values received, is beyond what CEL may cost.
    return [
        {"rule": rule.cel, "message": re.sub(r" \({[\w.]+}\)", "", rule.message)}
        for rule in model.rules
    ]


def _fixed(name: str) -> dict[str, str]:
    """The rule of a field that never changes, while it is there.

    It is the field's own: for each field that a rule of spec reads, the API server makes a table of
    all of them.
    """
    # Not to delete the run: its checkpoints may go with it, or a new one would find them.
    why = FIXED.get(name, "the run's checkpoints depend on it")
    return {
        "rule": UNCHANGED,
        "message": f"{name} cannot be changed: {why}; make a new run with another name",
        "reason": "FieldValueForbidden",
    }


def _as_absent_as_before(name: str) -> dict[str, str]:
    """The rule of what it is in, where it may be absent: it neither comes nor goes."""
    rule = f"has(self.{name}) == has(oldSelf.{name})"
    return {**_fixed(name), "rule": rule, "fieldPath": f".{name}"}


def main() -> None:
    """Print the definition, as YAML (which JSON is, but people read this)."""
    import yaml

    yaml.safe_dump(crd(), sys.stdout, sort_keys=False, width=100)


if __name__ == "__main__":
    main()
