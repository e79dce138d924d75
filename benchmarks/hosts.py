"""Hosts on one switch, made of network namespaces: their wires can be cut, and be long and bad.

    with Hosts(["a", "b"]) as hosts:
        subprocess.run(hosts.on("a", "ip", "address"))
        hosts.cut("a")
        hosts.heal()

For root, on Linux. Nothing of it is seen from outside: the switch has a namespace of its own, and
the addresses are of a range for documentation.
"""

import collections
import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

NEEDED = ("ip", "nft")  # commands
NETWORK = "192.0.2"
CHAIN = ("bridge", "faults", "wires")
_TUNSETIFF, _TAP, _PLAIN = 0x400454CA, 0x0002, 0x1000  # Linux: linux/if_tun.h
FRAME = 1 << 16


@dataclass(frozen=True)
class Bad:
    """What becomes of the packets that a host sends: seconds on the way, and the share lost."""

    seconds: float
    lost: float


GOOD = Bad(seconds=0.0, lost=0.0)


class Hosts:
    """Named hosts that reach one another.

    Args:
        names: Of the hosts, of a few letters.
        bad: The wires that are bad, by host.
    """

    def __init__(self, names: Sequence[str], bad: Mapping[str, Bad] | None = None) -> None:
        self._prefix = f"demoreset-{os.getpid()}-"
        self.addresses = {name: f"{NETWORK}.{place}" for place, name in enumerate(names, 1)}
        self._bad = bad or {}
        self._wires: dict[str, _Wire] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def _make(self) -> None:
        switch = self._namespace("switch")
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "dev", "switch", "up")
        for name, address in self.addresses.items():
            host = self._namespace(name)
            if name in self._bad:
                self._wires[name] = _Wire(host, switch, name, self._bad[name])
                self._open.callback(self._wires[name].close)
            else:
                end = ("peer", "name", name, "netns", switch)
                _ip("-n", host, "link", "add", "eth0", "type", "veth", *end)
            _ip("-n", switch, "link", "set", "dev", name, "master", "switch", "up")
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "dev", "eth0", "up")
            _ip("-n", host, "link", "set", "dev", "lo", "up")
        family, table, _ = CHAIN
        self._nft("add", "table", family, table)
        self._nft("add", "chain", *CHAIN, "{ type filter hook forward priority 0; }")

    def _namespace(self, name: str) -> str:
        namespace = self._prefix + name
        _ip("netns", "add", namespace)
        self._open.callback(_ip, "netns", "delete", namespace)
        return namespace

    def on(self, host: str, *command: str) -> list[str]:
        """A command as it is run on a host; it becomes the command's own process."""
        return ["ip", "netns", "exec", self._prefix + host, *command]

    def cut(self, host: str, *, sends: bool = True, hears: bool = True, to: str = "") -> None:
        """From now on what this host sends, or should hear, is lost: to and from all, or one."""
        other = self.addresses.get(to)
        if sends:
            self._drop("iifname", host, *(("ip", "daddr", other) if other else ()))
        if hears:
            self._drop("oifname", host, *(("ip", "saddr", other) if other else ()))

    def heal(self) -> None:
        """All reach one another again."""
        self._nft("flush", "chain", *CHAIN)

    def mend(self, host: str) -> None:
        """Its bad wire is a good one from now on."""
        self._wires[host].bad = GOOD

    def _drop(self, *what: str) -> None:
        self._nft("add", "rule", *CHAIN, *what, "drop")

    def _nft(self, *words: str) -> None:
        subprocess.run(self.on("switch", "nft", *words), check=True)


class _Wire:
    """From a host to the switch through this process: what the host sends is late, or lost.

    `tc qdisc ... netem` does the same where the kernel has it, and many have not.
    """

    def __init__(self, host: str, switch: str, name: str, bad: Bad) -> None:
        self.bad = bad
        self._random = random.Random(0)
        self._host, self._switch = _tap(host, "eth0"), _tap(switch, name)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True, name="wire")
        self._thread.start()

    def _carry(self) -> None:
        late: collections.deque[tuple[float, bytes]] = collections.deque()
        while not self._stopped.is_set():
            pause = min(max(0.0, late[0][0] - time.monotonic()), 0.1) if late else 0.1
            ready, _, _ = select.select([self._host, self._switch], [], [], pause)
            now = time.monotonic()
            if self._switch in ready:
                _send(self._host, os.read(self._switch, FRAME))
            if self._host in ready:
                frame = os.read(self._host, FRAME)
                if self._random.random() >= self.bad.lost:
                    late.append((now + self.bad.seconds, frame))
            while late and late[0][0] <= now:
                _send(self._switch, late.popleft()[1])

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        os.close(self._host)
        os.close(self._switch)


def _send(device: int, frame: bytes) -> None:
    try:
        os.write(device, frame)
    except OSError:
        return  # the other end is not up: lost, as on any wire


def _tap(namespace: str, name: str) -> int:
    """A device whose packets are read from, and written to, this descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    unique = f"wire{os.getpid()}"
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", unique.encode(), _TAP | _PLAIN))
    _ip("link", "set", "dev", unique, "netns", namespace, "name", name)
    return device


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
