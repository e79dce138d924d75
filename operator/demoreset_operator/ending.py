"""Whether a run is over: its goal met, or not to be met without a person."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from demoreset_api.status import Cause, ConditionType, RunStatus
from demoreset_operator.causes import FINAL
from demoreset_operator.ledger import Loss
from demoreset_operator.observation import Observation

# An image that cannot be had, a volume or Secret that is not there: the kubelet tries for ever.
HOPELESS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
HOPE = timedelta(minutes=5)  # that such a pod is given
EXPLAINED = {
    Cause.BUDGET_SPENT: "spec.budget.frames is spent and the goal is not met; raise it in a new "
    "run, or branch from the checkpoint",
    Cause.WRONG_RUN: "the run or its demonstration is wrong",
    Cause.NO_VALID_CHECKPOINT: "the volume holds checkpoints of this run, and none is valid",
    Cause.NO_PROGRESS: "the same update failed again and again",
}


@dataclass(frozen=True)
class Ending:
    """How a run is over."""

    type: ConditionType
    reason: str
    message: str


def ending(
    seen: Observation, status: RunStatus, losses: Sequence[Loss], now: datetime
) -> Ending | None:
    """Whether it is over, and how; None while it is not."""
    spec = seen.run.spec
    causes = {loss.attempt.cause: loss.attempt for loss in losses}
    if Cause.DONE in causes:
        return Ending(ConditionType.COMPLETE, "GoalMet", "the policy plays from the game's start")
    for cause in FINAL:
        if cause in causes:
            said = causes[cause].message
            return _failed(cause.value, EXPLAINED[cause] + (f": {said}" if said else ""))
    if status.restarts.counted > spec.restart.limit:
        counted = [attempt for attempt in status.attempts if attempt.counts]
        last = f"; the last of {counted[-1].pod}: {counted[-1].message}" if counted else ""
        return _failed(
            "RestartLimit",
            f"{status.restarts.counted} crashes, spec.restart.limit is {spec.restart.limit}{last}",
        )
    if spec.suspend:
        return None
    since = status.active_since
    if since is None:
        return None
    limit = spec.active_deadline_seconds
    if limit is not None and now >= since + timedelta(seconds=limit):
        return _failed("DeadlineExceeded", f"spec.activeDeadlineSeconds ({limit}) are over")
    limit = spec.pending_deadline_seconds
    begun = any(pod.started for pod in seen.workers) or _has_run(status, since)
    if limit is not None and not begun and now >= since + timedelta(seconds=limit):
        return _failed(
            "PendingDeadlineExceeded",
            f"no worker began within spec.pendingDeadlineSeconds ({limit}): {waiting(seen)}",
        )
    for pod in seen.workers:
        hopeless = pod.live and pod.reason in HOPELESS and pod.created is not None
        if hopeless and pod.created is not None and now >= pod.created + HOPE:
            return _failed(pod.reason, f"pod {pod.name}: {pod.message or pod.reason}")
    return None


def deadlines(seen: Observation, status: RunStatus) -> list[datetime]:
    """When to look again because of a deadline."""
    spec, since = seen.run.spec, status.active_since
    limits = (spec.active_deadline_seconds, spec.pending_deadline_seconds)
    found = [since + timedelta(seconds=limit) for limit in limits if since and limit is not None]
    found += [pod.created + HOPE for pod in seen.workers if pod.created and pod.reason in HOPELESS]
    return found


def waiting(seen: Observation) -> str:
    """What pods wait for, in Kubernetes' words."""
    for pod in seen.workers:
        if pod.live and pod.reason:
            return f"worker {pod.worker}: {pod.reason}: {pod.message}".removesuffix(": ")
    return "its pods are being made"


def _has_run(status: RunStatus, since: datetime) -> bool:
    return any(attempt.started and attempt.ended > since for attempt in status.attempts)


def _failed(reason: str, message: str) -> Ending:
    return Ending(ConditionType.FAILED, reason, message)
