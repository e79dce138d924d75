"""Members that start at once: forked from a process that has imported all that they need.

    supervisor ──"start one, with these flags"──▶ nursery ──fork──▶ ─fork──▶ member
        ▲                                                                      │
        └───────────── its parent from here on (it adopts orphans) ────────────┘

Torch alone takes two to three seconds of a core to import: on a machine that loses a member every
few seconds, that is most of what a loss costs the others. The nursery forks before there is any
thread, GPU or connection. Its members become the supervisor's own children, which tells their ends,
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
from demoreset_trainer.member_process import DEMORESET, SETTINGS
from demoreset_trainer.parent import adopt_orphans, end_with_parent

MOST_BYTES = 1 << 20  # of a request


class Nursery:
    """The supervisor's end: starts members, and learns how they ended.

    Args:
        environment: Of the nursery, and of members where it is not their own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**SETTINGS, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._groups: set[int] = set()  # process groups: of every nursery, with its members
        self._unborn: deque[Forked] = deque()  # in the order in which they were asked for
        self._born: dict[int, Forked] = {}
        adopt_orphans()

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], wire: int, output: int
    ) -> "Forked":
        """Start a member; a `member_process.Spawn`.

        Raises:
            OSError: the machine has no room for another process.
        """
        self._tend()
        if self._link is None:
            self._open()
        assert self._link is not None
        arguments = list(command)[len(DEMORESET) :]
        request = {"arguments": arguments, "environment": dict(environment)}
        socket.send_fds(self._link, [json.dumps(request).encode()], [wire, output])
        child = Forked(self)
        self._unborn.append(child)
        return child

    def _open(self) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                self._process = subprocess.Popen(
                    [*DEMORESET, "members", "--link", str(its.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # members say for themselves what is wrong
                    pass_fds=(its.fileno(),),
                    env=self._environment,
                    process_group=0,  # its members are found by it, and Ctrl-C does not reach them
                )
            except OSError:
                mine.close()
                raise
        mine.setblocking(False)
        self._link = mine
        self._groups.add(self._process.pid)

    def look(self) -> None:
        """Learn who was born, and who has died."""
        self._tend()
        for group in list(self._groups):
            try:
                while (ended := os.waitpid(-group, os.WNOHANG)) != (0, 0):
                    pid, status = ended
                    if (child := self._born.pop(pid, None)) is not None:
                        child.ended(os.waitstatus_to_exitcode(status))
                    elif self._process is not None and pid == self._process.pid:
                        self._lost()
                    # Others were processes of members that are dead: nobody asks for them.
            except ChildProcessError:
                if self._process is None or group != self._process.pid:
                    self._groups.discard(group)

    def _tend(self) -> None:
        """Hear who was born."""
        while self._unborn and self._link is not None:
            try:
                answer = self._link.recv(64)
            except BlockingIOError:
                return
            except OSError:
                answer = b""
            if not answer:
                self._lost()
                return
            child = self._unborn.popleft()
            child.pid = int(answer)
            self._born[child.pid] = child
            if child.returncode is not None:  # it was to end before
                os.kill(child.pid, signal.SIGKILL)

    def _lost(self) -> None:
        """The nursery is gone: those that it has not started must be asked for again."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.returncode = 0  # `look` buries it, with its group
        self._process = self._link = None
        for child in self._unborn:
            child.ended(ExitCode.TRY_AGAIN)
        self._unborn.clear()

    def kill(self) -> None:
        """End the nursery, whatever it does; its members live on."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        process = self._process
        self.kill()
        while self._process is not None and self._process is process:
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
        """Send it a signal; who gets one before it is born never was, nor will others be."""
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


def serve(link: socket.socket) -> None:
    """Start members until the supervisor hangs up."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(Exception):  # each member will say what is wrong with it
        from demoreset_trainer import cli_member

        cli_member.preload()
    while True:
        content, descriptors, _, _ = socket.recv_fds(link, MOST_BYTES, 2)
        if not content:
            return
        pid = _fork_twice(json.loads(content), descriptors, link)
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(str(pid).encode())


def _fork_twice(request: dict[str, Any], descriptors: Sequence[int], link: socket.socket) -> int:
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
        os.environ.clear()
        os.environ.update(request["environment"])
        os.environ[ENV_WIRE] = str(wire)
        from demoreset_trainer import cli

        code = cli.main(request["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
