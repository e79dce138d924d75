"""Whose child a process is: one that must not outlive its parent, one that adopts orphans."""

import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent ends, in whatever way.

    The parent's thread counts, not its process: children must be started by one that stays. Only
    Linux can do it; elsewhere a child notices by its pipes alone.

    Args:
        number: Of the signal.
        parent: Its process id, for a child that was slow to come so far: it may have ended before.
    """
    if sys.platform != "linux":
        return
    parent = parent or os.getppid()
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends; Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(option, int(value))
