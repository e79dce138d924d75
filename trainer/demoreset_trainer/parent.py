"""A process that must not outlive the one that started it."""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, in whatever way.

    The parent's thread counts, not its process: children must be started by one that stays. Only
    Linux can do it; elsewhere a child notices by its pipes alone.
    """
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), number)
