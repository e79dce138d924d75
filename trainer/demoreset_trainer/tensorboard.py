"""TensorBoard event files beside a run, where somebody wants them."""

import math
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from demoreset_api.errors import UserError
from demoreset_trainer.progress import Progress


def check(wanted: bool) -> None:
    """Look before anything is made whether event files can be written.

    Raises:
        UserError: the package is not installed.
    """
    if wanted and find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard needs one more package: in the clone, pip install -e '.[tensorboard]'"
        )


class TensorBoardFile:
    """Writes every number of an update over the run's frames."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = partial(SummaryWriter, str(folder / "tensorboard"))
        self._writer: SummaryWriter | None = None

    def update(self, progress: Progress) -> None:
        """Add an update."""
        if self._writer is None:  # updates that were lost before a resume are taken out of sight
            self._writer = self._make(purge_step=progress.frames)
        for name, value in asdict(progress).items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, progress.frames)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
