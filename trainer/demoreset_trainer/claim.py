"""One command at a time trains in a folder.

On a cluster the workers of one run share it: there the operator sees to it, and lives fence it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from demoreset_api.errors import TryAgain, UserError

NAME = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the kernel gives it back when this process ends, however it does.

    Raises:
        UserError: another process trains there.
        TryAgain: the disk is full, read-only, or away.
    """
    try:
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise TryAgain(f"{folder}: cannot be written now: {error.strerror}") from error
    with file:
        _lock(file, folder)
        with suppress(OSError):  # a full disk is no reason
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder}: process {file.read().strip()} trains there; stop it, or choose another "
            "--dir"
        ) from None
    except OSError:
        pass  # a file system without locks
