"""What is left of a run when it ends: `summary.json`, and the last words to a person."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

from demoreset_api.errors import ExitCode, TryAgain, UserError
from demoreset_api.spec import After, RunSpec
from demoreset_trainer import lives, metrics, run_folder, runfile
from demoreset_trainer.counters import losses
from demoreset_trainer.network import LOCALHOST
from demoreset_trainer.progress import Progress

NAME = "summary.json"
LAST_SEEN = 30.0  # seconds, longer than who writes a run's last checkpoint tries it
NOT_KEPT = "the run is over, but how it ended could not be saved"


def finish(
    folder: Path,
    spec: RunSpec,
    code: int,
    options: argparse.Namespace,
    *,
    members: int = 1,
    updates_lost: int = 0,
    error: str | None = None,
    latest: Progress | None = None,
    idle: bool = False,
) -> str:
    """Write the summary of a run into its folder; the last words to a person.

    Args:
        folder: The run's.
        spec: What was wanted.
        code: With which it ends.
        options: Those of `demoreset run`, for the command that goes on with it.
        members: That were wanted.
        updates_lost: Done, and lost with all members that knew of them.
        error: Why it failed, where it did.
        latest: Its last update, as far as it is known: a full disk has no room for its line.
        idle: This command has done no update: the run stands where its newest checkpoint is.
    """
    at = saved(folder / "checkpoints")
    try:
        told = metrics.read(folder / metrics.NAME)
    except UserError as away:  # the disk is; how the run ended is not its business
        if latest is None:
            return str(away)
        told = []
    if latest is not None and (not told or told[-1]["update"] != latest.update):
        told = [*told, asdict(latest)]
    if idle and at is not None:
        told = [line for line in told if line["update"] <= at] or told
    if not told:
        return f"Stopped before the first update. Go on with: {again(options)}"
    found = summarise(told, spec, code, members=members, updates_lost=updates_lost)
    found |= {"savedUpdate": at, "exitCode": code, "error": error}
    words = last_words(found, spec, code, folder, options)
    try:
        run_folder.write_json(folder / NAME, found)
    except TryAgain as away:  # what was learned is in the checkpoints
        words = f"{away}\n{words}"
    return words


def summarise(
    told: Sequence[dict[str, Any]], spec: RunSpec, code: int, *, members: int, updates_lost: int
) -> dict[str, Any]:
    """How a run stands, from the lines of its metrics; at least one."""
    latest = told[-1]
    reached = next((line for line in told if line["start_frame"] == 0), None)
    return {
        "goalMet": code == ExitCode.DONE or _plays_on(latest, spec),
        "budgetSpent": code == ExitCode.BUDGET_SPENT or _played_on(spec, code),
        "interrupted": code in (ExitCode.INTERRUPTED, ExitCode.DRAINED),
        "frames": latest["frames"],
        "updates": latest["update"],
        "seconds": round(latest["seconds"], 1),
        "startFrame": latest["start_frame"],
        "demoFrames": latest["demo_frames"],
        "successRate": latest["goal_rate"],
        "evaluation": {
            "update": latest.get("evaluation_update"),
            "episodes": latest.get("evaluation_episodes"),
            "successRate": latest.get("evaluation_rate"),
        },
        "scoreMax": latest["score_max"],
        "startReachedFrames": reached["frames"] if reached else None,
        "startReachedSeconds": round(reached["seconds"], 1) if reached else None,
        "rejectedUpdates": latest["rejected_updates"],
        "guide": spec.curriculum.in_force.guide,
        "members": members,
        "recoveries": losses(latest["recoveries"]),
        "updatesLost": updates_lost,
        "goodput": round(latest["goodput"], 4),
        "seed": spec.seed,
        "version": version("demoreset"),
        "finishedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _plays_on(latest: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a run has met its goal and goes on for score: it confirms no more after that."""
    goal, rate = spec.goal, latest.get("evaluation_rate")
    told = (latest["goal"], latest.get("evaluation_episodes"))  # perhaps of another goal
    same = told == (goal.success_rate, goal.episodes)
    return goal.after is After.PLAY_ON and same and rate is not None and rate >= goal.success_rate


def _played_on(spec: RunSpec, code: int) -> bool:
    """Whether a run has met its goal, and played on until nothing was left of its budget."""
    return code == ExitCode.DONE and spec.goal.after is After.PLAY_ON


def saved(checkpoints: Path) -> int | None:
    """The update of the newest checkpoint; None where there is none, or the disk is away."""
    newest = _newest(checkpoints)
    return newest[1] if newest is not None else None


def _newest(checkpoints: Path) -> tuple[int, int] | None:
    """Its life, and its update."""
    try:
        found = [lives.named(path) for path in checkpoints.glob("ckpt-*")]
    except OSError:
        return None
    return max(filter(None, found), default=None)


def kept(folder: Path, life: int, update: int, patience: float = LAST_SEEN) -> bool:
    """Whether a run's last checkpoint is there; it may be just being written, elsewhere.

    Args:
        folder: The run's.
        life: Its last. Where somebody has trained it in a later one, this update counts no more.
        update: Its last.
        patience: Seconds until it counts as not written.
    """
    deadline = time.monotonic() + patience
    while (newest := _newest(folder / "checkpoints") or (0, 0)) < (life, update):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return newest[0] == life


def met_already(folder: Path) -> str:
    """What a person is told whose run has nothing left to do."""
    return (
        f"{folder}: the goal is met already; `demoreset evaluate {quote(str(folder))}`, "
        "--set spec.goal.successRate=... or --fresh"
    )


def again(options: argparse.Namespace, *changes: str) -> str:
    """The command that goes on with a run, with more changes of its file."""
    latest: dict[str, str] = {}  # of each field: the last one counts
    for change in (*options.set, *changes):
        field = change.partition("=")[0].strip()
        latest.pop(field, None)  # it comes after all that it changes
        latest[field] = change
    return " ".join(
        ["demoreset run -f", quote(str(options.file))]
        + [f"--set {quote(change)}" for change in latest.values()]
        + ([f"--dir {quote(str(options.dir))}"] if options.dir else [])
        + ([f"--members {options.members}"] if options.members else [])
        + ([f"--port {options.port}"] if options.port is not None else [])
        + ([f"--host {quote(options.host)}"] if options.host != LOCALHOST else [])
        + ([f"--log {options.log}"] if options.log != "auto" else [])
        + (["--tensorboard"] if options.tensorboard else [])
    )


def last_words(
    summary: dict[str, Any], spec: RunSpec, code: int, folder: Path, options: argparse.Namespace
) -> str:
    """What a person is told at the end, and what could be done next."""
    spent = f"{summary['frames']:,} frames and {summary['seconds']:,.0f} s"
    start = summary["startFrame"]
    where = "the game's own start" if start == 0 else f"frame {start} of {summary['demoFrames']}"
    confirmed = summary["evaluation"]["successRate"]
    rate = summary["successRate"] if confirmed is None else confirmed
    met = f"{rate or 0:.0%} of the episodes from the game's own start tie the demo"
    if code == ExitCode.DONE:
        told = f"Goal met after {spent}: {met}"
        if _played_on(spec, code):
            at = summary["evaluation"]["update"]
            told = f"Played on until the budget was spent ({spent}); goal met at update {at}: {met}"
        return (
            f"{told} ({runfile.guided(spec)}).\n"
            f"Next: demoreset evaluate {quote(str(folder))}; demoreset video {quote(str(folder))}"
        )
    if summary["budgetSpent"]:
        more = f"spec.budget.frames={2 * summary['frames']}"
        return (
            f"Budget spent ({spent}) and the goal is not met: the start stands at {where}.\n"
            f"Go on with more: {again(options, more)}"
        )
    at = summary["savedUpdate"]
    if at is None:
        kept = "NOT saved: there is no checkpoint"
    elif at < summary["updates"]:
        kept = f"NOT saved: the checkpoint is of update {at}"
    else:  # it may be ahead of the metrics of a command that was killed
        kept = "saved"
    if summary["goalMet"]:
        where += f", the goal met at update {summary['evaluation']['update']} ({met})"
    return f"Stopped after {spent}, the start at {where}; {kept}. Go on with: {again(options)}"
