"""The two ends of a worker's /status: what the trainer writes is what the operator reads."""

from typing import Any

from pydantic import BaseModel

from demoreset_operator import worker_status
from demoreset_operator.worker_status import WorkerStatus
from demoreset_trainer.report import standing
from small_progress import PROGRESS

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


def written_fields(content: dict[str, Any], prefix: str = "") -> set[str]:
    names = set()
    for name, value in content.items():
        wire = f"{prefix}{name}"
        names |= written_fields(value, f"{wire}.") if isinstance(value, dict) else {wire}
    return names


def test_all_that_the_operator_reads_a_worker_writes() -> None:
    written = written_fields(standing(PROGRESS)) | {"phase"}  # that one is the moment's
    assert read_fields(WorkerStatus) <= written
    assert "curriculum.startFrame" in read_fields(WorkerStatus)
