"""What is to be done for a run: an observation and the time in, a plan out. Pure.

    observe ──▶ ledger: what ended ──▶ ending: over? ──▶ group: pods ──▶ story: what is told

Of a plan the status goes first, so that what the operator must not forget is written before
anything follows from it. Only pods that replace others at no cost (`pods_first`) are made before.
What is told to people goes after the pods.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from demoreset_api.names import ANNOTATION_HASH
from demoreset_api.spec import After
from demoreset_api.status import Attempt, Cause, ConditionType, RunStatus
from demoreset_operator import pods, render, story
from demoreset_operator.causes import COUNTED_CAUSES, FINAL_CAUSES
from demoreset_operator.ending import ANEW, Ending, confirmed, deadlines, ending, go_on
from demoreset_operator.group import Changes, change, coordinator_due, give_back, outdated
from demoreset_operator.hang import hung
from demoreset_operator.ledger import Loss, record, regained
from demoreset_operator.observation import Json, Observation, Run
from demoreset_operator.pods import Wanted
from demoreset_operator.reasons import Happened, Reason
from demoreset_operator.render import Settings

WARNINGS = (ConditionType.FAILED, ConditionType.STALLED)
FAREWELL = timedelta(seconds=30)  # for workers of a complete run to end by themselves


@dataclass(frozen=True)
class Event:
    """An event, as `kubectl describe` shows it."""

    type: str  # Normal, Warning
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    status: None where there is nothing to tell. pods_first: whether `create_pods` may be made
    before it is written. delete_pods: by name, before those that take their place. trial: a pod as
    the run says now, for which some of them go: they stay where the API server would refuse it.
    delete_children: by kind and name. losses: ends that the status has and had not. again: when to
    look again, if nothing happens before.
    """

    status: RunStatus | None = None
    pods_first: bool = False
    apply_children: list[Json] = field(default_factory=list)
    delete_pods: list[str] = field(default_factory=list)
    create_pods: list[Json] = field(default_factory=list)
    trial: Json | None = None
    delete_children: list[tuple[str, str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    losses: list[Attempt] = field(default_factory=list)
    delete_run: bool = False
    again: datetime | None = None


def decide(seen: Observation, settings: Settings, now: datetime) -> Plan:
    """What brings a run closer to what its spec wants."""
    run = seen.run
    if run.deleting or not run.ours:
        return Plan()
    if story.over(run.status):
        return _after(seen, now)
    wanted = pods.wanted(run, settings)
    leaves = {pod.name for pod in outdated(seen, wanted)}
    leaving = run.spec.suspend or any(
        pod.live and pod.config != wanted.config for pod in seen.workers
    )
    still = {} if leaving else hung(seen, now)
    status, losses = record(seen, now, outdated=leaves, config=wanted.config, hung=still)
    status = _times(seen, status, now)
    status, back = regained(status, [seen.answers[name] for name in seen.training(now)])
    status = story.progress(seen, status, now)
    end = ending(seen, status, losses, now)
    if end is not None:
        return _end(seen, status, end, losses, now)
    apply: list[Json] = []
    delete: list[tuple[str, str]] = []
    if run.spec.suspend:
        changes = give_back(seen, now)
    else:
        apply, delete = _children(seen, settings, wanted, now)
        changes = change(seen, status, settings, wanted, now)
    status = story.conditions(seen, status, now)
    nothing_else = not (apply or delete or changes.delete)
    return Plan(
        status=_if_new(run, status),
        pods_first=nothing_else and bool(changes.create) and _may_go_first(run, losses),
        apply_children=apply,
        delete_pods=changes.delete,
        create_pods=changes.create,
        trial=changes.trial,
        delete_children=delete,
        events=_events(run, status, losses) + _recovered(back),
        losses=[loss.attempt for loss in losses],
        again=_again(seen, status, now),
    )


def _end(
    seen: Observation, status: RunStatus, end: Ending, losses: list[Loss], now: datetime
) -> Plan:
    """The run is over: say so, and begin to give its pods back."""
    run, generation = seen.run, seen.run.generation
    status = story.put(status, end.type, True, end.reason, end.message, now, generation)
    over = "the run is over"
    status = story.put(status, ConditionType.RUNNING, False, end.reason, over, now, generation)
    status = status.model_copy(update={"finished": now.replace(microsecond=0)})
    status = story.last(seen, status, now)
    after = _after(replace(seen, run=replace(run, status=status)), now)
    return replace(
        after,
        status=_if_new(run, status),
        events=_events(run, status, losses),
        losses=[loss.attempt for loss in losses],
    )


def _times(seen: Observation, status: RunStatus, now: datetime) -> RunStatus:
    """The status with when the run became active, and when its first worker began since."""
    if seen.run.spec.suspend:
        return status.model_copy(update={"active_since": None, "begun": None})
    new = not seen.run.status.observed_generation  # then all its pods are of this start
    there = [pod.scheduled for pod in seen.pods if new and pod.scheduled is not None]
    start = min([now, *there]).replace(microsecond=0)
    since = status.active_since or start
    begun = [
        pod.started
        for pod in seen.workers
        if pod.started is not None and (pod.live or new or pod.started >= since)
    ]
    return status.model_copy(
        update={
            "started": status.started or start,
            "active_since": since,
            "begun": status.begun or min(begun, default=None),
        }
    )


def _may_go_first(run: Run, losses: list[Loss]) -> bool:
    """Whether all that was lost may be replaced before it is told.

    No limit counts it, and the status knows the attempt: an operator that dies in between finds it
    again.
    """
    known = {place.worker: place.attempt for place in run.status.places}
    lost = [loss.attempt for loss in losses]
    return bool(lost) and all(
        one.cause not in COUNTED_CAUSES and one.attempt <= known.get(one.worker, 0) for one in lost
    )


def _if_new(run: Run, status: RunStatus) -> RunStatus | None:
    """The status, if it says anything new."""
    status = status.model_copy(
        update={"observed_generation": run.generation, "phase": story.phase(status)}
    )
    return None if status == run.status else status


def _children(
    seen: Observation, settings: Settings, wanted: Wanted, now: datetime
) -> tuple[list[Json], list[tuple[str, str]]]:
    """Objects that are missing or other than wanted; and those that nobody needs any more."""
    right = {
        (one["kind"], one["metadata"]["name"]): one for one in render.children(seen.run, settings)
    }
    known = {(child.kind, child.name): child for child in seen.children}
    apply = []
    for key, one in right.items():
        child = known.get(key)
        if child is None or child.hash != one["metadata"]["annotations"][ANNOTATION_HASH]:
            if child is not None and (child.deleting or child.kind == "PersistentVolumeClaim"):
                continue  # what a claim asks for cannot be changed
            apply.append(one)
    used = {pod.config for pod in seen.workers if pod.present(now)}
    delete = [
        key
        for key, child in known.items()
        if key not in right
        and not child.deleting
        and child.kind != "PersistentVolumeClaim"
        and used <= {wanted.config}
    ]
    return apply, delete


def _after(seen: Observation, now: datetime) -> Plan:
    """A run that is over gives its pods back, and is deleted when its time has come."""
    run, status = seen.run, seen.run.status
    finished = status.finished or now
    complete = story.holds(status, ConditionType.COMPLETE)
    waits = complete and now < finished + FAREWELL and any(pod.live for pod in seen.workers)
    changes = Changes() if waits else give_back(seen, now)
    times = [finished + FAREWELL] if waits else []
    ttl = run.spec.ttl_seconds_after_finished
    due = finished + timedelta(seconds=ttl) if ttl is not None else None
    if due is not None and now < due:
        times.append(due)
    return Plan(
        status=_if_new(run, story.last(seen, status, now)),
        delete_pods=changes.delete,
        events=[_in_vain(run)] if run.generation > status.observed_generation else [],
        delete_run=due is not None and now >= due,
        again=min(times, default=None),
    )


def _events(run: Run, status: RunStatus, losses: list[Loss]) -> list[Event]:
    """What has happened, for people."""
    events = []
    for loss in losses:
        attempt = loss.attempt
        if attempt.cause is Cause.DONE:
            continue
        goes_on = loss.wait and attempt.cause not in FINAL_CAUSES
        then = f"; the next one in {loss.wait:g} s" if goes_on else ""
        how = attempt.message or attempt.cause
        message = f"worker {attempt.worker} ({attempt.pod}): {how}{then}"
        kind = "Warning" if attempt.counts else "Normal"
        events.append(Event(kind, f"Worker{attempt.cause}", message))
    names = {
        ConditionType.RUNNING: Happened.TRAINING_STARTED,
        ConditionType.STALLED: Happened.STALLED,
    }
    for one in story.news(run.status, status):
        warns = one.type in WARNINGS or one.reason in story.TROUBLE
        name = names.get(one.type, one.reason) if one.status == "True" else one.reason
        events.append(Event("Warning" if warns else "Normal", name, one.message))
    return events + _plays_on(run, status)


def _plays_on(run: Run, status: RunStatus) -> list[Event]:
    """The event that the goal is met of a run that plays on: one that stops is complete."""
    goal = run.spec.goal
    how = confirmed(goal, status) if goal.after is After.PLAY_ON else ""
    if not how or confirmed(goal, run.status):
        return []
    return [Event("Normal", Reason.GOAL_MET, f"{how}; it plays on")]


def _in_vain(run: Run) -> Event:
    """The event that says that a change to a run that is over changes nothing, but for one field.

    What was changed is not known: it may be that field alone.
    """
    message = (
        "the run is over: a changed spec.ttlSecondsAfterFinished counts; all else needs a new run"
    )
    lost = story.failed(run.status) == Reason.VOLUME_LOST
    then = f"Its checkpoints are gone: {ANEW}." if lost else go_on(run)
    return Event("Warning", Happened.RUN_IS_OVER, f"{message}. {then}")


def _recovered(back: list[Attempt]) -> list[Event]:
    """The event that the run learns again; after several losses at once, since the first one."""
    if not back:
        return []
    lost = max(back, key=lambda attempt: attempt.recovery_seconds or 0.0)
    ended = "ended" if lost.found is not None else "was found to have ended"
    message = f"the run learns on {lost.recovery_seconds:.1f} s after {lost.pod} {ended}"
    if lost.resumed_from is not None:
        message += (
            f", from the checkpoint of update {lost.resumed_from}: {lost.lost_frames:,} frames are "
            "learned again"
        )
    return [Event("Normal", Happened.RECOVERED, message)]


def _again(seen: Observation, status: RunStatus, now: datetime) -> datetime | None:
    times = [place.not_before for place in status.places if place.not_before is not None]
    times += deadlines(seen, status)
    if (due := coordinator_due(seen)) is not None:
        times.append(due)
    return min((time for time in times if time > now), default=None)
