"""What became of each worker's pods: recorded once, before anything follows from it.

A pod is known by its worker and its attempt. Attempts only grow; those up to `Place.ended` are
recorded. So it does not matter how often this runs, nor when the operator was away.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from demoreset_api.spec import Restart
from demoreset_api.status import Attempt, Cause, Place, Restarts, RunStatus
from demoreset_operator.causes import Verdict, verdict
from demoreset_operator.observation import Observation, Pod
from demoreset_operator.render import worker_name

CALM = timedelta(seconds=60)  # a pod that ran for so long was not in vain
KEPT = 20  # attempts that the status shows


@dataclass(frozen=True)
class Loss:
    """A worker's pod that has ended, newly recorded."""

    attempt: Attempt
    wait: float  # seconds until the next


def record(seen: Observation, now: datetime, *, outdated: set[str]) -> tuple[RunStatus, list[Loss]]:
    """The status with all that ended since; and what that was.

    Args:
        seen: The run and its pods.
        now: The time.
        outdated: Names of pods that the operator replaces, or takes away: they do not fail.
    """
    run, status = seen.run, seen.run.status
    places = {place.worker: place for place in status.places}
    pods: dict[int, list[Pod]] = {index: [] for index in range(run.spec.workers.max)}
    for pod in seen.workers:
        if pod.worker in pods:
            pods[pod.worker].append(pod)
    attempts, restarts = list(status.attempts), status.restarts
    losses: list[Loss] = []
    for index, its in pods.items():
        place = places.get(index) or Place(worker=index)
        known = {pod.attempt: pod for pod in its}
        for number in sorted({*known, *range(place.ended + 1, place.attempt + 1)}):
            ended = known.get(number)
            if number <= place.ended or (ended is not None and ended.live):
                continue
            why, place = _judge(ended, place, now, run.spec.restart, outdated, seen)
            if why is not None:
                entry = _attempt(seen, ended, index, number, why, now)
                attempts.append(entry)
                restarts = Restarts(
                    total=restarts.total + 1, counted=restarts.counted + entry.counts
                )
                wait = (place.not_before - now).total_seconds() if place.not_before else 0.0
                losses.append(Loss(entry, wait))
            place = place.model_copy(update={"ended": number})
        latest = max([place.attempt, *known])
        if latest > place.attempt:  # what was waited for is there
            place = place.model_copy(
                update={
                    "attempt": latest,
                    "not_before": place.not_before if latest <= place.ended else None,
                }
            )
        places[index] = place
    kept = [places[index] for index in sorted(pods) if places[index].attempt]
    return (
        status.model_copy(
            update={"places": kept, "attempts": attempts[-KEPT:], "restarts": restarts}
        ),
        losses,
    )


def _judge(
    pod: Pod | None,
    place: Place,
    now: datetime,
    limits: Restart,
    outdated: set[str],
    seen: Observation,
) -> tuple[Verdict | None, Place]:
    """Why it ended, None where nobody need be told; and when the next may start."""
    why = verdict(pod) if pod is not None else Verdict(Cause.DELETED, "the pod was deleted")
    if seen.run.spec.suspend and why.cause in (Cause.DELETED, Cause.DRAINED):
        return None, place.model_copy(update={"failures": 0, "not_before": None})
    if pod is not None and pod.name in outdated and why.cause in (Cause.DELETED, Cause.DRAINED):
        said = "replaced by one that is made as the run's spec says now"
        return Verdict(Cause.REPLACED, said), place.model_copy(
            update={"failures": 0, "not_before": None}
        )
    ran = now - pod.started if pod is not None and pod.started else timedelta(0)
    failures = 1 if ran > CALM else place.failures + 1
    wait = back_off(failures, limits)
    return why, place.model_copy(
        update={
            "failures": failures,
            "not_before": now + timedelta(seconds=wait) if wait else None,
        }
    )


def back_off(failures: int, limits: Restart) -> float:
    """Seconds until the next try: none after the first failure, then doubling."""
    if failures < 2:
        return 0.0
    return min(limits.back_off_seconds * 2.0 ** min(failures - 2, 30), limits.max_back_off_seconds)


def _attempt(
    seen: Observation, pod: Pod | None, index: int, number: int, why: Verdict, now: datetime
) -> Attempt:
    training = seen.run.status.training
    return Attempt(
        worker=index,
        attempt=number,
        pod=pod.name if pod is not None else worker_name(seen.run, index, number),
        node=pod.node if pod is not None else None,
        cause=why.cause,
        counts=why.counts,
        exit_code=pod.exit_code if pod is not None else None,
        message=why.message,
        update=training.update if training is not None else None,
        started=pod.started if pod is not None else None,
        ended=now,
    )
