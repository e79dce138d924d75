"""A group's coordinator as a process of its own on this machine."""

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException

from demoreset_api.errors import ExitCode, TryAgain, UserError
from demoreset_trainer.member_process import DEMORESET, MemberProcess
from demoreset_trainer.network import LOCALHOST
from demoreset_trainer.restart import Record, words

PORTS = range(20_000, 30_000)  # below those that the kernel gives to whoever connects
WORKS_AFTER = 10.0  # seconds after which a coordinator counts as one that works
ASK_EVERY, DEAF = 2.0, 10.0  # seconds between two questions to it, and without an answer


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
            ExitCode.TRY_AGAIN, update=0, brought=now - process.started > WORKS_AFTER, furthest=0
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
