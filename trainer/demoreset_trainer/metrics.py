"""A run's metrics on disk: one line of JSON per update, over all lives of the run.

The first member of the group writes; when it is lost another one is the first, perhaps in another
process that shares the volume. So lines are only ever appended, each with a single write, and what
is taken back is cut off the end of the same file: a file that was put in its place would leave the
others writing to one that nobody reads.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from demoreset_api.errors import UserError
from demoreset_trainer.disk import not_now
from demoreset_trainer.progress import Progress

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to a run's metrics.

    A run that goes back to a checkpoint does updates again, in another life, and their old lines
    were lost with the processes that made them. They are cut when this process appends its first
    line of that life: from there on the run is told anew. Within a life nothing is cut: a line may
    come late, from a process that was frozen while others went on.

    Args:
        path: The file.
        resume_update: The update that the run goes on from, where this process is all of the run:
            then later lines are cut at once. A process that may be one of several does not know,
            and gives None.

    Raises:
        TryAgain: the disk is read-only, or away.
    """

    def __init__(self, path: Path, resume_update: int | None = None) -> None:
        self._path = path
        self._life = -1  # of the latest line that this process appended
        try:
            self._file = path.open("a+b", buffering=0)  # nothing is left to be written by `close`
            if resume_update is not None:
                self._cut(resume_update + 1, math.inf)
        except OSError as error:
            raise not_now(path, error) from error

    def append(self, progress: Progress) -> None:
        """Add an update; a disk that is full costs the line, not the run."""
        line = json.dumps(asdict(progress)).encode() + b"\n"
        try:
            if progress.life > self._life:
                self._cut(progress.update, progress.life)
            self._life = progress.life
            if not self._ends_whole():  # half of somebody's line must not spoil this one
                line = b"\n" + line
            self._file.write(line)
        except OSError:
            return

    def _cut(self, update: int, life: float) -> None:
        """Take lines of `update` or a later one, of earlier lives, off the end of the file."""
        whole = read = 0
        taken_back = False
        with self._path.open("rb") as file:
            for line in file:
                read += len(line)
                if (entry := _parse(line)) is None:
                    continue
                taken_back = entry["update"] >= update and _life(entry) < life
                if not taken_back:
                    whole = read
        if taken_back:
            self._file.truncate(whole)

    def _ends_whole(self) -> bool:
        size = os.fstat(self._file.fileno()).st_size
        return size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in the order of their updates; a torn one is left out.

    An update may be there twice: it was done again by the others after its first member died, or
    in another life, or a line came late. The last one of the latest life counts.

    Raises:
        UserError: there is no such file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a run's folder, e.g. runs/NAME"
        ) from error
    entries = [entry for line in content.splitlines() if (entry := _parse(line)) is not None]
    by_update = {entry["update"]: entry for entry in sorted(entries, key=_life)}
    return [by_update[update] for update in sorted(by_update)]


def _life(entry: dict[str, Any]) -> int:
    return int(entry["life"])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and all(
        isinstance(entry.get(key), int) for key in ("update", "life")
    )
    return entry if whole else None
