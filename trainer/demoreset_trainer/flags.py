"""What several commands ask of their flags: told before any work is done."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

from demoreset_api.errors import UserError
from demoreset_trainer.disk import writing


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number that is not too small, nor too large."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"received {text}; at least {least} is needed")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"received {text}; at most {most} is possible")
        return value

    return number


def chance(text: str) -> float:
    """An argparse type: a probability."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"received {text}; from 0 to 1 is possible")
    return value


PORT = whole(0, 65535)


def place(text: str) -> Path:
    """An argparse type: where a file or folder is; a variable of a script may be empty."""
    if not text:
        raise argparse.ArgumentTypeError("received nothing; it is a file or folder")
    return Path(text)


def writable(flag: str, path: Path) -> None:
    """Refuse a place that cannot be written to, before minutes or hours of work for it.

    Raises:
        UserError: it is a folder, in none, or the disk takes nothing.
    """
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder")
    if path.exists() and not path.is_file():
        return  # a device, or a pipe
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{flag}: {path}: there is no folder {folder}")
    with writing(path, flag), TemporaryFile(dir=folder) as probe:
        probe.write(bytes(1 << 16))  # a full disk has room for a name, but not for this


def free(flag: str, path: Path, *suffixes: str, force: bool) -> Path:
    """A place that may be written to.

    Raises:
        UserError: it is there already, has another ending, or cannot be written to.
    """
    if suffixes and not path.name.endswith(suffixes):
        raise UserError(f"{flag}: received {path}; it must end in {' or '.join(suffixes)}")
    if path.exists() and not path.is_dir() and not force:
        raise UserError(f"{flag}: {path} is there already; --force overwrites it")
    writable(flag, path)
    return path
