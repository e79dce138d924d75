"""What this process may use of the machine: cores and the fast number formats."""

import os
from pathlib import Path


def cores() -> int:
    """Cores that this process may use: its affinity, cut by the container's CPU quota.

    `os.cpu_count()` counts the machine's cores, which a pod with a limit does not have.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, _quota(Path("/sys/fs/cgroup")) or allowed))


def _quota(root: Path) -> int | None:
    """The CPU quota in whole cores, rounded up; None without one (cgroup v2, then v1)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return -(-int(quota) // int(period))
