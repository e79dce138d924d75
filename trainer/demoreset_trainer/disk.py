"""Disks that may be full, read-only or away."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from demoreset_api.errors import TryAgain, UserError

# What is so for now: no mistake of the user.
AWAY = (
    *(errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTCONN, errno.ETIMEDOUT),
)


def fault(error: OSError) -> type[TryAgain | UserError]:
    """Whose fault it is that something cannot be written: the disk's for now, or the user's."""
    return TryAgain if error.errno in AWAY else UserError


def write_whole(path: Path, content: bytes) -> None:
    """Put a file there, whole or not at all, which is on the disk afterwards.

    Raises:
        OSError: what was there before is there still.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_flushed(partial, content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file, which is on the disk afterwards."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
