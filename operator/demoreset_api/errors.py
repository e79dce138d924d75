"""The errors that a user sees, each with the exit code that tells a supervisor what to do.

DemoResetError                 any of ours; a crash (1) unless a kind says otherwise
├── UserError (64)             the run file, a flag, the demo or the game is wrong
├── NoValidCheckpoint (65)     a checkpoint is on record, none can be read
├── NoProgress (66)            the same update failed again and again
└── TryAgain (75)              storage or the coordinator is away, or this life is over
"""

import signal
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """How a trainer process ends; the operator decides by these and by pod conditions alone."""

    DONE = 0
    CRASH = 1
    BUDGET_SPENT = 2
    USER_ERROR = 64
    NO_VALID_CHECKPOINT = 65
    NO_PROGRESS = 66
    TRY_AGAIN = 75
    INTERRUPTED = 130
    OUT_OF_MEMORY = 137  # what a container has whose first process the kernel killed for that
    DRAINED = 143

    @classmethod
    def stopped_by(cls, number: int | None) -> Self:
        """The code of a process that was asked to stop: by Ctrl-C, or otherwise."""
        return cls.INTERRUPTED if number == signal.SIGINT else cls.DRAINED


class DemoResetError(Exception):
    """The root of every error that we raise on purpose."""

    exit_code = ExitCode.CRASH


class UserError(DemoResetError):
    """A mistake in what the user gave: names the field or file, what came, what is right."""

    exit_code = ExitCode.USER_ERROR


class NoValidCheckpoint(DemoResetError):
    """A folder holds checkpoints and none of them verifies: a person must look."""

    exit_code = ExitCode.NO_VALID_CHECKPOINT


class NoProgress(DemoResetError):
    """The same update failed too often; trying once more would not help."""

    exit_code = ExitCode.NO_PROGRESS


class TryAgain(DemoResetError):
    """Something outside the run is away for now, or a later life owns the folder."""

    exit_code = ExitCode.TRY_AGAIN
