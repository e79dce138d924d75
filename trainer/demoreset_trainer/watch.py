"""All that is told while a run goes on: the screen, the metrics file, /metrics, TensorBoard."""

import argparse
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from demoreset_trainer import metrics
from demoreset_trainer.metrics import MetricsFile
from demoreset_trainer.progress import Progress
from demoreset_trainer.report import Report
from demoreset_trainer.screen import make_screen
from demoreset_trainer.tensorboard import TensorBoardFile


class Watchers:
    """The loop's `Watch`, or a supervisor's for all of its members: tells everyone else.

    Args:
        folder: The run's.
        options: port, host, log, tensorboard.
        resumed: The update that the run goes on from; None where there may be other members.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, resumed: int | None) -> None:
        self._behind = _Behind()
        self._metrics = MetricsFile(folder / metrics.NAME, resumed)
        self.latest: Progress | None = None
        self._report = Report(options.port, options.host) if options.port is not None else None
        self._screen = make_screen(options.log, sys.stdout)
        self._tensorboard = TensorBoardFile(folder) if options.tensorboard else None
        if self._report is not None:
            self.note(
                f"serving /metrics, /status, /healthz and /readyz on port {self._report.port}"
            )

    def phase(self, name: str) -> None:
        """The loop has entered a phase."""
        if self._report is not None:
            self._report.phase(name)

    def update(self, progress: Progress) -> None:
        """An update is done.

        Members of one supervisor tell it one after the other: the file takes the words of the
        group's first, all others those of whoever comes first. Members are never more than an
        update apart, so a number that is further back is a run that went back to a checkpoint.
        """
        latest = self.latest.update if self.latest is not None else None
        known = latest is not None and latest - 1 <= progress.update <= latest
        if not known and self._report is not None:
            self._report.update(progress)
        if progress.rank == 0:
            self._behind.do(self._metrics.append, progress)
        if known:
            return
        self.latest = progress
        self._screen.show(progress)
        if self._tensorboard is not None:
            self._behind.do(self._tensorboard.update, progress)

    def states(self, states: Mapping[str, str]) -> None:
        """How the members of this supervisor are, by their ids."""
        if self._report is not None:
            self._report.states(states)

    def note(self, text: str) -> None:
        """Something happened that a person wants to know."""
        self._screen.note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._screen.close()
        if self._report is not None:
            self._report.close()
        self._behind.do(self._metrics.close)
        if self._tensorboard is not None:
            self._behind.do(self._tensorboard.close)
        self._behind.close()


class _Behind:
    """Does in a thread, one after the other, what a disk may keep waiting: for ever, if it hangs.

    What is too much by then is left out.
    """

    MOST = 1000
    PATIENCE = 5.0  # seconds, at the end

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(self.MOST)
        self._thread = threading.Thread(target=self._run, daemon=True, name="files")
        self._thread.start()

    def do(self, job: Callable[..., None], *arguments: Any) -> None:
        with suppress(queue.Full):
            self._jobs.put_nowait(partial(job, *arguments))

    def close(self) -> None:
        with suppress(queue.Full):
            self._jobs.put(None, timeout=self.PATIENCE)
            self._thread.join(self.PATIENCE)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with suppress(Exception):  # a disk's, or TensorBoard's: the training goes on
                job()
