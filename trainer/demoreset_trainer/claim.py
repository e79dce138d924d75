"""One command at a time trains in a folder.

On a cluster the workers of one run share it: there the operator sees to it, and lives fence it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from demoreset_api.errors import UserError
from demoreset_trainer.disk import fault

NAME = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the kernel gives it back when this process ends, however it does.

    Raises:
        UserError: another process trains there, or it cannot be written.
        TryAgain: the disk is full, read-only, or away.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise fault(error)(
            f"{folder}: the run's folder cannot be written: {error.strerror}; choose another --dir"
        ) from error
    try:
        _lock(descriptor, folder)
        with suppress(OSError):  # a full disk is no reason
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        raise UserError(
            f"{folder}: process {owner} trains there; stop it, or choose another --dir"
        ) from None
    except OSError:
        pass  # a file system without locks
