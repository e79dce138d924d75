"""`demoreset run --members N`: a coordinator and N members on this machine, with one screen."""

import argparse
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import ExitCode, TryAgain, UserError
from demoreset_trainer.member_process import DEMORESET, MemberProcess, member_command
from demoreset_trainer.nursery import Nursery
from demoreset_trainer.restart import OVER, Limits, Record, words
from demoreset_trainer.supervise import Signals, Supervisor

if TYPE_CHECKING:
    from demoreset_api.spec import DemoResetRun, RunSpec
    from demoreset_trainer.demo import Demo

LOCALHOST = "127.0.0.1"
PORTS = range(20_000, 30_000)  # below those that the kernel gives to whoever connects
GOOD = (ExitCode.DONE, ExitCode.BUDGET_SPENT, ExitCode.INTERRUPTED, ExitCode.DRAINED)
CALM = 10.0  # seconds after which a coordinator counts as one that works
ASK_EVERY, DEAF = 2.0, 10.0  # seconds between two questions to it, and without an answer


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
    from demoreset_trainer.screen import live, say
    from demoreset_trainer.watch import Watchers

    spec = wanted.spec
    if met(folder, spec, demo):
        say(summary.met_already(folder), sys.stdout)
        return ExitCode.DONE
    with (
        Watchers(folder, options, None) as watchers,
        Nursery(os.environ, (demo.game, wanted.spec.environment.slots)) as nursery,
        runfile.frozen(wanted, options.file) as file,
    ):
        coordinator = LocalCoordinator(min(spec.workers.min, members), watchers.note)
        supervisor = Supervisor(
            "member",
            members,
            member_command(
                file, folder, coordinator=f"{LOCALHOST}:{coordinator.port}", address=LOCALHOST
            ),
            watchers,
            stopping=signals,
            say=watchers.note if live(options.log, sys.stdout) else to_stderr,
            limits=Limits.told(os.environ),
            tend=coordinator.tend,
            spawn=nursery.spawn,
            keep=partial(hangs.keep, folder),
        )
        try:
            coordinator.tend(time.monotonic())
            code = supervisor.run()
        finally:
            coordinator.close()
    if code in OVER and not all_kept(folder, supervisor):
        to_stderr(f"demoreset: {summary.NOT_KEPT}")
        code = ExitCode.TRY_AGAIN
    elif code not in GOOD:
        to_stderr(f"demoreset: {supervisor.error}")
        return code
    lost = supervisor.updates_lost
    words = summary.leave(folder, spec, code, options, members=members, updates_lost=lost)
    say(words, sys.stdout)
    return code


def to_stderr(text: str) -> None:
    """Pass a member's line on."""
    from demoreset_trainer.screen import say

    say(text, sys.stderr)


def all_kept(folder: Path, supervisor: Supervisor) -> bool:
    """Whether what the members did last is on the disk."""
    from demoreset_trainer import summary

    progress = supervisor.progress
    return progress is None or summary.kept(folder, progress.update)


def met(folder: Path, spec: "RunSpec", demo: "Demo") -> bool:
    """Whether the newest checkpoint says that this goal is met. No tensor is read, nor torch.

    Raises:
        UserError: it is another run's.
    """
    from demoreset_trainer import runfile

    newest = max((folder / "checkpoints").glob("ckpt-l*-u*/state.json"), default=None)
    try:
        state = None if newest is None else json.loads(newest.read_text())
        if state is None or not runfile.met(state, spec):
            return False
        runfile.check_same_run(state, spec, demo, folder)
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a broken one: those who read checkpoints decide


class LocalCoordinator:
    """The group's coordinator as a process of its own, started again on its port when it dies.

    Args:
        least: Members below which nobody trains.
        note: Told what a person wants to know.
    """

    def __init__(self, least: int, note: Callable[[str], None]) -> None:
        self.port = free_port()
        self._note = note
        self._command = [
            *DEMORESET,
            "coordinator",
            *("--host", LOCALHOST, "--port", str(self.port)),
            *("--min", str(least), "--parent", str(os.getpid())),
        ]
        self._process: MemberProcess | None = None
        self._record = Record()
        self._start_at = float("-inf")
        self._answered = self._tended = 0.0  # when, by time.monotonic
        threading.Thread(target=self._ask, daemon=True, name="coordinator").start()

    def _ask(self) -> None:
        while True:
            connection = HTTPConnection(LOCALHOST, self.port, timeout=2)  # never through a proxy
            with suppress(OSError, HTTPException), closing(connection):
                connection.request("GET", "/status")
                connection.getresponse()
                self._answered = time.monotonic()
            time.sleep(ASK_EVERY)

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else None

    def tend(self, now: float) -> None:
        """Start it, or start it again; one that was stopped is killed.

        Raises:
            UserError: it cannot work on this machine.
        """
        process = self._process
        if now - self._tended > ASK_EVERY:  # we were frozen ourselves, and asked nothing
            self._answered = now
        self._tended = now
        if process is None:
            if now >= self._start_at:
                self._start(now)
            return
        code = process.ended()
        process.said()
        if code is None:
            if now - self._answered > DEAF:
                self._note(f"the coordinator (pid {process.pid}) stands still: killed")
                self._answered = now
                process.kill()
            return
        self._process = None
        process.bury()
        if code == ExitCode.USER_ERROR:
            raise UserError(process.error(code).message)
        self._record = self._record.after(
            ExitCode.TRY_AGAIN, update=0, brought=now - process.started > CALM, furthest=0
        )
        self._start_at = now + self._record.wait
        self._note(
            f"lost the coordinator (pid {process.pid}): {words(code)}; starting it again"
            + (f" in {self._record.wait:g} s" if self._record.wait else "")
        )
        self.tend(now)

    def _start(self, now: float) -> None:
        try:
            self._process = MemberProcess(0, "coordinator", self._command, os.environ, now)
            self._answered = now
        except OSError as error:
            self._start_at = now + 1
            self._note(f"the coordinator cannot be started: {error}; trying again")

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.bury()
            self._process = None


def free_port() -> int:
    """A port of this machine that nobody listens on, nor will get by chance."""
    for port in random.sample(PORTS, 100):
        with suppress(OSError), socket.create_server((LOCALHOST, port)):
            return port
    raise TryAgain(f"no free port on {LOCALHOST} between {PORTS[0]} and {PORTS[-1]}")
