"""The graph of a run, or of several: where the start was, success, scores, coefficients.

Where a group trained there is a strip below: how many members it had, and every recovery.
"""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

from demoreset_api.errors import UserError
from demoreset_trainer import metrics, run_folder, runfile
from demoreset_trainer.counters import Cause
from demoreset_trainer.disk import write_whole, writing

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# title, field, and whether it is a share
PANELS = (
    ("start of the episodes (frame of the demo)", "start_frame", False),
    ("success at the frontier", "success_rate", True),
    ("success from the game's own start", "goal_rate", True),
    ("mean score from the game's own start", "score_mean", False),
    ("entropy (nats)", "entropy", False),
    ("learning rate", "learning_rate", False),
)
HEIGHT, STRIP = 9.0, 1.9  # inches: the panels, the strip
OTHER = "other"  # nothing that the run told
# A new generation is drawn by what made it.
MARKS: dict[str, str] = {
    Cause.COLLECTIVE: "x",
    Cause.LEFT: "v",
    Cause.JOINED: "^",
    Cause.COORDINATOR: "s",
    OTHER: "|",
}


def plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs in `folders`, one colour each, into a PNG: whole, or as it was before.

    Raises:
        UserError: a folder has no metrics, or none yet; or the PNG cannot be written.
    """
    runs = [(_name(folder), metrics.read(folder / metrics.NAME)) for folder in folders]
    for folder, (_, lines) in zip(folders, runs, strict=True):
        if not lines:
            raise UserError(f"{folder}: no update is done yet; draw it after the first")
    grouped = any(_grouped(lines) for _, lines in runs)
    figure = plt.figure(figsize=(11, HEIGHT + STRIP * grouped), layout="constrained")
    above: FigureBase = figure
    if grouped:
        parts = figure.add_gridspec(2, 1, height_ratios=(HEIGHT, STRIP))
        above = figure.add_subfigure(parts[0])
        _strip(figure.add_subfigure(parts[1]).subplots(), runs)
    axes = above.subplots(3, 2, sharex=True)
    for panel, (title, field, share) in zip(axes.flat, PANELS, strict=True):
        _dress(panel, title)
        for number, (name, lines) in enumerate(runs):  # a run's color, whatever it has no values of
            _draw(panel, name, f"C{number}", lines, field)
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
    else:
        figure.suptitle(runs[0][0], fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    plt.close(figure)
    with writing(out):
        write_whole(out, content.getvalue())


def _name(folder: Path) -> str:
    """A run's folder, and whether it used the guide, as far as that is told there."""
    try:
        return f"{folder}, {runfile.guided(runfile.read(folder / run_folder.SPEC).spec)}"
    except UserError:  # there are metrics alone, or another version wrote it
        return str(folder)


def _draw(panel: Axes, name: str, color: str, lines: Sequence[dict[str, Any]], field: str) -> None:
    points = [(line["frames"] / 1e6, line[field]) for line in lines if line.get(field) is not None]
    mark = "." if len(points) == 1 else ""  # of which no line can be drawn
    if points:
        panel.plot(*zip(*points, strict=True), mark, label=name, color=color, linewidth=1.2)


def _dress(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _grouped(lines: Sequence[dict[str, Any]]) -> bool:
    return any(line.get("members", 1) > 1 or line.get("generation", 0) > 1 for line in lines)


def _strip(panel: Axes, runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> None:
    """Members over frames, with a mark wherever the group changed."""
    _dress(panel, "members, and the recoveries of the group")
    most, causes = 1, set()
    for _, lines in runs:
        frames = [line["frames"] / 1e6 for line in lines]
        members = [line.get("members", 1) for line in lines]
        most = max(most, *members)
        (steps,) = panel.step(frames, members, where="post", linewidth=1.2)
        for cause, at in recoveries(lines).items():
            causes.add(cause)
            points = [(frames[i], members[i]) for i in at]
            panel.plot(*zip(*points, strict=True), MARKS[cause], color=steps.get_color(), ms=5)
    panel.set_ylim(0, most + 0.4)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("frames (millions)")
    keys = [
        Line2D([], [], color="dimgray", linestyle="none", marker=mark, markersize=5, label=cause)
        for cause, mark in MARKS.items()
        if cause in causes
    ]
    panel.legend(
        handles=keys,
        fontsize=8,
        ncols=len(MARKS),
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.1,
    )


def recoveries(lines: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Where the group changed: indices of lines, by cause."""
    found: dict[str, list[int]] = {}
    for i, (before, line) in enumerate(pairwise(lines), 1):
        counts, old = line.get("recoveries", {}), before.get("recoveries", {})
        causes = [cause for cause in counts if counts[cause] > old.get(cause, 0)]
        if not causes and line.get("generation") != before.get("generation"):
            causes = [OTHER]
        for cause in causes:
            found.setdefault(cause if cause in MARKS else OTHER, []).append(i)
    return found
