"""Every word in which the operator says why: each has a row in docs/operations.md.

Beside them stand Kubernetes' own, of pods that do not start, and the causes of workers' ends
(`demoreset_api.status`), of which those that end a run are the reason of its condition Failed.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a condition is as it is."""

    # Running
    TRAINING = "Training"
    TOO_FEW_WORKERS = "TooFewWorkers"  # those who are there wait for spec.workers.min
    CREATING = "Creating"
    CLAIM_PENDING = "ClaimPending"  # the run's own claim has no volume
    STARTING = "Starting"
    REFUSED = "Refused"  # the API server would not take a request
    NO_UPDATES = "NoUpdates"
    UNREACHABLE = "Unreachable"  # the kubelet reaches the workers, and the operator does not
    BACK_OFF = "BackOff"
    WAITING = "Waiting"  # for a reason of Kubernetes' own that is no single word
    NOT_UNDERSTOOD = "NotUnderstood"  # the operator's version does not know what the run says
    # Complete
    GOAL_MET = "GoalMet"
    # Failed
    RESTART_LIMIT = "RestartLimit"
    VOLUME_LOST = "VolumeLost"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PENDING_DEADLINE_EXCEEDED = "PendingDeadlineExceeded"
    # Suspended, and Running meanwhile
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    RESUMED = "Resumed"
    # Stalled
    PLATEAU = "Plateau"
    MOVES = "Moves"
    # CheckpointReady
    WRITTEN = "Written"
    NOT_WRITTEN = "NotWritten"


class Happened(StrEnum):
    """What events tell of, beside workers that ended and what is told by a reason."""

    TRAINING_STARTED = "TrainingStarted"
    RECOVERED = "Recovered"
    STALLED = "Stalled"
    RUN_IS_OVER = "RunIsOver"
