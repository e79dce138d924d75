"""A run's metrics on disk: one line of JSON per update, over all lives of the run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from demoreset_api.errors import TryAgain, UserError
from demoreset_trainer.progress import Progress

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to a run's metrics.

    Args:
        path: The file.
        resume_update: The update that the run goes on from: later lines belong to updates that
            were lost with the process that made them, and are cut away.

    Raises:
        TryAgain: the disk is full, read-only, or away.
    """

    def __init__(self, path: Path, resume_update: int | None = None) -> None:
        lines = []
        if path.exists():
            last = 0 if resume_update is None else resume_update
            lines = [json.dumps(line) + "\n" for line in read(path) if line["update"] <= last]
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text("".join(lines))
            partial.replace(path)
            self._file = path.open("ab", buffering=0)  # nothing is left to be written by `close`
        except OSError as error:
            raise TryAgain(f"{path}: cannot be written now: {error.strerror}") from error
        self._torn = False

    def append(self, progress: Progress) -> None:
        """Add an update; a disk that is full costs the line, not the run."""
        line = json.dumps(asdict(progress)).encode() + b"\n"
        if self._torn:  # half of an earlier line may be there: it must not spoil this one
            line = b"\n" + line
        try:
            self._torn = self._file.write(line) != len(line)
        except OSError:
            self._torn = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was torn by a crash is left out.

    Raises:
        UserError: there is no such file.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a run's folder, e.g. runs/NAME"
        ) from error
    lines = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("update"), int):
            lines.append(entry)
    return lines
