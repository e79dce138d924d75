"""`demoreset run`: train from a run file, in a folder that the same command goes on with."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import DemoResetError, ExitCode, UserError
from demoreset_trainer.flags import PORT, place
from demoreset_trainer.network import LOCALHOST
from demoreset_trainer.restart import OVER
from demoreset_trainer.signals import Signals

if TYPE_CHECKING:
    from demoreset_api.spec import DemoResetRun, RunSpec
    from demoreset_trainer.demo import Demo
    from demoreset_trainer.loop import Stopped

HELP = """Train from a run file.

The run lives in a folder (--dir; default runs/NAME): checkpoints, metrics, a summary. The same
command goes on from the newest valid checkpoint there. It stops by itself when the goal is met
(exit code 0) or the frame budget is spent (2). Ctrl-C saves a checkpoint and stops (130), as
SIGTERM and a closed terminal do (143). 64: the file or the folder is wrong, and it says where; 65:
no checkpoint is whole; 66: the same update failed again and again; 75: the disk was away, full or
read-only, try the same again when it is not.

  demoreset run -f demos/freeway-crossing.yaml
  demoreset run -f demos/freeway-crossing.yaml --set spec.seed=1 --dir runs/seed-1
  demoreset run -f demos/freeway-crossing.yaml --members 3
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="train from a run file, or go on with it",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-f", "--file", type=Path, required=True, help="the run file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the run file, e.g. spec.ppo.learningRate=3e-4; repeatable",
    )
    parser.add_argument("--dir", type=place, help="the run's folder; default runs/NAME")
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew; an old folder is renamed, not deleted"
    )
    parser.add_argument(
        "--members",
        type=int,
        metavar="N",
        help="processes that train together, any of which may be lost; default: the file's "
        "spec.workers.membersPerWorker, else one per GPU, else one",
    )
    parser.add_argument("--port", type=PORT, help="serve /metrics, /status, /healthz and /readyz")
    parser.add_argument(
        "--host", default=LOCALHOST, help=f"address of --port; default {LOCALHOST}, this machine"
    )
    parser.add_argument(
        "--log",
        choices=("auto", "screen", "plain", "json"),
        default="auto",
        help="what is shown: a live screen, plain lines, or JSON lines; default: by the terminal",
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
    from demoreset_trainer import run_folder, runfile, tensorboard
    from demoreset_trainer.claim import claimed
    from demoreset_trainer.coordinator import extension
    from demoreset_trainer.screen import tell

    tensorboard.check(options.tensorboard)
    wanted = runfile.read(options.file, options.set)
    folder: Path = options.dir or Path("runs") / wanted.metadata.name
    members = runfile.members(options.members, wanted.spec.workers)
    if members > 1:
        extension()
    demo = runfile.load_demo(wanted.spec, options.file)  # a mistake is told once, and first
    if options.fresh and os.path.isdir(folder):  # Path's asks no further where it may not look
        with claimed(folder):
            tell(f"the folder that was there is now {run_folder.set_aside(folder)}", options.log)
    run_folder.make_folder(folder)
    with claimed(folder):
        if members > 1:
            from demoreset_trainer.cli_group import run_group

            with _failure_told(folder, wanted.spec, options, members):
                return run_group(options, wanted, demo, folder, members, signals)
        return _train(options, wanted, demo, folder, signals)


def _train(
    options: argparse.Namespace,
    wanted: "DemoResetRun",
    demo: "Demo",
    folder: Path,
    signals: Signals,
) -> int:
    """Put a run together, train it in this process, and say how it ended."""
    from demoreset_trainer import checkpoint, run_folder, stall, summary
    from demoreset_trainer.assemble import assemble
    from demoreset_trainer.checkpoint_writer import CheckpointWriter
    from demoreset_trainer.group import Alone
    from demoreset_trainer.screen import say, tell
    from demoreset_trainer.watch import Watchers

    spec, checkpoints = wanted.spec, folder / "checkpoints"
    with _failure_told(folder, spec, options):
        newest = checkpoint.newest(checkpoints)
    snapshot = checkpoint.read(newest) if newest is not None else None
    if snapshot is not None:
        run_folder.check_same_run(snapshot.state, spec, demo, folder)
        if run_folder.goal_met(snapshot.state, spec):
            tell(summary.met_already(folder), options.log)
            return ExitCode.DONE
    life = checkpoint.next_life(checkpoints)
    run_folder.keep(wanted, demo, folder)
    with (
        _failure_told(folder, spec, options),
        Watchers(folder, options, snapshot.update if snapshot else 0) as watchers,
        CheckpointWriter(
            checkpoints,
            keep=spec.checkpoint.keep,
            keep_every=spec.checkpoint.keep_every,
            interval=spec.checkpoint.interval_seconds,
            note=watchers.note,
            better=stall.better,
        ) as writer,
    ):
        signals.acknowledge(watchers.note)
        loop = assemble(
            spec,
            demo,
            group=Alone(),
            watch=watchers,
            saver=writer,
            find=lambda: (life, snapshot),
        )
        if snapshot is not None:
            writer.resume(snapshot)
            watchers.note(run_folder.going_on(checkpoints, snapshot, spec))
        saved, at_once = True, False
        try:
            stopped = loop.run(lambda: signals() is not None)
        except KeyboardInterrupt:  # a second Ctrl-C: it may have come in the middle of a change
            at_once = True
            raise
        finally:
            # Whatever else ended it, what was learned up to the latest whole update is kept.
            learned = loop.state.counters.update > (snapshot.update if snapshot else 0)
            if learned and not at_once:
                saved = writer.finish(loop.snapshot(), candidate=loop.candidate)
    # With a slow disk it may have come later than it was waited for.
    if not saved and writer.saved is not None:
        saved = writer.saved.update == loop.state.counters.update
    code, error = _code(stopped, signals()), None
    if code in OVER and not saved:
        error = f"{summary.NOT_KEPT}: {writer.error or 'the disk does not answer'}"
        say(f"demoreset: {error}", sys.stderr)
        code = ExitCode.TRY_AGAIN
    words = summary.finish(folder, spec, code, options, error=error, latest=watchers.latest)
    tell(words, options.log)
    return code


@contextmanager
def _failure_told(
    folder: Path, spec: "RunSpec", options: argparse.Namespace, members: int = 1
) -> Iterator[None]:
    """Who reads the summary of a run that failed must not find that of an earlier command."""
    from demoreset_trainer import summary
    from demoreset_trainer.lives import TakenOver
    from demoreset_trainer.screen import tell

    try:
        yield
    except (TakenOver, UserError):  # the folder is another's; or it is another command's run
        raise
    except KeyboardInterrupt:  # the second one: nothing was waited for
        words = summary.finish(folder, spec, ExitCode.INTERRUPTED, options, members=members)
        tell(words, options.log)
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, DemoResetError) else ExitCode.CRASH
        why = str(error) or type(error).__name__
        summary.finish(folder, spec, code, options, members=members, error=why)
        raise


def _code(stopped: "Stopped", received: int | None) -> int:
    if stopped.goal_met:
        return ExitCode.DONE
    if stopped.budget_spent:
        return ExitCode.BUDGET_SPENT
    return ExitCode.stopped_by(received)
