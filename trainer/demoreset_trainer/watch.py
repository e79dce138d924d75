"""All that is told while a run goes on: the screen, the metrics file, /metrics, TensorBoard."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

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
        self._metrics = MetricsFile(folder / "metrics.jsonl", resumed)
        self._latest: int | None = None
        self._report = Report(options.port, options.host) if options.port is not None else None
        self._screen = make_screen(options.log, sys.stdout)
        self._tensorboard = TensorBoardFile(folder) if options.tensorboard else None
        if self._report is not None:
            self.note(f"serving /metrics, /status and /healthz on port {self._report.port}")

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
        known = self._latest is not None and self._latest - 1 <= progress.update <= self._latest
        if not known and self._report is not None:
            self._report.update(progress)  # before the disk, which may keep us waiting
        if progress.rank == 0:
            self._metrics.append(progress)
        if known:
            return
        self._latest = progress.update
        self._screen.show(progress)
        if self._tensorboard is not None:
            self._tensorboard.update(progress)

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
        self._metrics.close()
        for watcher in (self._report, self._tensorboard):
            if watcher is not None:
                watcher.close()
