"""What this process may use of the machine."""

import ctypes
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import UserError
from demoreset_api.names import ENV_CORES

if TYPE_CHECKING:
    from demoreset_api.spec import EnvironmentSpec

CGROUP = Path("/sys/fs/cgroup")
MOST_SLOTS = 32  # of a process of environments: with more of them it begins slowly
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def cores(environment: Mapping[str, str] = os.environ) -> int:
    """Cores that a process with this environment may use, at least 1.

    What it is told: a worker on a cluster what it has asked for, a member its part of that. Else
    its affinity and its container's CPU quota.

    Raises:
        UserError: it is told something else than a number.
    """
    if told := environment.get(ENV_CORES):
        try:
            return max(1, int(told))
        except ValueError:
            raise UserError(f"{ENV_CORES}: received {told!r}; it is a whole number") from None
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(allowed or 1, _quota())))


def cores_each(members: int, environment: Mapping[str, str] = os.environ) -> int:
    """Cores of each of so many members, at least 1; of all as `cores`."""
    return max(1, cores(environment) // members)


def environment_processes(slots: int, cores: int, said: int | None = None) -> int:
    """Processes that so many slots are played in, by so many cores; unless it is said how many.

    An emulator takes a tenth of a second to make. Where processes are forked, what is made for one
    is there for all, so with more of them a member begins sooner: 64 slots on one core after 6 s
    in one process, 3 in two, 1.5 in four; these train 1 and 3 % more slowly. So two a core at most.
    """
    most = max(cores, min(math.ceil(slots / MOST_SLOTS), 2 * cores))
    return min(slots, said or most)


def emulators_per_process(environment: "EnvironmentSpec", cores: int) -> int:
    """Emulators that one of these processes needs where it plays all slots of the run."""
    slots = environment.slots
    return math.ceil(slots / environment_processes(slots, cores, environment.processes))


def gpus() -> int:
    """NVIDIA's GPUs that this process may use; found out without torch."""
    return len(devices(os.environ))


def devices(environment: Mapping[str, str], nodes: Sequence[Path] | None = None) -> list[str]:
    """The GPUs that a process with this environment may use, as CUDA names them.

    Args:
        environment: CUDA_VISIBLE_DEVICES there, where it is set, has the last word.
        nodes: The files of the machine's GPUs.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = [name.strip() for name in chosen.split(",")]
        return [name for name in named if name and name != "-1"]
    found = list(Path("/dev").glob("nvidia[0-9]*")) if nodes is None else nodes
    return [str(number) for number in range(len(found))]


def settle() -> None:
    """Make threads and memory suit us; to be called before torch is imported.

    Idle threads of the mathematics sleep: by default they spin for milliseconds, on the cores that
    the environments need meanwhile (1.4 times as long a rollout on 2 cores). And freed memory is
    kept: by default every large tensor is mapped anew, and its pages are first touched, one fault
    each, at every step (1.4 times as long an optimisation in float32 on 2 virtual cores).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):  # glibc's
            allocator.mallopt(_M_MMAP_MAX, 0)
            allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def oom_kills() -> int:
    """Processes that the kernel killed for memory: this container's, or else the machine's.

    The container's: cgroup v2, then v1.
    """
    counts = (CGROUP / "memory.events", CGROUP / "memory/memory.oom_control", Path("/proc/vmstat"))
    for path in counts:
        with suppress(OSError):
            text = path.read_text()
            if found := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
                return int(found[1])
    return 0


def _quota() -> float:
    """Cores of the container's CPU quota (cgroup v2, then v1); infinite where there is none."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = CGROUP / "cpu"
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return limit / int((folder / "cpu.cfs_period_us").read_text()) if limit > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
