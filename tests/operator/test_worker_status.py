"""The two ends of a worker's /status: what the trainer writes is what the operator reads."""

import json
from typing import Any

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from demoreset_operator import worker_status
from demoreset_operator.worker_status import WorkerStatus
from demoreset_trainer.report import standing
from small_progress import DISTINCT, PROGRESS

PARTS = (
    worker_status.Curriculum,
    worker_status.Training,
    worker_status.Checkpoint,
    worker_status.Evaluation,
    worker_status.Resumed,
)


def read_fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The names, as on the wire, that a model reads, with those of its parts."""
    names = set()
    for name, field in model.model_fields.items():
        wire = f"{prefix}{field.alias or name}"
        part = next((kind for kind in PARTS if kind.__name__.lower() == name), None)
        names |= read_fields(part, f"{wire}.") if part else {wire}
    return names


def written_fields(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is written, by the same names."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        wire = f"{prefix}{to_camel(name)}"
        found |= written_fields(value, f"{wire}.") if isinstance(value, dict) else {wire: value}
    return found


def test_all_that_the_operator_reads_a_worker_writes() -> None:
    written = written_fields(standing(PROGRESS)).keys() | {"phase"}  # that one is the moment's
    assert read_fields(WorkerStatus) <= written
    assert "curriculum.startFrame" in read_fields(WorkerStatus)


def test_what_the_operator_reads_is_what_the_worker_wrote() -> None:
    written = standing(DISTINCT)
    status = worker_status.read(json.dumps(written | {"phase": "rollout"}).encode())
    # By the names in Python: those on the wire could be exchanged on both ways.
    read = written_fields(status.model_dump(by_alias=False))
    assert read.pop("phase") == "rollout"
    assert read.items() <= written_fields(written).items()
    assert len(set(read.values())) == len(read)
