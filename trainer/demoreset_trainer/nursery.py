"""Members that start at once: forked from a process that has imported all that they need.

    supervisor ──"start one, with these flags"──▶ nursery ──fork──▶ ─fork──▶ member
        ▲                                                                      │
        └───────────── its parent from here on (it adopts orphans) ────────────┘

Torch alone takes two to three seconds of a core to import, and every emulator a tenth: on a machine
that loses a member every few seconds, that is most of what a loss costs the others. The nursery
forks before it has a thread of its own, a GPU or a connection (the mathematics' library has threads
and a handler for forks). Its members become the supervisor's own children, which tells their ends,
and outlive it: when it is killed, the next member waits for another one. Linux only, as torchft is.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Self

from demoreset_api.errors import ExitCode
from demoreset_api.names import ENV_WIRE
from demoreset_trainer.events import Events
from demoreset_trainer.member_process import DEMORESET, SETTINGS
from demoreset_trainer.parent import adopt_orphans, end_with_parent

MAX_BYTES = 1 << 17  # of a request: what a link takes
MAX_EMULATORS = 64  # of a stock: more are made when they are needed


class Nursery:
    """The supervisor's end: starts members, and learns how they ended.

    Args:
        environment: Of the nursery; members have it, too, with what is their own.
        stock: The game that they play, and how many emulators of it are made beforehand.
    """

    def __init__(
        self, environment: Mapping[str, str], stock: tuple[str, int] | None = None
    ) -> None:
        self._environment = {**SETTINGS, **environment}
        self._stock = stock
        self._pid: int | None = None  # of the nursery that lives
        self._link: socket.socket | None = None
        self._groups: set[int] = set()  # process groups: of every nursery, with its members
        self._unborn: deque[Forked] = deque()  # in the order in which they were asked for
        self._born: dict[int, Forked] = {}
        self._early: dict[int, int] = {}  # statuses of those who ended before we heard of them
        adopt_orphans()

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], wire: int, output: int
    ) -> "Forked":
        """Start a member; a `member_process.Spawn`.

        Raises:
            OSError: the machine has no room for another process.
        """
        ours = self._environment
        own = {name: value for name, value in environment.items() if ours.get(name) != value}
        content = {"arguments": list(command)[len(DEMORESET) :], "environment": own}
        request = json.dumps(content).encode()
        self.look()
        try:
            self._send(request, wire, output)
        except ConnectionError:  # killed since we looked
            self._lost()
            self._send(request, wire, output)
        child = Forked(self)
        self._unborn.append(child)
        return child

    def _send(self, request: bytes, wire: int, output: int) -> None:
        if self._link is None:
            self._link = self._open(output)
        socket.send_fds(self._link, [request], [wire, output])

    def _open(self, output: int) -> socket.socket:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = ["--link", str(its.fileno()), "--parent", str(os.getpid())]
        if self._stock is not None:
            game, count = self._stock
            flags += ["--game", game, "--emulators", str(min(count, MAX_EMULATORS))]
        with its:
            try:
                process = subprocess.Popen(
                    [*DEMORESET, "members", *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=output,  # what ends it is told as the first member's end
                    stderr=output,
                    pass_fds=(its.fileno(),),
                    env=self._environment,
                    process_group=0,  # its members are found by it, and Ctrl-C does not reach them
                )
            except OSError:
                mine.close()
                raise
        process.returncode = 0  # `look` buries it, with its group
        self._pid = process.pid
        self._groups.add(process.pid)
        mine.setblocking(False)
        return mine

    def look(self) -> None:
        """Learn who was born, and who has died."""
        self._hear()
        for group in list(self._groups):
            try:
                while (ended := os.waitpid(-group, os.WNOHANG)) != (0, 0):
                    pid, status = ended
                    if pid == self._pid:
                        self._lost()
                    elif (child := self._born.pop(pid, None)) is not None:
                        child.ended(os.waitstatus_to_exitcode(status))
                    elif self._unborn:
                        self._early[pid] = status
                    # Others were processes of members that are dead: nobody asks for them.
            except ChildProcessError:
                if group != self._pid:
                    self._groups.discard(group)
        if not self._unborn:  # what is left were no members, and their numbers may come again
            self._early.clear()

    def _hear(self) -> None:
        """Who was born."""
        while self._unborn and self._link is not None:
            try:
                answer = self._link.recv(64)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # told once; answers that came before lie behind it
            if not answer:
                return  # `look` hears how it ended
            child = self._unborn.popleft()
            child.pid = int(answer)
            if (status := self._early.pop(child.pid, None)) is not None:
                child.ended(os.waitstatus_to_exitcode(status))
                continue
            self._born[child.pid] = child
            if child.returncode is not None:  # it was given up before
                os.kill(child.pid, signal.SIGKILL)

    def _lost(self) -> None:
        """The nursery is gone: those that it has not started must be asked for again."""
        self._hear()
        if self._link is not None:
            self._link.close()
        self._pid = self._link = None
        for child in self._unborn:
            child.ended(ExitCode.TRY_AGAIN)
        self._unborn.clear()

    def kill(self) -> None:
        """End the nursery, whatever it does; its members live on."""
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        self.kill()
        while self._pid is not None:
            self.look()
            time.sleep(0.001)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Forked:
    """A member that the nursery starts: what of `subprocess.Popen` a supervisor needs."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self.pid = 0  # not born yet
        self.returncode: int | None = None

    def ended(self, code: int) -> None:
        """It has, if it had not before."""
        if self.returncode is None:
            self.returncode = code

    def poll(self) -> int | None:
        """How it ended, None while it lives."""
        if self.returncode is None:
            self._nursery.look()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send it a signal. One that is not born yet is given up, and the nursery: it may hang."""
        if self.returncode is not None:
            return
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sig)
        else:
            self.returncode = -sig
            self._nursery.kill()

    def kill(self) -> None:
        """End it, whatever it does."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int | None:
        """Until it has ended."""
        while self.poll() is None:
            time.sleep(0.001)
        return self.returncode


# The nursery's end


def serve(link: socket.socket, supervisor: int, stock: tuple[str, int] | None) -> None:
    """Get ready, then start members until the supervisor, of this process id, hangs up."""
    end_with_parent(parent=supervisor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(Exception):  # each member will say what is wrong with it
        preload()
        Events("").tell("imported")
        if stock is not None:
            from demoreset_trainer import emulator

            game, count = stock
            emulator.stock(game, count + 1)  # a member takes one, to know the game's actions
    while True:
        content, descriptors, _, _ = socket.recv_fds(link, MAX_BYTES, 2)
        if not content:
            return
        pid = _fork_twice(json.loads(content), descriptors, link, supervisor)
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(str(pid).encode())


def preload() -> None:
    """Import all that a member needs; nothing is started."""
    import demoreset_trainer.assemble
    import demoreset_trainer.checkpoint_writer
    import demoreset_trainer.elastic
    import demoreset_trainer.runfile  # noqa: F401


def _fork_twice(
    request: dict[str, Any], descriptors: Sequence[int], link: socket.socket, supervisor: int
) -> int:
    """A grandchild, whose parent is gone: the supervisor adopts it."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            os.close(read)
            os.close(write)
            link.close()
            while os.getppid() == parent:  # whose end must not count as the supervisor's
                time.sleep(0.001)
            if os.getppid() != supervisor:
                os._exit(ExitCode.TRY_AGAIN)
            _live(request, descriptors)
        os.write(write, str(pid).encode())
        os._exit(0)
    os.close(write)
    pid = int(os.read(read, 64))
    os.close(read)
    os.waitpid(between, 0)
    return pid


def _live(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Be a member: as if started with these flags, this environment and these pipes."""
    code = int(ExitCode.CRASH)
    try:
        wire, output = descriptors
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.update(request["environment"])
        os.environ[ENV_WIRE] = str(wire)
        from demoreset_trainer import cli

        code = cli.main(request["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
