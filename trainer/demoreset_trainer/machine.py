"""What this process may use of the machine."""

import ctypes
import math
import os
import sys
from pathlib import Path

from demoreset_api.names import ENV_CORES

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def cores() -> int:
    """Cores that this process may use: its affinity and its container's CPU quota, at least 1.

    A member that shares a worker with others is told its part.
    """
    if told := os.environ.get(ENV_CORES):
        return max(1, int(told))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(allowed or 1, _quota())))


def gpus() -> int:
    """NVIDIA's GPUs that this process may use; found out without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


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


def _quota() -> float:
    """Cores of the container's CPU quota (cgroup v2, then v1); infinite where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return limit / int((folder / "cpu.cfs_period_us").read_text()) if limit > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
