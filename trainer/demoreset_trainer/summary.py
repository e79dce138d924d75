"""What is left of a group's run when it ends: `summary.json`, and the last words to a person."""

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demoreset_api.errors import ExitCode
from demoreset_api.spec import CurriculumMode, RunSpec
from demoreset_trainer.progress import Progress

NAME = "summary.json"


def summarise(
    progress: Progress,
    told: Sequence[dict[str, Any]],
    spec: RunSpec,
    code: int,
    *,
    members: int,
    updates_lost: int,
) -> dict[str, Any]:
    """How a group's run stands, from its latest update and its metrics.

    Args:
        progress: The latest.
        told: The lines of its metrics.
        spec: What was wanted.
        code: With which it ends.
        members: That were wanted.
        updates_lost: Done, and lost with all members that knew of them.
    """
    reached = next((line for line in told if line["start_frame"] == 0), None)
    guide = spec.curriculum.guide
    if guide is None:
        guide = 0.0 if spec.curriculum.mode is CurriculumMode.ORIGINAL else 0.1
    return {
        "goalMet": code == ExitCode.DONE,
        "budgetSpent": code == ExitCode.BUDGET_SPENT,
        "interrupted": code in (ExitCode.INTERRUPTED, ExitCode.DRAINED),
        "frames": progress.frames,
        "updates": progress.update,
        "seconds": round(progress.seconds, 1),
        "startFrame": progress.start_frame,
        "demoFrames": progress.demo_frames,
        "successRate": progress.goal_rate,
        "scoreMax": progress.score_max,
        "startReachedFrames": reached["frames"] if reached else None,
        "startReachedSeconds": reached["seconds"] if reached else None,
        "rejectedUpdates": progress.rejected_updates,
        "guide": guide,
        "members": members,
        "recoveries": sum(progress.recoveries.values()),
        "updatesLost": updates_lost,
        "goodput": progress.goodput,
        "seed": spec.seed,
        "version": version("demoreset"),
        "finishedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def last_words(summary: dict[str, Any], folder: Path, options: argparse.Namespace) -> str:
    """What a person is told at the end, and what could be done next."""
    again = " ".join(
        ["demoreset run -f", str(options.file)]
        + [f"--set {change}" for change in options.set]
        + ([f"--dir {options.dir}"] if options.dir else [])
        + ([f"--members {options.members}"] if options.members else [])
    )
    spent = f"{summary['frames']:,} frames and {summary['seconds']:,.0f} s"
    start = summary["startFrame"]
    where = "the game's own start" if start == 0 else f"frame {start} of {summary['demoFrames']}"
    if summary["goalMet"]:
        return (
            f"Goal met after {spent}: {summary['successRate'] or 0:.0%} of the episodes from the "
            f"game's own start tie the demo.\nNext: demoreset evaluate {folder}; "
            f"demoreset video {folder}"
        )
    if summary["budgetSpent"]:
        return (
            f"Budget spent ({spent}) and the goal is not met: the start stands at {where}.\n"
            f"Go on with more: {again} --set spec.budget.frames={2 * summary['frames']}"
        )
    return f"Stopped after {spent}, the start at {where}; saved. Go on with: {again}"
