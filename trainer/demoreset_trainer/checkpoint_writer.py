"""Saving while training goes on: the loop is held up for a copy in memory, a thread does the rest.

One checkpoint is in flight at a time; what comes meanwhile is skipped, never queued. A disk that is
full, read-only or away does not stop the training: it is told, and tried again.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from demoreset_trainer import checkpoint, lives
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.disk import NO_ROOM
from demoreset_trainer.lives import NOBODY, TakenOver
from demoreset_trainer.reserve import Reserve

MAX_BLOCKED = 0.01  # share of the time that copies may take
LAST_SAVE = 20.0  # seconds for the last checkpoint
LATE = 60.0  # seconds, or three times what the latest took: then the disk does not answer


@dataclass(frozen=True)
class Saved:
    """The latest checkpoint."""

    update: int
    at: float  # time.monotonic
    bytes: int
    seconds: float | None  # that writing it took; None where another process did it


class CheckpointWriter:
    """Writes the checkpoints of a run; the loop's `Saver`.

    Args:
        folder: Of all its checkpoints.
        keep: How many of the newest stay; the best stays, too.
        keep_every: So does the first of every so many updates; none without.
        interval: Least seconds between two.
        note: Told when saving begins to fail, and when it works again.
        better: Whether a state is at least as good as that of the best checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        interval: float,
        note: Callable[[str], None],
        better: Callable[[dict[str, Any], dict[str, Any]], bool] = lambda now, kept: True,
    ) -> None:
        self._folder, self._keep, self._interval, self._note = folder, keep, interval, note
        self._keep_every, self._better = keep_every, better
        self._thread: threading.Thread | None = None
        # None has been offered by this process: the run may have lost others before they could.
        self._offered = float("-inf")
        self._blocked = 0.0  # seconds that the latest copy took
        self._failed: Exception | None = None
        self.overtaken = NOBODY
        self.life = 0  # the latest that this process has taken for the group
        self._taking: Future[int] | None = None  # the next life, while it is being taken
        self._told_late = False
        self._ends = False  # what is written now is the last
        self._place, self._reserve = _place(folder), Reserve(folder)
        self.saved: Saved | None = None  # by this process
        self._read: Saved | None = None

    def resume(self, snapshot: Snapshot) -> None:
        """Tell of the checkpoint that the run goes on from, until a newer one is written."""
        path = self._folder / snapshot.name
        with suppress(OSError):  # what cannot be told now is no reason not to go on
            age = max(0.0, time.time() - path.stat().st_mtime)  # the disk's clock is its own
            self._read = Saved(snapshot.update, time.monotonic() - age, _size(path), None)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def error(self) -> str | None:
        """Why the latest attempt failed, or does not end; None when it did not."""
        if self._late:
            seconds = time.monotonic() - self._offered
            return f"still being written after {seconds:.0f} s: the disk does not answer"
        failed = self._failed
        return None if failed is None else str(failed) or type(failed).__name__

    @property
    def _late(self) -> bool:
        usual = 3 * (self.saved.seconds or 0.0) if self.saved is not None else 0.0
        return self.busy and time.monotonic() - self._offered > max(LATE, usual)

    def due(self) -> bool:
        """Whether the interval is over, and copies stay below their share of the time."""
        waited = time.monotonic() - self._offered
        return waited >= max(self._interval, self._blocked / MAX_BLOCKED)

    def save(self, snapshot: Snapshot, *, candidate: bool = False) -> None:
        """Begin to write; returns when the copy is made. Skipped while another is in flight."""
        if self.busy:
            if self._late and not self._told_late:
                self._told_late = True
                self._note(f"checkpoint {self.error}; training goes on")
            return
        if self._taking is not None and not self._taking.done():  # this state is of that life
            return
        begun = time.monotonic()
        copied = replace(snapshot.copy(), life=max(snapshot.life, self.life))
        self._offered = time.monotonic()
        self._blocked = self._offered - begun
        self._thread = threading.Thread(
            target=self._write, args=(copied, candidate), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(
        self, snapshot: Snapshot, *, candidate: bool = False, patience: float = LAST_SAVE
    ) -> bool:
        """Write a last checkpoint and wait for it, `patience` seconds in all; whether it is saved.

        With a disk that hangs this returns at the deadline, and the process may end: what is not
        whole by then is not there.
        """
        deadline, self._ends = time.monotonic() + patience, True
        try:
            self._wait(patience)
            if self._taking is not None:
                wait([self._taking], max(0.0, deadline - time.monotonic()))
            if self.busy:
                return False
            self.save(snapshot, candidate=candidate)
            self._wait(deadline - time.monotonic())
        finally:
            self._ends = False  # a run may play on
        saved = self.saved
        return not self.busy and saved is not None and saved.update == snapshot.update

    def take_life(self) -> int | None:
        """Take the run's next life, over several calls, as a disk may hang; None until it is taken.

        Raises:
            TryAgain: it could not be taken for now.
        """
        if self._taking is None:
            self._taking = Future()
            threading.Thread(target=self._take, args=(self._taking,), daemon=True).start()
        if not self._taking.done():
            return None
        taken, self._taking = self._taking, None
        return taken.result()

    def _take(self, taken: "Future[int]") -> None:
        try:
            self._wait(LAST_SAVE)  # what is being written is of the life that ends here
            self._check_place()
            self.life = lives.take(self._folder)
            taken.set_result(self.life)
        except Exception as error:
            taken.set_exception(error)

    def _wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(max(seconds, 0))

    def _write(self, snapshot: Snapshot, candidate: bool) -> None:
        begun = time.monotonic()
        failed = "checkpoint not written"
        try:
            self._check_place()
            path = self._put(snapshot)
            size = _size(path)
            if candidate and self._is_best(snapshot):
                checkpoint.mark_best(self._folder, path)
            now = time.monotonic()
            self.saved = Saved(snapshot.update, now, size, now - begun)
            failed = "old checkpoints not deleted"
            checkpoint.prune(self._folder, self._keep, self._keep_every)
            if self._ends:
                self._reserve.release()
            else:
                self._reserve.hold(2 * size)
        except Exception as error:  # the thread's end: what is not kept here is lost in silence
            overtaken = isinstance(error, TakenOver)
            if overtaken and (self._taking is not None or self.life > snapshot.life):
                return  # by the life that this process takes: the next is saved in that
            first, self._failed = self._failed is None, error
            if overtaken:
                self.overtaken = snapshot.life, str(error)
            if first:
                ends = self._ends or overtaken
                then = "" if ends else "; training goes on, tried again later"
                self._note(f"{failed} ({error}){then}")
            return
        if self._failed is not None or self._told_late:
            self._note("checkpoints are written again")
        self._failed, self._told_late = None, False

    def _put(self, snapshot: Snapshot) -> Path:
        """Write it; the last one with the room that was kept for it, where there is no other."""
        try:
            return checkpoint.write(self._folder, snapshot)
        except OSError as error:
            if not (self._ends and error.errno in NO_ROOM and self._reserve.release()):
                raise
            return checkpoint.write(self._folder, snapshot)

    def _check_place(self) -> None:
        """Refuse a folder that has taken the place of the run's, as of a command with --fresh."""
        now = _place(self._folder)
        if None not in (now, self._place) and now != self._place:
            raise TakenOver(f"{self._folder}: another run has begun in its place; this one stops")

    def _is_best(self, snapshot: Snapshot) -> bool:
        kept = checkpoint.best_state(self._folder)
        return kept is None or self._better(snapshot.state, kept)

    def facts(self) -> dict[str, Any]:
        """The checkpoint fields of `Progress`."""
        saved = self.saved or self._read
        return {
            "checkpoint_update": saved.update if saved else None,
            "checkpoint_age_seconds": time.monotonic() - saved.at if saved else None,
            "checkpoint_bytes": saved.bytes if saved else None,
            "checkpoint_seconds": saved.seconds if saved else None,
            "checkpoint_error": self.error,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(LAST_SAVE)


def _size(path: Path) -> int:
    """Of a checkpoint, in bytes."""
    return sum(file.stat().st_size for file in path.iterdir())


def _place(folder: Path) -> int | None:
    """Which folder has this name now; None where there is none, or the disk is away."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None
