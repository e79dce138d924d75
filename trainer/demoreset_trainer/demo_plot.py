"""The picture of a demo: score, rewards and lives over its frames."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from demoreset_trainer.demo import UNKNOWN_LIVES, Demo
from demoreset_trainer.disk import write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(demo: Demo, title: str, out: Path) -> None:
    """Draw a demo into a PNG: whole, or not there.

    Raises:
        UserError: the place cannot be written to.
    """
    content = io.BytesIO()
    draw(demo, title).savefig(content, format="png", dpi=110)
    with writing(out):
        write_whole(out, content.getvalue())


def draw(demo: Demo, title: str) -> Figure:
    """A figure with three panels, one below the other."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    score, rewards, lives = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    score.set_title(f"{title}: {demo.scores[-1]:,} points in {len(demo):,} frames", loc="left")
    score.step(np.arange(len(demo) + 1), demo.scores, where="post")
    score.set_ylabel("score")
    paid = np.flatnonzero(demo.rewards)
    gains = demo.rewards[paid] > 0
    for chosen, colour in ((gains, "C2"), (~gains, "C3")):
        at = paid[chosen]
        rewards.vlines(at + 1, 0, demo.rewards[at], color=colour)
        rewards.plot(at + 1, demo.rewards[at], ".", color=colour)
    rewards.axhline(0, color="black", linewidth=0.5)
    rewards.set_ylabel("reward")
    _lives(lives, demo)
    lives.set_xlabel("frame (60 a second)")
    lives.set_xlim(0, len(demo))
    for panel in (score, rewards, lives):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _lives(panel: "Axes", demo: Demo) -> None:
    known = demo.lives != UNKNOWN_LIVES
    if known.any():
        shown = np.where(known, demo.lives.astype(np.float64), np.nan)
        panel.step(np.arange(1, len(demo) + 1), shown, where="post", color="C1")
        panel.set_ylim(0, max(1.0, float(np.nanmax(shown))) * 1.05)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center")
    panel.set_ylabel("lives")
