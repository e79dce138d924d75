"""`demoreset run --members N`: a coordinator and N members on this machine, with one screen."""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demoreset_api.errors import ExitCode
from demoreset_trainer.disk import DAMAGE
from demoreset_trainer.local_coordinator import LocalCoordinator
from demoreset_trainer.machine import cores_each, emulators_per_process
from demoreset_trainer.member_process import member_command
from demoreset_trainer.network import LOCALHOST
from demoreset_trainer.nursery import Nursery
from demoreset_trainer.restart import OVER, Limits
from demoreset_trainer.signals import Signals
from demoreset_trainer.supervise import Supervisor

if TYPE_CHECKING:
    from demoreset_api.spec import DemoResetRun, RunSpec
    from demoreset_trainer.demo import Demo

GOOD = (ExitCode.DONE, ExitCode.BUDGET_SPENT, ExitCode.INTERRUPTED, ExitCode.DRAINED)


def run_group(
    options: argparse.Namespace,
    wanted: "DemoResetRun",
    demo: "Demo",
    folder: Path,
    members: int,
    signals: Signals,
) -> int:
    """Train with several members until the run is over; the exit code.

    Args:
        options: Those of `demoreset run`.
        wanted: The run file, read.
        demo: Its demonstration.
        folder: The run's.
        members: How many processes train.
        signals: Whether somebody wants it to stop.
    """
    from demoreset_trainer import hangs, runfile, summary
    from demoreset_trainer.screen import live, tell
    from demoreset_trainer.watch import Watchers

    spec = wanted.spec
    emulators = emulators_per_process(spec.environment, cores_each(members))
    if met_on_disk(folder, spec, demo) is not None:
        tell(summary.met_already(folder), options.log)
        return ExitCode.DONE
    with (
        Watchers(folder, options, None) as watchers,
        Nursery(os.environ, (demo.game, emulators)) as nursery,
        runfile.frozen(wanted, options.file) as file,
    ):
        signals.acknowledge(watchers.note)
        if members < spec.workers.min:
            watchers.note(
                f"spec.workers.min is {spec.workers.min}: {members} members train all the same"
            )
        on_screen = live(options.log, sys.stdout)
        coordinator = LocalCoordinator(min(spec.workers.min, members), watchers.note)
        supervisor = Supervisor(
            "member",
            members,
            member_command(
                file,
                folder,
                coordinator=f"{LOCALHOST}:{coordinator.port}",
                address=LOCALHOST,
                members=members,
            ),
            watchers,
            stopping=signals,
            say=watchers.note if on_screen else to_stderr,
            limits=Limits.told(os.environ),
            tend=coordinator.tend,
            spawn=nursery.spawn,
            keep=partial(hangs.keep, folder),
            brief=on_screen,
        )
        try:
            coordinator.tend(time.monotonic())
            code = supervisor.run()
        finally:
            coordinator.close()
    failed = code not in GOOD
    error = str(supervisor.error) if failed else None
    if code in OVER and not all_kept(folder, supervisor):
        error, code = summary.NOT_KEPT, ExitCode.TRY_AGAIN
    words = summary.finish(
        folder,
        spec,
        code,
        options,
        members=members,
        updates_lost=supervisor.updates_lost,
        error=error,
        latest=watchers.latest,
        idle=watchers.latest is None,
    )
    if error is not None:
        to_stderr(f"demoreset: {error}")
    if not failed:
        tell(words, options.log)
    return code


def to_stderr(text: str) -> None:
    """Pass a member's line on."""
    from demoreset_trainer.screen import say

    say(text, sys.stderr)


def all_kept(folder: Path, supervisor: Supervisor) -> bool:
    """Whether what the members did last is on the disk."""
    from demoreset_trainer import summary

    progress = supervisor.progress
    return progress is None or summary.kept(folder, progress.life, progress.update)


def met_on_disk(folder: Path, spec: "RunSpec", demo: "Demo") -> dict[str, Any] | None:
    """The newest checkpoint's state, with its `life`, where it says that this goal is met.

    No tensor is read, nor torch.

    Raises:
        UserError: it is another run's.
    """
    from demoreset_trainer import lives, run_folder

    try:
        newest = max((folder / "checkpoints").glob("ckpt-l*-u*/state.json"), default=None)
        state = {} if newest is None else json.loads(newest.read_text())
        if newest is None or not run_folder.goal_met(state, spec):
            return None
        run_folder.check_same_run(state, spec, demo, folder)
        life, _ = lives.named(newest.parent) or (0, 0)
        return {**state, "life": life}
    except (OSError, *DAMAGE):
        return None  # a broken one: those who read checkpoints decide
