"""A member as its supervisor sees it: a process, what it tells on its wire, what it writes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from demoreset_api.names import ASIDE, CONFIRM, ENV_WIRE, QUORUM, STARTING
from demoreset_api.pace import QUIET, patience
from demoreset_trainer import restart, wire
from demoreset_trainer.progress import Progress
from demoreset_trainer.wire import Beat, Message, Note

CHUNK = 1 << 16
MAX_CHUNKS = 16  # at once: nobody's flood keeps the others waiting
MAX_LINE = 1 << 20
KEPT = 20  # of the lines that it wrote
MAX_STACKS = 2000  # lines
# Of a member, unless its environment says otherwise: torchft tells of every connection; one that is
# killed by a signal says where it stood; a name service that does not answer, and is asked who each
# address is that connects, holds up a new group for a second and not for five.
SETTINGS = {
    "RUST_LOG": "warn",
    "PYTHONFAULTHANDLER": "1",
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # else 40 lines of C++ for a member that is lost: it raises too
    "RES_OPTIONS": "timeout:1 attempts:3",
}

# `-P`: what lies in the folder where somebody started us must not take the place of a module.
DEMORESET = (sys.executable, "-P", "-m", "demoreset_trainer.cli")


def member_command(
    file: Path,
    folder: Path,
    *,
    coordinator: str,
    address: str,
    members: int,
    life: Callable[[], int] = lambda: 0,
) -> Callable[[int, str], list[str]]:
    """What runs one of so many members, by its place and id: `demoreset member`, this Python.

    Args:
        file: The run file.
        folder: The run's.
        coordinator: host:port.
        address: Where others reach it.
        members: How many there are to be.
        life: The latest in which one of them trained; 0: none has.
    """
    words = [*DEMORESET, "member", "-f", str(file), "--dir", str(folder)]
    words += ["--coordinator", coordinator, "--address", address, "--together", str(members)]
    return lambda index, name: [*words, "--life", str(life()), "--id", name]


class Process(Protocol):
    """What of `subprocess.Popen` a supervisor needs."""

    pid: int

    def poll(self) -> int | None:
        """How it ended, negative for a signal; None while it lives."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it lives."""

    def kill(self) -> None:
        """End it, whatever it does."""

    def wait(self) -> int | None:
        """Until it has ended."""


# Starts a command with an environment; its wire; and where its stdout and stderr go.
Spawn = Callable[[Sequence[str], Mapping[str, str], int, int], Process]


def popen(
    command: Sequence[str], environment: Mapping[str, str], wire: int, output: int
) -> Process:
    """Start a process of its own; a `Spawn`.

    It begins with SIGINT blocked: Ctrl-C reaches all processes of a terminal, and what becomes of
    it is the supervisor's business.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(wire,),
            env={**environment, ENV_WIRE: str(wire)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class MemberProcess:
    """One member, from its start to its end.

    It must be started by a thread that stays (`parent`).

    Args:
        index: Its place among the members of its supervisor.
        name: The id by which the group knows it.
        command: What to run.
        environment: All of its environment but the wire.
        now: On the supervisor's clock.
        spawn: Starts the process.

    Raises:
        OSError: the machine has no room for another process.
    """

    def __init__(
        self,
        index: int,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        now: float,
        spawn: Spawn = popen,
    ) -> None:
        self.index, self.name = index, name
        self.started = now
        self.heard: float | None = None
        self.told = 0  # update of which it has told
        self.phase = ""
        self.progress: Progress | None = None
        self.moved = now  # when it told of its latest update
        self.hung: str | None = None  # why it is killed
        self.kill_at: float | None = None  # once it had the time to say where it stands
        self.asked = False  # to stop
        self.tail: deque[str] = deque(maxlen=KEPT)
        self.stacks: list[str] | None = None  # what it wrote since it was asked where it stands
        with ExitStack() as ours, ExitStack() as theirs:
            mine, its = _pipe(ours, theirs)
            read, write = _pipe(ours, theirs)
            self._process = spawn(command, environment, its, write)
            ours.pop_all()
        self._wire, self._said = _Lines(mine), _Lines(read)

    @property
    def pid(self) -> int:
        """Of the process; 0 while it is not there yet."""
        return self._process.pid

    @property
    def descriptors(self) -> list[int]:
        """That can be waited on for more to read."""
        return [lines.descriptor for lines in (self._wire, self._said) if lines.open]

    def listen(self, now: float) -> list[Message]:
        """What it has told since the last time; whatever it tells is a sign of life."""
        messages = [message for line in self._wire.read() if (message := wire.parse(line))]
        if messages:
            self.heard = now
        for message in messages:
            if isinstance(message, Progress):
                self.progress, self.moved = message, now
            elif isinstance(message, Beat):
                self.phase = message.phase
            if not isinstance(message, Note):
                self.told = message.update
        return messages

    def said(self) -> list[str]:
        """The lines that it has written since the last time."""
        lines = [line.decode(errors="replace").rstrip() for line in self._said.read()]
        self.tail.extend(lines)
        if self.stacks is not None and len(self.stacks) < MAX_STACKS:
            self.stacks += lines
        return lines

    def forgive(self, now: float) -> None:
        """Time begins anew: the supervisor was not there to listen."""
        self.started = now
        if self.heard is not None:
            self.heard = now

    def ended(self) -> int | None:
        """How it ended; negative for a signal, None while it lives."""
        return self._process.poll()

    def ask(self) -> None:
        """Ask it to stop."""
        self.asked = True
        self._process.send_signal(signal.SIGTERM)

    def abort(self) -> None:
        """Have it write where all of its threads stand (PYTHONFAULTHANDLER), and end."""
        self.stacks = []
        self._process.send_signal(signal.SIGABRT)

    def stands_still(self, now: float) -> bool:
        """Whether it has done no update for long, though its loop may move.

        The goal's episodes are played between two updates, and may take as long as they like; so
        may a slow network.
        """
        if self.phase in (CONFIRM, ASIDE):
            return False
        done = self.progress
        return now - self.moved > (patience(done.update, done.seconds) if done else QUIET)

    @property
    def waits(self) -> bool:
        """Whether it has no state of the run yet: it begins, or is about to read or get it."""
        return self.progress is None and self.phase in ("", STARTING, QUORUM)

    def ask_where(self) -> None:
        """Have it write where all of its threads stand, and go on."""
        self.stacks = []
        self._process.send_signal(wire.ASK_WHERE)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()

    def bury(self) -> None:
        """Kill it if it lives still, and leave nothing of it."""
        self._process.kill()
        self._process.wait()
        for lines in (self._wire, self._said):
            lines.close()

    def error(self, code: int) -> restart.LastError:
        """Why it ended."""
        return restart.last_error(self.tail, code, self.hung)


def _pipe(reading: ExitStack, writing: ExitStack) -> tuple[int, int]:
    """A pipe: the end that is read and the one that is written, each closed with its stack."""
    ends = os.pipe()
    for stack, end in zip((reading, writing), ends, strict=True):
        stack.callback(os.close, end)
    return ends


class _Lines:
    """Lines from a pipe, without waiting for any."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.open = True
        self._rest = b""

    def read(self) -> list[bytes]:
        """The lines that are there; the last one may lack its end if there is no more to come."""
        chunks = b"".join([self._rest, *self._chunks()])
        *lines, self._rest = chunks.split(b"\n")
        if self._rest and (not self.open or len(self._rest) > MAX_LINE):
            lines.append(self._rest)
            self._rest = b""
        return lines

    def _chunks(self) -> Iterator[bytes]:
        for _ in range(MAX_CHUNKS):
            if not self.open:
                return
            try:
                chunk = os.read(self.descriptor, CHUNK)
            except BlockingIOError:
                return
            if not chunk:
                self.close()
                return
            yield chunk

    def close(self) -> None:
        if self.open:
            self.open = False
            with contextlib.suppress(OSError):
                os.close(self.descriptor)
