"""The picture of a demo: score, rewards and lives over its frames."""

from pathlib import Path

import matplotlib
import numpy as np

from demoreset_trainer.demo import UNKNOWN_LIVES, Demo

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def plot(demo: Demo, title: str, out: Path) -> None:
    """Draw a demo into a PNG."""
    figure, (score, rewards, lives) = plt.subplots(
        3, 1, figsize=(10, 7), sharex=True, height_ratios=(3, 1, 1), constrained_layout=True
    )
    score.set_title(title, loc="left")
    score.step(np.arange(len(demo) + 1), demo.scores, where="post")
    score.set_ylabel("score")
    paid = np.flatnonzero(demo.rewards)
    rewards.vlines(paid + 1, 0, demo.rewards[paid])
    rewards.axhline(0, color="black", linewidth=0.5)
    rewards.set_ylabel("rewards")
    if (demo.lives != UNKNOWN_LIVES).any():
        lives.step(np.arange(1, len(demo) + 1), demo.lives, where="post")
    else:
        lives.text(0.5, 0.5, "not recorded", transform=lives.transAxes, ha="center")
    lives.set_ylabel("lives")
    lives.set_xlabel("frame (60 a second)")
    for panel in (score, rewards, lives):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)
