"""The graph of a run, or of several: where the start was, success, scores, coefficients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from demoreset_api.errors import UserError
from demoreset_trainer import metrics

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# title, field, and whether it is a share
PANELS = (
    ("start of the episodes (frame of the demo)", "start_frame", False),
    ("success at the frontier", "success_rate", True),
    ("success from the game's own start", "goal_rate", True),
    ("mean score from the game's own start", "score_mean", False),
    ("entropy (nats)", "entropy", False),
    ("learning rate", "learning_rate", False),
)


def plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs in `folders`, one colour each, into a PNG.

    Raises:
        UserError: a folder has no metrics, or none yet.
    """
    runs = [(str(folder), metrics.read(folder / metrics.NAME)) for folder in folders]
    for name, lines in runs:
        if not lines:
            raise UserError(f"{name}: no update is done yet; draw it after the first")
    figure, axes = plt.subplots(3, 2, figsize=(11, 9), sharex=True, constrained_layout=True)
    for panel, (title, field, share) in zip(axes.flat, PANELS, strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        for name, lines in runs:
            _draw(panel, name, lines, field)
        if share:
            panel.set_ylim(-0.02, 1.02)
        else:
            if field != "score_mean":  # some games take points away
                panel.set_ylim(bottom=0)
            panel.ticklabel_format(axis="y", scilimits=(-3, 7))  # learning rates are small
    axes[0, 0].axhline(0, color="black", linewidth=0.8)
    axes[0, 0].annotate("the game's own start", (0, 0), (4, 4), textcoords="offset points", size=8)
    for panel in axes[-1]:
        panel.set_xlabel("frames (millions)")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw(panel: Axes, name: str, lines: Sequence[dict[str, Any]], field: str) -> None:
    points = [(line["frames"] / 1e6, line[field]) for line in lines if line.get(field) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
