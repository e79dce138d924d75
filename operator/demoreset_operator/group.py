"""Which pods a run needs, and which it must give back."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from demoreset_api.status import Place, RunStatus
from demoreset_operator import pods, render
from demoreset_operator.ending import NO_ROOM
from demoreset_operator.hang import late
from demoreset_operator.observation import HOPELESS_REASONS, Json, Observation, Pod
from demoreset_operator.pods import Wanted
from demoreset_operator.render import Settings

COORDINATOR_REST = timedelta(seconds=10)  # at least, from one that ends to the next


@dataclass
class Changes:
    """Pods to make and to delete; and one as the run says now, where some go for it."""

    create: list[Json] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    trial: Json | None = None


def outdated(seen: Observation, wanted: Wanted) -> list[Pod]:
    """Workers that are to go: of another template, or of a place that is no longer wanted."""
    count = seen.run.spec.workers.max
    return [pod for pod in seen.workers if pod.hash != wanted.worker or pod.index >= count]


def change(
    seen: Observation,
    status: RunStatus,
    settings: Settings,
    wanted: Wanted,
    now: datetime,
) -> Changes:
    """What brings the group to its wanted size and template.

    Args:
        seen: The run and its pods.
        status: With all pods that ended recorded.
        settings: The operator's.
        wanted: What pods are to be made of.
        now: The time.
    """
    run, changes = seen.run, _coordinate(seen, settings, wanted, now)
    # What is learned has changed: members with different rules must not meet in one group. All
    # leave, the last one saves, and the new ones go on from there.
    others = [pod for pod in seen.workers if pod.config != wanted.config and pod.present(now)]
    if others:
        if not seen.unfit:  # else they stay, and none is made beside them
            changes.delete += [pod.name for pod in others if not pod.deleting]
            changes.trial = pods.worker(run, settings, 0, 0)
        return changes
    live: dict[int, Pod] = {}
    places = {place.worker: place for place in status.places}
    for pod in sorted(seen.workers, key=lambda pod: pod.attempt):
        if not pod.live:
            continue
        place = places.get(pod.index)
        over = place is not None and pod.attempt <= place.ended  # it is recorded so: it hung
        if over or pod.index in live or pod.index >= run.spec.workers.max:
            changes.delete.append(pod.name)
        else:
            live[pod.index] = pod
    stale = [] if seen.unfit else _roll(seen, status, wanted, live, now)
    changes.trial = pods.worker(run, settings, stale[0], 0) if stale else None
    changes.delete += [live.pop(index).name for index in stale]
    together = render.one_node(run, seen.children)
    for index in range(run.spec.workers.max):
        place = places.get(index)
        if index in live:
            continue
        latest = _latest(seen, index)
        waits = place is not None and place.not_before is not None and now < place.not_before
        if waits and (latest is None or latest.hash == wanted.worker):  # else it was corrected
            continue
        attempt = 1 + max(one.attempt if one is not None else 0 for one in (place, latest))
        changes.create.append(pods.worker(run, settings, index, attempt, together=together))
    changes.delete += _surplus(seen)
    return changes


def _coordinate(seen: Observation, settings: Settings, wanted: Wanted, now: datetime) -> Changes:
    """One coordinator, made as the run says now; the old one goes when the new one runs."""
    if (until := coordinator_due(seen)) is not None and now < until:
        return Changes()
    live = [pod for pod in seen.coordinators if pod.live]
    right = max((pod for pod in live if pod.hash == wanted.coordinator), key=_attempt, default=None)
    ready = right is not None and right.ready
    delete = [
        pod.name
        for pod in seen.coordinators
        if not pod.deleting and pod is not right and (ready or not pod.live)
    ]
    if right is not None:
        return Changes(delete=delete)
    attempt = max(map(_attempt, seen.coordinators), default=0) + 1
    return Changes([pods.coordinator(seen.run, settings, attempt)], delete)


def _latest(seen: Observation, index: int) -> Pod | None:
    """A worker's latest pod that is still there."""
    its = [pod for pod in seen.workers if pod.index == index]
    return max(its, key=lambda pod: pod.attempt, default=None)


def coordinator_due(seen: Observation) -> datetime | None:
    """When a coordinator may take the place of one that has ended; None where that is at once.

    A kubelet that refuses a pod does so within a second, and would refuse the next one.
    """
    newest = max(seen.coordinators, key=_attempt, default=None)
    if newest is None or not newest.ended or newest.scheduled is None:
        return None
    return newest.scheduled + COORDINATOR_REST


def _roll(
    seen: Observation,
    status: RunStatus,
    wanted: Wanted,
    live: dict[int, Pod],
    now: datetime,
) -> list[int]:
    """Whose pods of another template go now: one at a time, while all the others train."""
    stale = [index for index, pod in live.items() if pod.hash != wanted.worker]
    heard, training = seen.heard(now), seen.training(now)
    answers = {index: heard[pod.name] for index, pod in live.items() if pod.name in heard}
    # Who does not run, has loaded nothing yet, or sits out, has nothing to lose.
    idle = [
        index
        for index in stale
        if live[index].phase != "Running"
        or (index in answers and not answers[index].status.update)
        or seen.aside(live[index])
    ]
    # Nor have those who all answer, and all stand still; with one of the new template among them
    # they may be waiting for it, and hold what was learned.
    if not idle and not training and len(stale) == len(answers) == len(live):
        tried = (_latest(seen, index) for index in set(range(seen.run.spec.workers.max)) - {*live})
        if not any(pod is not None and pod.hash == wanted.worker for pod in tried):
            idle = stale  # where the new template has just ended one, the others keep the old one
    if idle or not stale:
        return idle
    lost = gained = 0
    places = {place.worker: place for place in status.places}
    for index in range(seen.run.spec.workers.max):
        pod = live.get(index)
        place = places.get(index) or Place(worker=index)
        if pod is not None and pod.name in training:
            gained += not place.ran and pod.hash == wanted.worker
        elif seen.refused if pod is None else pod.reason in NO_ROOM or seen.aside(pod):
            lost += place.replaced
        elif place.replaced or _comes(pod, now):
            return []
    # Where there is room for some, another may have taken the place of the one that was replaced.
    # Where there is none for this template, it costs no second worker, however often it is changed;
    # nor where those of this template sit out.
    return [] if lost > gained else [max(stale)]  # the first worker, which writes, comes last


def _comes(pod: Pod | None, now: datetime) -> bool:
    """Whether a worker that does not train is on its way; not one whose volume does not come."""
    return pod is None or pod.reason in HOPELESS_REASONS or not late(pod, now)


def _surplus(seen: Observation) -> list[str]:
    """Pods that have ended, but each worker's latest, which is kept for its log."""
    ended, count = [pod for pod in seen.workers if pod.ended], seen.run.spec.workers.max
    latest: dict[int, int] = {}
    for pod in ended:
        latest[pod.index] = max(latest.get(pod.index, 0), pod.attempt)
    return [
        pod.name
        for pod in ended
        if not pod.deleting
        and (pod.index >= count or pod.attempt < latest[pod.index] or pod.lingers)
    ]


def give_back(seen: Observation, now: datetime) -> Changes:
    """All pods given back; the coordinator last, for those who leave need it."""
    changes = Changes()
    workers = [pod for pod in seen.workers if pod.present(now)]
    changes.delete += [pod.name for pod in workers if not pod.deleting]
    changes.delete += [pod.name for pod in seen.workers if pod.lingers]
    if not workers:
        changes.delete += [pod.name for pod in seen.coordinators if not pod.deleting]
    return changes


def _attempt(pod: Pod) -> int:
    return pod.attempt
