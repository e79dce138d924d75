"""Room on the disk for a run's last checkpoint, taken while there is some."""

import os
from contextlib import suppress
from pathlib import Path

NAME = ".reserve"


class Reserve:
    """A file beside the checkpoints that is given up when nothing else fits any more.

    Training goes on while the disk is full; without this, what was learned meanwhile would be lost
    with a process that is told to leave.

    Args:
        folder: Of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def hold(self, size: int) -> None:
        """Take so many bytes, if the disk has them: no reserve is no reason to stop."""
        with suppress(OSError):
            if self._path.exists() and self._path.stat().st_size >= size:
                return
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            self.release()  # half of it helps nobody

    def release(self) -> bool:
        """Give it back; whether there was any."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False
