"""`demoreset member`: one process of a group; `run --members` and `worker` start it.

`demoreset members` is the nursery that brings them forth.
"""

import argparse
import faulthandler
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from demoreset_api.errors import DemoResetError, ExitCode, TryAgain
from demoreset_api.names import ENV_WIRE
from demoreset_trainer.parent import end_with_parent

if TYPE_CHECKING:
    from demoreset_trainer.checkpoint import Snapshot


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; it is not listed, for nobody types it."""
    parser = commands.add_parser("member", description="One member of a group.")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--coordinator", required=True, help="host:port")
    parser.add_argument("--address", required=True, help="where other members reach this one")
    parser.add_argument("--id", required=True)
    parser.add_argument("--life", type=int, default=0, help="in which this worker last trained")
    parser.add_argument("--together", type=int, default=1, help="members that begin with this one")
    parser.set_defaults(func=run)
    parser = commands.add_parser("members", description="Start members when asked to.")
    parser.add_argument("--link", type=int, required=True, help="socket of the supervisor")
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor")
    parser.add_argument("--game", help="make emulators of it beforehand")
    parser.add_argument("--emulators", type=int, default=0, help="how many")
    parser.set_defaults(func=bring_forth)


def bring_forth(options: argparse.Namespace) -> ExitCode:
    """Be the nursery of a supervisor."""
    from demoreset_trainer import nursery

    stock = (options.game, options.emulators) if options.game else None
    nursery.serve(socket.socket(fileno=options.link), options.parent, stock)
    return ExitCode.DONE


def run(options: argparse.Namespace) -> NoReturn:
    """Train as a member until the run is over, or it is told to stop; ends the process."""
    try:
        code = _train(options)
    except DemoResetError as error:
        print(f"demoreset: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait in torchft's Rust abort a process that takes its leave of Python.
    os._exit(code)


def _train(options: argparse.Namespace) -> ExitCode:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    end_with_parent(signal.SIGTERM)  # a member must not outlive its supervisor
    from demoreset_api.spec import Collectives
    from demoreset_trainer.wire import ASK_WHERE, Wire

    faulthandler.register(ASK_WHERE)
    pipe = int(os.environ[ENV_WIRE]) if ENV_WIRE in os.environ else os.open(os.devnull, 1)
    wire = Wire(pipe, hung_up=stop.set)
    from demoreset_trainer.network import bind_gloo_to

    bind_gloo_to(options.address)
    from demoreset_trainer import checkpoint, lives, run_folder, runfile, stall
    from demoreset_trainer.assemble import assemble
    from demoreset_trainer.checkpoint_writer import LAST_SAVE, CheckpointWriter
    from demoreset_trainer.disk import not_now
    from demoreset_trainer.elastic import Elastic
    from demoreset_trainer.group import Leaving
    from demoreset_trainer.membership import DISK
    from demoreset_trainer.restart import Limits

    wanted = runfile.read(options.file, options.set)
    spec, folder = wanted.spec, options.dir
    demo = runfile.load_demo(spec, options.file)
    checkpoints = run_folder.make_folder(folder)
    writer = CheckpointWriter(
        checkpoints,
        keep=spec.checkpoint.keep,
        keep_every=spec.checkpoint.keep_every,
        interval=spec.checkpoint.interval_seconds,
        note=wire.note,
        better=stall.better,
    )

    def watching() -> None:
        if stop.is_set():  # else it would take the run as its last act
            raise Leaving
        group.alive()

    def find() -> "tuple[int, Snapshot | None]":
        try:
            checkpoint.settle(checkpoints, LAST_SAVE)
            if options.life and lives.trained_in(checkpoints, options.life, lives.WATCH, watching):
                raise TryAgain(f"{folder}: others train this run now, out of this worker's reach")
        except OSError as error:
            raise not_now(checkpoints, error) from error
        watching()
        group.alive(DISK)
        newest = checkpoint.newest(checkpoints)
        snapshot = checkpoint.read(newest) if newest is not None else None
        if snapshot is not None:
            run_folder.check_same_run(snapshot.state, spec, demo, folder)
            writer.resume(snapshot)
            wire.note(run_folder.going_on(checkpoints, snapshot, spec))
        run_folder.keep(wanted, demo, folder)
        return checkpoint.next_life(checkpoints), snapshot

    group = Elastic(
        options.coordinator,
        id=options.id,
        host=options.address,
        stopping=stop.is_set,
        hurry=Limits.told(os.environ).hurry,
        begun=lambda: lives.begun(checkpoints),
        note=wire.note,
        beat=wire.beat,
        phase=wire.phase,
        nccl=spec.workers.collectives is Collectives.NCCL,
        together=options.together,
    )
    loop = assemble(spec, demo, group=group, watch=wire, saver=writer, find=find)
    try:
        with lives.shown(checkpoints, lambda: max(loop.state.life, writer.life)):
            stopped = loop.run(stop.is_set)
    finally:
        group.close()
        if loop.saves and loop.state.counters.update:
            writer.finish(loop.snapshot(), candidate=loop.candidate)
    if stopped.goal_met:
        return ExitCode.DONE
    return ExitCode.BUDGET_SPENT if stopped.budget_spent else ExitCode.DRAINED
