"""`demoreset worker`: what a pod runs: members, kept running, and their ends as one exit code."""

import argparse
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from demoreset_api.errors import DemoResetError, ExitCode, UserError
from demoreset_api.names import (
    ENV_ADDRESS,
    ENV_COORDINATOR,
    ENV_GRACE,
    ENV_HANG,
    ENV_ID,
    ENV_START,
    ENV_TERMINATION_LOG,
    METRICS_PORT,
    TERMINATION_LOG,
)
from demoreset_trainer import restart
from demoreset_trainer.coordinator import extension
from demoreset_trainer.counters import Counters
from demoreset_trainer.flags import PORT, place
from demoreset_trainer.machine import cores_each, emulators_per_process
from demoreset_trainer.network import LOCALHOST, listen
from demoreset_trainer.nursery import Nursery
from demoreset_trainer.progress import Progress
from demoreset_trainer.restart import LastError
from demoreset_trainer.signals import Signals
from demoreset_trainer.supervise import Supervisor

MAX_BYTES = 4096  # of a termination message
NO_NEWS = b'{"worldSize": 1}'  # the last words of a worker of which no member told anything
HERE = ("localhost", LOCALHOST, "[::1]")

HELP = f"""Train as one worker of a group: what a pod runs.

A worker keeps its members running: it starts again those that die or hang, and ends when the run
does. It reaches the others through the run's coordinator and shares the run's folder with them.
Flags or the environment tell it where it is and where the coordinator is:

  {ENV_COORDINATOR}      host:port of the coordinator
  {ENV_ADDRESS}          where other workers reach this one: the pod's IP
  {ENV_ID}               the worker's name
  {ENV_GRACE}    seconds from SIGTERM until it is killed; default 30
  {ENV_HANG}     seconds without a beat until it kills a member; default 10
  {ENV_START}    seconds that a member has to load and ask the coordinator; default 300
  {ENV_TERMINATION_LOG}  where the last error is written, or how a run that is over stands
                             (as /status has it); default {TERMINATION_LOG}

Exit codes: 0 the goal is met, 2 the budget is spent, 64 the run file or a flag is wrong, 65 no
checkpoint is valid, 66 the same update failed three times, 75 try again, 137 the memory is not
enough, 143 drained after SIGTERM.
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "worker",
        help="train as one worker of a group: what a pod runs",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-f", "--file", type=Path, required=True, help="the run file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the run file; repeatable",
    )
    parser.add_argument(
        "--dir", type=place, required=True, help="the run's folder, the same for all workers"
    )
    parser.add_argument(
        "--members",
        type=int,
        metavar="N",
        help="default: the file's spec.workers.membersPerWorker, else one per GPU, else one",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=f"default ${ENV_COORDINATOR}")
    parser.add_argument("--address", metavar="IP", help=f"default ${ENV_ADDRESS}")
    parser.add_argument("--id", metavar="NAME", help=f"default ${ENV_ID}, else worker")
    parser.add_argument(
        "--port",
        type=PORT,
        default=METRICS_PORT,
        help=f"of /metrics, /status, /healthz and /readyz; default {METRICS_PORT}; 0: a free one",
    )
    parser.add_argument("--host", default="", help="address of --port; default: all")
    parser.add_argument(
        "--log",
        choices=("auto", "screen", "plain", "json"),
        default="auto",
        help="what is shown; default: by the terminal",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write TensorBoard event files, too; needs `pip install -e '.[tensorboard]'` in the "
        "clone",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    signals = Signals()
    try:
        return _work(options, signals)
    except DemoResetError as error:
        leave_words(LastError(type(error).__name__, str(error)).report(MAX_BYTES))
        raise


def _work(options: argparse.Namespace, signals: Signals) -> int:
    coordinator, address = whereabouts(options.coordinator, options.address)
    extension()
    listen(address).close()  # a mistake is told once, and first
    from demoreset_trainer import hangs, run_folder, runfile, tensorboard
    from demoreset_trainer.cli_group import GOOD, all_kept, met_on_disk, to_stderr
    from demoreset_trainer.member_process import member_command
    from demoreset_trainer.screen import live
    from demoreset_trainer.summary import NOT_KEPT
    from demoreset_trainer.watch import Watchers

    tensorboard.check(options.tensorboard)
    wanted = runfile.read(options.file, options.set)
    members = runfile.members(options.members, wanted.spec.workers)
    demo = runfile.load_demo(wanted.spec, options.file)
    folder: Path = options.dir
    run_folder.make_folder(folder)
    emulators = emulators_per_process(wanted.spec.environment, cores_each(members))
    with (
        Watchers(folder, options, None) as watchers,
        Nursery(os.environ, (demo.game, emulators)) as nursery,
        runfile.frozen(wanted, options.file) as file,
    ):
        if (state := met_on_disk(folder, wanted.spec, demo)) is not None:
            watchers.note(f"{folder}: the goal is met already")
            leave_words(_how_it_stands(None, state, len(demo)))
            return ExitCode.DONE
        signals.acknowledge(watchers.note)
        supervisor = Supervisor(
            options.id or os.environ.get(ENV_ID) or "worker",
            members,
            member_command(
                file,
                folder,
                coordinator=coordinator,
                address=address,
                members=members,
                life=lambda: supervisor.life,
            ),
            watchers,
            stopping=signals,
            say=watchers.note if live(options.log, sys.stdout) else to_stderr,
            limits=restart.Limits.told(os.environ),
            spawn=nursery.spawn,
            keep=partial(hangs.keep, folder),
        )
        code = supervisor.run()
        state = met_on_disk(folder, wanted.spec, demo) if code in restart.OVER else None
        # Others may have met it in a later life, which one of our members has read.
        met = state is not None and state["life"] > supervisor.life
        if code in restart.OVER and not met and not all_kept(folder, supervisor):
            code, supervisor.error = ExitCode.TRY_AGAIN, LastError("NotSaved", NOT_KEPT)
    if code in restart.OVER:
        leave_words(_how_it_stands(supervisor.progress, state if met else None, len(demo)))
    elif code not in GOOD and supervisor.error is not None:
        to_stderr(f"demoreset: {supervisor.error}")
        leave_words(supervisor.error.report(MAX_BYTES))
    return code


def _how_it_stands(
    progress: Progress | None, met: dict[str, Any] | None, demo_frames: int
) -> bytes:
    """The last words of a worker whose run is over.

    Args:
        progress: The last of which a member of this worker has told.
        met: The newest checkpoint's state, where others have met the goal.
        demo_frames: Of the whole demonstration.
    """
    from demoreset_trainer.report import standing

    if met is not None:
        return json.dumps(met_before(met, demo_frames)).encode()
    return json.dumps(standing(_kept(progress))).encode() if progress else NO_NEWS


def met_before(state: dict[str, Any], demo_frames: int) -> dict[str, Any]:
    """How a run stands whose goal an earlier command has met, as /status has it.

    Args:
        state: Of its newest checkpoint, as `met_on_disk` finds it.
        demo_frames: Of the whole demonstration.
    """
    counters, goal = Counters.load(state["counters"]), state["goal"]
    latest, tried = goal["latest"], goal["evaluation"]
    return {
        "worldSize": 1,
        "life": state["life"],
        "resumed": {
            "life": counters.resumed_life,
            "update": counters.resumed_update,
            "frames": counters.resumed_frames,
        },
        "update": counters.update,
        "frames": counters.frames,
        "seconds": counters.seconds,
        "curriculum": {
            "startFrame": 0,
            "demoFrames": demo_frames,
            "progress": 1.0,
            "goalRate": sum(latest) / len(latest),
        },
        "evaluation": {
            "update": tried["update"],
            "episodes": tried["episodes"],
            "successRate": tried["successes"] / tried["episodes"],
        },
        "checkpoint": {"update": counters.update},
    }


def _kept(progress: Progress) -> Progress:
    """The last update, which was told before its checkpoint was written; that has been seen."""
    return replace(
        progress,
        checkpoint_update=progress.update,
        checkpoint_age_seconds=0.0,
        checkpoint_error=None,
    )


def whereabouts(coordinator: str | None, address: str | None) -> tuple[str, str]:
    """The coordinator's host:port, and where others reach this worker.

    Args:
        coordinator: As the flag says it.
        address: As the flag says it.

    Raises:
        UserError: neither flag nor environment says, or what they say cannot be right.
    """
    coordinator = coordinator or os.environ.get(ENV_COORDINATOR)
    if not coordinator:
        raise UserError(
            f"--coordinator: missing; give host:port of `demoreset coordinator`, or set "
            f"{ENV_COORDINATOR}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator (or {ENV_COORDINATOR}): received {coordinator!r}; it is host:port"
        )
    address = address or os.environ.get(ENV_ADDRESS)
    if not address:
        if host not in HERE:
            raise UserError(
                f"--address: missing; give this machine's IP as others reach it, or set "
                f"{ENV_ADDRESS} (only where the coordinator is on localhost it is 127.0.0.1)"
            )
        address = LOCALHOST
    return coordinator, address


def leave_words(words: bytes) -> None:
    """Write the last words where the kubelet reads them; without such a place, nowhere."""
    place = os.environ.get(ENV_TERMINATION_LOG)
    path = Path(place or TERMINATION_LOG)
    if place or path.exists():
        with suppress(OSError):
            path.write_bytes(words)
