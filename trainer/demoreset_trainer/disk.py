"""Disks that may be full, read-only or away, and files that others made."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
ABANDONED = 3600.0  # seconds after which nobody is writing a folder any more
# What parsing a file that others made may raise, by mistake or by malice.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def fault(error: OSError) -> type[TryAgain | UserError]:
    """Whose fault it is that something cannot be written: the disk's for now, or the user's."""
    return UserError if error.errno in LASTING else TryAgain


def not_now(path: Path, error: OSError) -> TryAgain:
    """What a person is told of a place that takes nothing now, and may later."""
    see_to_it = "make room there" if error.errno in NO_ROOM else "put its disk right"
    return TryAgain(
        f"{path}: cannot be written now: {error.strerror}; {see_to_it}, or choose another place, "
        "and give the same command again"
    )


@contextmanager
def writing(path: Path, flag: str = "--out") -> Iterator[None]:
    """Write a file that a user named, by `flag`.

    Raises:
        UserError: the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; choose another place with {flag}"
        ) from error


def free_name(path: Path) -> Path:
    """The first of NAME.1, NAME.2 ... that nothing has: for what is there, before it is replaced.

    Raises:
        OSError: nobody may look there.
    """
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free


def write_whole(path: Path, content: bytes) -> None:
    """Put a file there, whole or not at all, which is on the disk afterwards.

    Raises:
        OSError: what was there before is there still.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Put files there, each as `write_whole` does; none gets its name before all are written.

    Raises:
        OSError: what was there before is there still, unless a name could not be given.
    """
    partials = {path: path.with_name(f".{path.name}.{uuid4().hex}.partial") for path in contents}
    try:
        for path, partial in partials.items():
            write_flushed(partial, contents[path])
        for path, partial in partials.items():
            partial.replace(path)
        for folder in {path.parent for path in contents}:
            flush_folder(folder)
    except OSError:
        for partial in partials.values():
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


def sweep(folders: Iterable[Path], now: float) -> None:
    """Remove those of half-written folders whose writers were killed long ago.

    Args:
        folders: That are written under a name of their own until they are whole.
        now: The time, in seconds.
    """
    for folder in folders:
        with suppress(FileNotFoundError):  # it is whole now, or gone
            if now - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
