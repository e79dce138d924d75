"""All objects of the runs in golden/: what changes them is seen where it is reviewed.

python tests/operator/test_golden.py    # writes golden/*.yaml anew

The hashes are among them: where a pod's changes, an operator that is upgraded replaces the pods of
all runs of that shape.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import copied
from demoreset_api.names import LABEL_VERSION, LABEL_WORKER
from world import World

GOLDEN = Path(__file__).parent / "golden"
SHAPES = ("smallest", "group", "claim")


class Dumper(yaml.SafeDumper):
    """Lists and texts of several lines as a person writes them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _text)


def rendered(shape: str) -> str:
    """What the operator makes at first for a run as a person wrote it; of several workers one."""
    wanted = yaml.safe_load((GOLDEN / f"{shape}.run.yaml").read_text())
    world = World(**wanted["spec"])
    world.run_body["metadata"] |= wanted["metadata"]
    plan = world.decide()
    pods = [
        body
        for body in plan.create_pods
        if body["metadata"]["labels"].get(LABEL_WORKER, "0") == "0"
    ]
    objects = copied([*plan.apply_children, *pods])
    for one in objects:  # a release is no other object
        one["metadata"]["labels"][LABEL_VERSION] = "VERSION"
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, width=100)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_objects_of_a_run_are_as_they_were_reviewed(shape: str) -> None:
    known = (GOLDEN / f"{shape}.yaml").read_text()
    assert rendered(shape) == known, "if it is meant: python tests/operator/test_golden.py"


if __name__ == "__main__":
    for name in SHAPES:
        (GOLDEN / f"{name}.yaml").write_text(rendered(name))
