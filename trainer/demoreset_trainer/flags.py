"""What several commands ask of their flags: told before any work is done."""

import argparse
from collections.abc import Callable
from pathlib import Path

from demoreset_api.errors import UserError


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


def free(flag: str, path: Path, *suffixes: str, force: bool) -> Path:
    """A place that may be written to.

    Raises:
        UserError: it is a folder, in none, there already, or has another ending.
    """
    if suffixes and not path.name.endswith(suffixes):
        raise UserError(f"{flag}: received {path}; it must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder")
    if path.exists() and not force:
        raise UserError(f"{flag}: {path} is there already; --force overwrites it")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{flag}: {path}: there is no folder {path.resolve().parent}")
    return path
