"""What is happening to a run, and what to do: a paragraph, from its status alone."""

import re
from datetime import datetime

from demoreset_api.status import Attempt, Condition, ConditionType, Phase, RunStatus
from demoreset_operator.causes import NO_LOSS
from demoreset_operator.ending import NO_ROOM, anew, go_on
from demoreset_operator.observation import HOPELESS_REASONS, Run
from demoreset_operator.reasons import Reason
from demoreset_operator.story import ALL_TRAIN, claim_gone, find

MISSING_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')  # the scheduler's words
IMAGE = "Correct spec.workers.image or imagePullSecrets."
CONTAINER = "The node cannot begin the container: mend what the message names."
DO = {
    "RestartLimit": "Read the log of that pod (`kubectl demoreset logs {name} --pod POD`), and "
    "mend what ended it.",
    "WrongRun": "Correct what the message names; then {anew}.",
    "NoValidCheckpoint": "Look at the volume (`kubectl demoreset checkpoints {name}`): none is "
    "whole, and all were left as they are.",
    "NoProgress": "Where a loss, gradient or weight is not finite, lower the learning rate; else "
    "read that pod's log.",
    "Unschedulable": "Give it fewer gpus or resources, another nodeSelector, or wait for a node; "
    "where the message names a claim, see that it can be bound (`kubectl describe pvc`).",
    "SchedulerError": "The scheduler tries again; where the message names volumes, see whether the "
    "claim has one (`kubectl describe pvc`).",
    "ClaimPending": "Where this lasts, `kubectl describe pvc` says why. A class that cannot be "
    "used from several nodes makes no ReadWriteMany: then name one that can "
    "(spec.checkpoint.volume.storageClassName), or keep all workers on one node (accessMode: "
    "ReadWriteOnce); delete the run and its claim, and apply it anew.",
    "SchedulingGated": "It waits for its turn: see its queue (`kubectl describe workloads`).",
    "ContainerCreating": "Its image is fetched and its volume mounted. Where this lasts, its "
    "events in `kubectl describe pod` say why: FailedMount or FailedAttachVolume where the "
    "volume does not come, as one that another node still has (Multi-Attach).",
    "ErrImagePull": IMAGE,
    "ImagePullBackOff": IMAGE,
    "InvalidImageName": IMAGE,
    "CrashLoopBackOff": "Read the log of the one that the message names (`kubectl logs "
    "--previous`).",
    "CreateContainerConfigError": CONTAINER,
    "CreateContainerError": CONTAINER,
    "RunContainerError": CONTAINER,
    "ErrImageNeverPull": "Put the image on the nodes, or choose another imagePullPolicy.",
    "Refused": "Mend what the message names; the operator tries again by itself.",
    "BackOff": "The next try comes by itself. Read the log of that pod (`kubectl demoreset logs "
    "{name} --pod POD`), and mend what ended it.",
    "NotUnderstood": "Upgrade the operator, or leave that field out.",
    "VolumeLost": "To begin from the start, delete it and apply it anew.",
    "NoUpdates": "Look at the log (`kubectl demoreset logs {name}`). Where nothing else is waited "
    "for, one worker is replaced by itself, and where its threads stood kept in hangs/ on the "
    "volume. One that sits out comes back when data reaches it quickly; keep the run to nodes that "
    "are near one another (spec.workers.nodeSelector), or lower spec.workers.min.",
    "Unreachable": "Let the operator's pods reach them: see the NetworkPolicies of both "
    "namespaces, and a service mesh that refuses who is not in it. They may train meanwhile.",
    "TooFewWorkers": "Those who are there train once spec.workers.min is lower. One that sits out "
    "comes back when data reaches it quickly: keep the run to nodes that are near one another "
    "(spec.workers.nodeSelector).",
    "Plateau": "Film it where it stands (`kubectl demoreset fetch {name}`, then `demoreset video "
    "runs/{name} --from FRAME`).",
    "NotWritten": "Make room on the volume, or see why it is away; training goes on meanwhile.",
}
# What is changed in a new run, which goes on from the checkpoints where that can be.
CHANGES = {
    "RestartLimit": "FIELD=VALUE",
    "BudgetSpent": "spec.budget.frames=...",
    "DeadlineExceeded": "spec.activeDeadlineSeconds=...",
    "PendingDeadlineExceeded": "spec.pendingDeadlineSeconds=...",
    "NoProgress": "spec.ppo.learningRate=1e-4",
    "Plateau": "FIELD=VALUE",
}
LACKS = (Reason.TOO_FEW_WORKERS, Reason.PENDING_DEADLINE_EXCEEDED)  # that do not say why
OPERATOR = (
    "`kubectl get pods --all-namespaces --selector "
    "app.kubernetes.io/name=demoreset,app.kubernetes.io/component=operator`"
)


def why(run: Run, now: datetime, *, running: int | None = None) -> str:
    """The paragraph that says what is happening to a run, and what to do.

    Args:
        run: As the API server has it.
        now: The time.
        running: Its workers' pods that run, where that has been other than the status for a while.
    """
    status = run.status
    sentences = [_stands(run, status)]
    if run.generation > status.observed_generation and not run.deleting:
        sentences.append(_unseen(run))
    elif running is not None and stale(status, running):
        sentences.append(
            f"That may be old: of its workers' pods {running} run now. See whether an operator "
            f"does: {OPERATOR}, and its log."
        )
    for found in status.conditions:
        if _speaks(found, status):
            sentences += [_said(found), *_do(run, found)]
    if status.phase is Phase.COMPLETE:
        fetch = f"`kubectl demoreset fetch {run.name}` brings it to runs/{run.name} here"
        sentences.append(f"{fetch}; `demoreset evaluate` and `demoreset video` show what it does.")
    if (lost := _lost(status, now)) is not None:
        sentences.append(lost)
    return " ".join(sentences)


def stale(status: RunStatus, running: int) -> bool:
    """Whether fewer pods run than the status says that train, as for some moments after a loss."""
    return status.phase is Phase.RUNNING and running < status.workers.ready


def missing_claim(message: str) -> str | None:
    """The claim that is not there, by the scheduler's message."""
    found = MISSING_CLAIM.search(message)
    return found[1] if found is not None else None


def _said(found: Condition) -> str:
    """A condition in a sentence, in which nothing is said twice."""
    parts = [part for part in found.message.rstrip(".").split(": ") if part != found.reason]
    kept: list[str] = []
    for sentence in ": ".join([found.reason, *parts]).split(". "):
        if not (kept and kept[-1].endswith(sentence)):
            kept.append(sentence)
    return ". ".join(kept) + "."


def _do(run: Run, found: Condition) -> list[str]:
    """What to do about a condition."""
    words = [found.reason, *re.split("[:;] ", found.message.rstrip("."))]  # of who is lacking
    if found.reason in LACKS:
        words.append(words.pop(0))
    word = next((word for word in words if word in DO or word in CHANGES), "")
    text = [DO[word].format(name=run.name, anew=anew(run))] if word in DO else []
    claim = missing_claim(found.message)
    if claim is not None and claim == run.spec.checkpoint.volume.claim:  # not one that we make
        restore = "Restore it from a backup or snapshot; on an empty one the run begins from the "
        make = "Make the claim, or delete the run and name another."
        text = [restore + "start." if run.status.saved else make]
    if found.type is ConditionType.FAILED and word in (*HOPELESS_REASONS, *NO_ROOM):
        text.append(f"A run that has failed takes no correction: then {anew(run)}.")
    if word in CHANGES:
        text.append(go_on(run, CHANGES[word]))
    return text


def _speaks(found: Condition, status: RunStatus) -> bool:
    """Whether a condition is worth a sentence now."""
    match found.type:
        case ConditionType.FAILED | ConditionType.STALLED:
            return found.status == "True"
        case ConditionType.CHECKPOINT_READY:
            # The condition Failed has said so already.
            lost = found.reason == Reason.VOLUME_LOST and status.phase is Phase.FAILED
            return found.status == "False" and not lost
        case ConditionType.RUNNING:
            well = found.message == ALL_TRAIN and status.workers.ready == status.workers.wanted
            return status.phase is Phase.PENDING or (status.phase is Phase.RUNNING and not well)
    return False


def _unseen(run: Run) -> str:
    if not run.ours:
        return f"It is {run.spec.managed_by}'s to look after (spec.managedBy)."
    which = "its latest change" if run.status.observed_generation else "it"
    return (
        f"No operator has looked at {which} yet. Where this lasts, see whether one runs and "
        f"watches this namespace: {OPERATOR}, and its log."
    )


def _stands(run: Run, status: RunStatus) -> str:
    workers, where, how = status.workers, status.curriculum, status.training
    goes_on = "goes on from its checkpoint" if status.saved else "begins"
    running = find(status, ConditionType.RUNNING)
    unheard = running is not None and running.reason == Reason.UNREACHABLE
    parts = {
        Phase.PENDING: f"{run.name} is not heard of"
        if unheard
        else f"{run.name} waits for its first worker"
        if how is None
        else f"{run.name} waits: no worker trains",
        Phase.RUNNING: f"{run.name} trains with {workers.ready} of {workers.wanted} workers",
        Phase.SUSPENDED: f"{run.name} is suspended, and cannot go on"
        if claim_gone(status)
        else f"{run.name} is suspended, and {goes_on} when spec.suspend is false",
        Phase.COMPLETE: f"{run.name} is complete: the policy plays from the game's own start",
        Phase.FAILED: f"{run.name} has failed",
    }
    text = parts[status.phase]
    if where is not None and how is not None:
        at = f"frame {where.start_frame} of {where.demo_frames}"
        at = at if where.start_frame else "the game's own start"
        text += f"; the start stands at {at} after {how.frames:,} frames"
        if status.phase is Phase.RUNNING and how.frames_per_second:
            text += f", {how.frames_per_second:,.0f} a second"
    return text + "."


def _lost(status: RunStatus, now: datetime) -> str | None:
    recent = [
        one
        for one in status.attempts
        if (now - one.ended).total_seconds() < 3600 and one.cause not in NO_LOSS
    ]
    if not recent:
        return None
    last: Attempt = recent[-1]
    minutes = (now - last.ended).total_seconds() / 60
    count = "A worker was" if len(recent) == 1 else f"{len(recent)} workers were"
    message = f": {last.message}" if last.message else ""
    text = (
        f"{count} lost in the last hour, the latest {minutes:.0f} min ago "
        f"({last.pod}, {last.cause}{message})."
    )
    if last.recovery_seconds is not None:
        text += f" The run learned again {last.recovery_seconds:.0f} s later"
        if last.resumed_from is not None:
            text += f", from update {last.resumed_from}: {last.lost_frames:,} frames lost"
        text += "."
    return text
