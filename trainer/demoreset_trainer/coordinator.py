"""The run's coordinator: torchft's Lighthouse, which knows the members that live.

Only torchft's extension module is loaded, from its file: the package itself imports torch, which
takes seconds and 200 MB of what is a process of 15 MB.
"""

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from demoreset_api.errors import TryAgain, UserError

JOIN_MS = 60_000  # a member that beats is waited for; above the time between questions: for ever
TICK_MS = 20  # between two looks at who has asked
PORT_TAKEN = 10.0  # seconds that a taken port is tried again
ANY = "::"  # every address of the machine, of both kinds


def extension() -> Path:
    """The file of torchft's extension module, without which there is no group.

    Raises:
        UserError: torchft is not installed, or not for this Python.
    """
    spec = find_spec("torchft")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(folder) / f"_torchft{suffix}"
            if path.is_file():
                return path
    raise UserError(
        "torchft is not installed: install demoreset[elastic] (x86-64 Linux, Python 3.11 to 3.13); "
        "`demoreset run --members 1` does without it"
    )


def _load(path: Path) -> ModuleType:
    os.environ.setdefault("RUST_LOG", "warn")  # else it tells of every quorum
    spec = spec_from_file_location(
        "_torchft", path, loader=ExtensionFileLoader("_torchft", str(path))
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address(host: str, port: int, ipv6: bool) -> str:
    """What to bind: an IPv6 address in brackets; any address as IPv4's where IPv6 is off."""
    if host in (ANY, "") and not ipv6:
        host = "0.0.0.0"
    host = host or ANY
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def has_ipv6() -> bool:
    """Whether a socket can listen on IPv6 here."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind((ANY, 0))
    except OSError:
        return False
    return True


def serve(
    host: str,
    port: int,
    *,
    least: int,
    dead_ms: int,
    waits: Iterator[float],
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """A Lighthouse that listens; it lives as long as the returned object.

    Args:
        host: To listen on; "::" for any.
        port: 0 takes a free one.
        least: Members below which nobody trains.
        dead_ms: Without a beat for so long a member counts as lost.
        waits: Seconds to wait before each further try when the port is taken.
        sleep: Waits.

    Raises:
        TryAgain: the port is taken, and was at every try.
        UserError: no such address, or not allowed.
    """
    torchft = _load(extension())
    bind = address(host, port, has_ipv6())
    while True:
        try:
            return torchft.LighthouseServer(
                bind=bind,
                min_replicas=least,
                join_timeout_ms=JOIN_MS,
                quorum_tick_ms=TICK_MS,
                heartbeat_timeout_ms=dead_ms,
            )
        except RuntimeError as error:  # the extension has no kinds of errors but this
            if f"os error {errno.EADDRINUSE}" not in str(error):
                raise UserError(f"--host {host} --port {port}: cannot listen: {error}") from error
            wait = next(waits, None)
            if wait is None:
                raise TryAgain(
                    f"port {port} is taken on this machine: another coordinator? Choose another "
                    "--port, or try again later"
                ) from error
        sleep(wait)


def back_off(first: float = 0.1, most: float = 0.5, total: float = PORT_TAKEN) -> Iterator[float]:
    """Growing waits that add up to `total` seconds."""
    wait = first
    while total > 0:
        yield min(wait, total)
        total -= wait
        wait = min(2 * wait, most)


def port_of(server: Any) -> int:
    """Where it listens."""
    return int(server.address().rpartition(":")[2])


def say(text: str) -> None:
    """One line, at once; a reader that has gone is no reason to end."""
    try:
        sys.stderr.write(f"demoreset: {text}\n")  # in one piece, among lines of others
        sys.stderr.flush()
    except OSError:
        return
