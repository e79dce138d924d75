"""Lives of a run: whose its folder is.

A life begins whenever a run is read from disk, and where members train on without others that may
do so as well, on the far side of a network that was cut. Of two that hold the run for theirs the
later life is right: the other one may not save. A file in the folder of checkpoints marks the
latest; it is touched for as long as somebody trains in it.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from demoreset_api.errors import TryAgain
from demoreset_trainer.disk import flush_folder, not_now

TOUCH = 2.0  # seconds between two signs of life
WATCH = 10.0  # seconds without one; a network's file system may show it some seconds late
NOBODY = (0, "")  # has taken a run over: no life is refused
_CHECKPOINT = re.compile(r"ckpt-l(\d{6,})-u(\d{10,})")
_MARKER = re.compile(r"life-(\d{6,})")


class TakenOver(TryAgain):
    """A later life owns the folder."""


def checkpoint_name(life: int, update: int) -> str:
    """The name of a checkpoint's folder."""
    return f"ckpt-l{life:06d}-u{update:010d}"


def named(path: Path) -> tuple[int, int] | None:
    """The life and the update by which a checkpoint is named; None where it is none."""
    found = _CHECKPOINT.fullmatch(path.name)
    return (int(found[1]), int(found[2])) if found else None


def take(folder: Path) -> int:
    """Take the next life of a run; nobody else has the same.

    Raises:
        TryAgain: the disk is full, read-only, or away.
    """
    try:
        return _take(folder)
    except OSError as error:
        raise not_now(folder, error) from error


def _take(folder: Path) -> int:
    while True:
        life = latest(folder) + 1
        marker = _marker(folder, life)
        with suppress(FileExistsError):
            marker.touch(exist_ok=False)
            try:
                # Since our look others may have taken it, and a later one that cleared it away.
                if latest(folder) == life:
                    flush_folder(folder)
                    break
            except OSError:
                with suppress(OSError):
                    marker.unlink()  # else it would refuse what its own owner saves
                raise
    with suppress(OSError):  # earlier markers mean nothing any more
        for old, path in _marked(folder):
            if old < life:
                path.unlink(missing_ok=True)
    return life


def latest(folder: Path) -> int:
    """The latest life that anybody has taken; 0: nobody has."""
    saved = [name[0] for path in folder.iterdir() if (name := named(path)) is not None]
    return max(saved + [life for life, _ in _marked(folder)], default=0)


def begun(folder: Path) -> bool:
    """Whether anybody has ever taken a life of this run; as far as the disk can tell now."""
    try:
        return latest(folder) > 0
    except OSError:
        return True


def check(folder: Path, life: int) -> None:
    """Refuse what belongs to an earlier life than the latest.

    Raises:
        TakenOver: there is a later one.
    """
    if (now := latest(folder)) > life:
        raise TakenOver(
            f"{folder}: another process has taken this run over (life {now}, this is life {life}); "
            "this one stops"
        )


@contextmanager
def shown(folder: Path, life: Callable[[], int]) -> Iterator[None]:
    """Meanwhile others can see that somebody trains; by a thread, as a disk may hang.

    Args:
        folder: The run's checkpoints.
        life: In which that is now; 0: in none.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH):
            if now := life():
                with suppress(OSError):  # the disk is away, or there is a later life
                    os.utime(_marker(folder, now))

    threading.Thread(target=touch, daemon=True, name="life").start()
    try:
        yield
    finally:
        ended.set()


def trained_in(folder: Path, life: int, patience: float, alive: Callable[[], None]) -> bool:
    """Whether somebody trains the run in a later life than this.

    Args:
        folder: The run's checkpoints.
        life: In which the one who asks has trained.
        patience: Seconds without a sign after which nobody does.
        alive: Called a few times a second meanwhile.

    Raises:
        OSError: it cannot be told, as the disk is away.
    """
    before, until = _signs(folder, life), time.monotonic() + patience
    while before and time.monotonic() < until:
        alive()
        time.sleep(0.2)
        if _signs(folder, life) != before:
            return True
    return False


def _signs(folder: Path, life: int) -> dict[str, int]:
    """When the markers of later lives were touched last."""
    found = {}
    for later, path in _marked(folder):
        if later > life:
            with suppress(OSError):  # there is a later one still, or the disk is away
                found[path.name] = path.stat().st_mtime_ns
    return found


def _marker(folder: Path, life: int) -> Path:
    return folder / f"life-{life:06d}"


def _marked(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if match := _MARKER.fullmatch(path.name):
            yield int(match[1]), path
