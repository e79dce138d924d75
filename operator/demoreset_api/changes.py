"""Changes of a run file from a command line: `spec.ppo.learningRate=3e-4`."""

import json
from typing import Any

from demoreset_api.errors import UserError


def apply(content: dict[str, Any], change: str) -> None:
    """Change one field of a run file.

    Args:
        content: The run file; changed in place.
        change: The field's path and its new value, as JSON, a number or YAML.

    Raises:
        UserError: there cannot be such a field.
    """
    name, equals, value = change.partition("=")
    path = name.strip().split(".")
    if not equals or path[0] not in ("spec", "metadata") or len(path) < 2:
        raise UserError(f"--set: received {change!r}; it looks like spec.ppo.learningRate=3e-4")
    if not all(path):
        raise UserError(f"--set: received {change!r}; {name.strip()!r} is not a field's name")
    for depth, key in enumerate(path[:-1], 1):
        inner = content.setdefault(key, {})
        field = ".".join(path[:depth])
        if isinstance(inner, list):
            raise UserError(
                f"--set: received {change!r}; {field} is a list, which is set as a whole: "
                f"{field}=[A, B]"
            )
        if not isinstance(inner, dict):
            raise UserError(f"--set: received {change!r}; {field} is not a mapping: {inner!r}")
        content = inner
    content[path[-1]] = _value(value)


def _value(text: str) -> Any:
    import yaml  # whoever changes a run file has read one; the models need pydantic alone

    # YAML 1.1 takes 3e-4 for text; people mean a number.
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text) if text[:1] in "+-.0123456789" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
