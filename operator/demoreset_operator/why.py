"""What is happening to a run, and what to do: a paragraph, from its status alone."""

from datetime import datetime

from demoreset_api.names import MANAGER
from demoreset_api.status import Attempt, Condition, ConditionType, Phase, RunStatus
from demoreset_operator.causes import NO_LOSS
from demoreset_operator.observation import Run

IMAGE = "Correct spec.workers.image or imagePullSecrets."
CONTAINER = "The node cannot begin the container: mend what the message names."
DO = {
    "RestartLimit": "Read the log of that pod (`kubectl demoreset logs {name} --pod POD`); mend "
    "it; `kubectl demoreset branch {name} NEW` goes on from its checkpoints.",
    "WrongRun": "Correct what the message names, delete the run and apply it anew.",
    "BudgetSpent": "Go on with more: `kubectl demoreset branch {name} NEW --set "
    "spec.budget.frames=...`.",
    "NoValidCheckpoint": "Look at the volume (`kubectl demoreset checkpoints {name}`): none is "
    "whole, and all were left as they are.",
    "NoProgress": "Where its loss is not finite, branch with a lower learning rate: `kubectl "
    "demoreset branch {name} NEW --set spec.ppo.learningRate=1e-4`; else read that pod's log.",
    "Unschedulable": "Give it fewer gpus or resources, another nodeSelector, or wait for a node; "
    "where the message names a claim, see that it can be bound (`kubectl describe pvc`).",
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
    "ErrImageNeverPull": "The image must be on the nodes, or imagePullPolicy another one.",
    "Refused": "Mend what the message names; the operator tries again by itself.",
    "NotUnderstood": "Upgrade the operator, or leave that field out.",
    "VolumeLost": "Delete it and apply it anew, to begin from the start.",
    "NoUpdates": "Look at the log (`kubectl demoreset logs {name}`). Where nothing else is waited "
    "for, one worker is replaced by itself, and where its threads stood kept in hangs/ on the "
    "volume. One that sits out comes back when data reaches it quickly; keep the run to nodes that "
    "are near one another (spec.workers.nodeSelector), or lower spec.workers.min.",
    "Plateau": "Film it where it stands (`kubectl demoreset fetch {name}`, then `demoreset video "
    "runs/{name} --from FRAME`), then branch from a checkpoint with other settings.",
    "NotWritten": "Make room on the volume, or see why it is away; training goes on meanwhile.",
}


def why(run: Run, now: datetime) -> str:
    """The paragraph that says what is happening to a run, and what to do.

    Args:
        run: As the API server has it.
        now: The time.
    """
    status = run.status
    sentences = [_stands(run, status)]
    if run.generation > status.observed_generation and not run.deleting:
        sentences.append(_unseen(run))
    for found in status.conditions:
        if _speaks(found, status):
            sentences.append(f"{found.reason}: {found.message.rstrip('.')}.")
            words = (found.reason, *found.message.split(": "))  # of a worker that is lacking, too
            if (word := next((word for word in words if word in DO), None)) is not None:
                sentences.append(DO[word].format(name=run.name))
    if (lost := _lost(status, now)) is not None:
        sentences.append(lost)
    return " ".join(sentences)


def _speaks(found: Condition, status: RunStatus) -> bool:
    """Whether a condition is worth a sentence now."""
    match found.type:
        case ConditionType.FAILED | ConditionType.STALLED:
            return found.status == "True"
        case ConditionType.CHECKPOINT_READY:
            return found.status == "False"
        case ConditionType.RUNNING:
            well = found.reason == "Training" and status.workers.ready == status.workers.wanted
            return status.phase is Phase.PENDING or (status.phase is Phase.RUNNING and not well)
    return False


def _unseen(run: Run) -> str:
    if run.spec.managed_by not in (None, MANAGER):
        return f"It is {run.spec.managed_by}'s to look after (spec.managedBy)."
    which = "its latest change" if run.status.observed_generation else "it"
    return (
        f"No operator has looked at {which} yet. Where this lasts, see whether one runs and "
        "watches this namespace: `kubectl get pods --all-namespaces --selector "
        "app.kubernetes.io/name=demoreset,app.kubernetes.io/component=operator`, and its log."
    )


def _stands(run: Run, status: RunStatus) -> str:
    workers, where, how = status.workers, status.curriculum, status.training
    parts = {
        Phase.PENDING: f"{run.name} waits for its first worker"
        if how is None
        else f"{run.name} waits: no worker trains",
        Phase.RUNNING: f"{run.name} trains with {workers.ready} of {workers.wanted} workers",
        Phase.SUSPENDED: f"{run.name} is suspended, and goes on from its checkpoint when "
        "spec.suspend is false",
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
