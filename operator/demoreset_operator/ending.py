"""Whether a run is over: its goal met, or not to be met without a person."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from demoreset_api.spec import Goal, Restart
from demoreset_api.status import MAX_MESSAGE, Cause, ConditionType, RunStatus
from demoreset_operator.causes import FINAL_CAUSES
from demoreset_operator.ledger import Loss
from demoreset_operator.observation import STUCK_AFTER, Observation, Pod, Run
from demoreset_operator.reasons import Reason
from demoreset_operator.render import claim_name

SCHEDULER_ERROR = "SchedulerError"
NO_ROOM = ("Unschedulable", "SchedulingGated", SCHEDULER_ERROR)  # on no node
ANEW = "delete it and apply it anew"  # of a run whose checkpoints this does not cost: see `anew`
HOPE = timedelta(minutes=5)  # that a pod that cannot be started is given, in a run that never began
EXPLANATIONS = {
    Cause.BUDGET_SPENT: "spec.budget.frames is spent and the goal is not met",
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
        how = confirmed(spec.goal, status) or "the policy plays from the game's own start"
        return Ending(ConditionType.COMPLETE, Reason.GOAL_MET, how)
    for cause in FINAL_CAUSES:
        if cause in causes:
            message = causes[cause].message
            return _failed(cause.value, EXPLANATIONS[cause] + (f": {message}" if message else ""))
    if (spent := _spent(status, spec.restart)) is not None:
        return _failed(Reason.RESTART_LIMIT, spent)
    if spec.suspend:
        return None
    since = status.active_since
    if since is None:
        return None
    limit = spec.active_deadline_seconds
    if limit is not None and now >= since + timedelta(seconds=limit):
        return _failed(Reason.DEADLINE_EXCEEDED, f"spec.activeDeadlineSeconds ({limit}) are over")
    limit = spec.pending_deadline_seconds
    if limit is not None and status.begun is None and now >= since + timedelta(seconds=limit):
        return _failed(
            Reason.PENDING_DEADLINE_EXCEEDED,
            f"no worker began within spec.pendingDeadlineSeconds ({limit}): {waiting(seen)}",
        )
    if volume_lost(seen, status, now):
        name = claim_name(seen.run)
        return _failed(
            Reason.VOLUME_LOST,
            f"the claim {name} is gone, and with it the checkpoints: delete the run and apply it "
            "anew, to begin from the start",
        )
    for pod in seen.pods:
        if (until := _hope(pod, status)) is not None and now >= until:
            return _failed(pod.reason, f"pod {pod.name}: {pod.message or pod.reason}"[:MAX_MESSAGE])
    return None


def _spent(status: RunStatus, limits: Restart) -> str | None:
    """Which limit of restarts is passed, with the last words of who passed it."""
    its = status.restarts
    for cause, count, limit, what in (
        (Cause.CRASHED, its.crashed, limits.limit, "crashes, spec.restart.limit"),
        (
            Cause.OUT_OF_MEMORY,
            its.out_of_memory,
            limits.out_of_memory_limit,
            "times out of memory, spec.restart.outOfMemoryLimit",
        ),
        (Cause.HUNG, its.hung, limits.hang_limit, "hangs, spec.restart.hangLimit"),
    ):
        if count > limit:
            last = next((one for one in reversed(status.attempts) if one.cause is cause), None)
            words = f"; the last of {last.pod}: {last.message}" if last is not None else ""
            return f"{count} {what} is {limit}{words}"
    return None


def confirmed(goal: Goal, status: RunStatus) -> str:
    """How the latest confirmation has met a goal, in words; "" where it has not."""
    tried = status.evaluation
    if tried is None or tried.success_rate < goal.success_rate:
        return ""
    return (
        f"the policy ties the demonstration in {tried.success_rate:.0%} of {tried.episodes} "
        "episodes from the game's own start"
    )


def anew(run: Run) -> str:
    """How to apply a run anew, and keep what it has learned."""
    if not (run.status.saved and run.spec.checkpoint.volume.leaves):
        return ANEW
    return (
        f"`kubectl demoreset fetch {run.name}` brings its folder, for its volume goes with it "
        f"(spec.checkpoint.volume.retention: Delete); then {ANEW}"
    )


def go_on(run: Run, change: str = "") -> str:
    """How a run that is over goes on with other settings.

    Of one that has saved nothing it is not said that its volume is empty: that may be an older one.
    """
    if not run.status.saved:
        return f"It has saved no checkpoint itself: {ANEW}."
    if run.spec.checkpoint.volume.leaves:
        return f"No branch can have its checkpoints: {anew(run)}."
    settings = f" --set {change}" if change else ""
    return f"`kubectl demoreset branch {run.name} NEW{settings}` goes on from its checkpoints."


def _hope(pod: Pod, status: RunStatus) -> datetime | None:
    """Until when a pod that the kubelet cannot start is waited for; None for as long as it takes.

    Where a worker has begun, the image was right: a registry that is away for a while, or a new
    image that is wrong, does not end what was learned. The condition says it meanwhile.
    """
    if status.begun is not None or status.training is not None:
        return None
    if not pod.live or pod.failing is None:
        return None
    return pod.failing + HOPE


def volume_lost(seen: Observation, status: RunStatus, now: datetime) -> bool:
    """Whether what was learned was on a volume that is no more; one that is in use is there."""
    if seen.claimed or any(pod.node and pod.present(now) for pod in seen.workers):
        return False
    claims = [one for one in seen.children if one.kind == "PersistentVolumeClaim"]
    return status.saved and seen.run.spec.checkpoint.volume.claim is None and not claims


def deadlines(seen: Observation, status: RunStatus) -> list[datetime]:
    """When to look again because of a deadline."""
    spec, since = seen.run.spec, status.active_since
    limits = (spec.active_deadline_seconds, spec.pending_deadline_seconds)
    found = [since + timedelta(seconds=limit) for limit in limits if since and limit is not None]
    found += [until for pod in seen.pods if (until := _hope(pod, status)) is not None]
    found += [pod.leaves_at + STUCK_AFTER for pod in seen.pods if pod.leaves_at is not None]
    return found


def waiting(seen: Observation) -> str:
    """What a run waits for, in Kubernetes' words."""
    if seen.refused:
        return seen.refused
    troubled = next((named(pod) for pod in seen.pods if pod.live and speaks(pod, seen)), "")
    if not troubled and (claim := unbound(seen)):
        return f"{Reason.CLAIM_PENDING}: {claim}"
    return troubled or "pods are being made"


def speaks(pod: Pod, seen: Observation) -> bool:
    """Whether a pod says what it waits for.

    Pods of one claim meet in the scheduler, which fails for some, tries again, and then waits for
    the volume without a word: what they say is the old error.
    """
    return bool(pod.reason) and not (pod.reason == SCHEDULER_ERROR and unbound(seen))


def unbound(seen: Observation) -> str:
    """The run's own claim where it has no volume: a pod that waits for one may not say so."""
    claim = next((one for one in seen.children if one.unbound), None)
    if claim is None:
        return ""
    volume = seen.run.spec.checkpoint.volume
    which = f"class {volume.storage_class_name}" if volume.storage_class_name else "default class"
    return f"the claim {claim.name} has no volume yet: {', '.join(claim.access)}, of the {which}"


def named(pod: Pod) -> str:
    """A pod and its trouble."""
    return f"{who(pod)}: {lacks(pod)}"[:MAX_MESSAGE]


def who(pod: Pod) -> str:
    """A pod, as people are told of it."""
    return "coordinator" if pod.worker is None else f"worker {pod.worker}"


def lacks(pod: Pod) -> str:
    """What a pod waits for, or why it ended, in Kubernetes' words."""
    return f"{pod.reason}: {pod.message}".removesuffix(": ")


def _failed(reason: str, message: str) -> Ending:
    return Ending(ConditionType.FAILED, reason, message)
