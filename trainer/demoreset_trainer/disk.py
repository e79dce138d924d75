"""Disks that may be full, read-only or away."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from demoreset_api.errors import TryAgain, UserError

# What stays so until somebody changes it. All else is so for now: volumes behind a network fail in
# more ways than one can list, and come back.
LASTING = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EXDEV, errno.EFBIG),
    *(errno.ENOSYS, errno.EOPNOTSUPP),
)


def fault(error: OSError) -> type[TryAgain | UserError]:
    """Whose fault it is that something cannot be written: the disk's for now, or the user's."""
    return UserError if error.errno in LASTING else TryAgain


def write_whole(path: Path, content: bytes) -> None:
    """Put a file there, whole or not at all, which is on the disk afterwards.

    Raises:
        OSError: what was there before is there still.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write_flushed(partial, content)
        partial.replace(path)
        flush_folder(path.parent)
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


def flush_folder(folder: Path) -> None:
    """Put on the disk which files a folder has, and by what names, where that can be asked for."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)
