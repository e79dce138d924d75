"""What became of each worker's pods: recorded once, before anything follows from it.

A pod is known by its worker and its attempt. Attempts only grow; those up to `Place.ended` are
recorded. So it does not matter how often this runs, nor when the operator was away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, reduce
from typing import Any

from demoreset_api.spec import Restart
from demoreset_api.status import (
    KEPT_ATTEMPTS,
    MAX_MESSAGE,
    Attempt,
    Cause,
    Place,
    Restarts,
    RunStatus,
)
from demoreset_operator.causes import FINAL_CAUSES, NO_LOSS, OWN_CAUSES, Verdict, verdict
from demoreset_operator.observation import LOAD, Observation, Pod
from demoreset_operator.pods import worker_name
from demoreset_operator.worker_status import Answer

BACK_OFF_RESET = timedelta(seconds=60)  # who ran for so long was not in vain: nobody need wait


@dataclass(frozen=True)
class Loss:
    """A worker's pod that has ended, newly recorded."""

    attempt: Attempt
    wait: float  # seconds until the next


def record(
    seen: Observation, now: datetime, *, outdated: set[str], config: str, hung: Mapping[str, str]
) -> tuple[RunStatus, list[Loss]]:
    """The status with all that ended since; and what that was.

    Args:
        seen: The run and its pods.
        now: The time.
        outdated: Names of pods that the operator replaces, or takes away: they do not fail.
        config: What workers are to learn now; what one that learned otherwise ended with says
            nothing of it.
        hung: Names of pods that do not go on, with why: recorded as ended, then ended by `group`.
    """
    status, judge = seen.run.status, _Judge(seen, now, outdated, config, hung)
    places = {place.worker: place for place in status.places}
    pods: dict[int, dict[int, Pod]] = {index: {} for index in range(seen.run.spec.workers.max)}
    for pod in seen.workers:
        if pod.index in pods:
            pods[pod.index][pod.attempt] = pod
    losses: list[Loss] = []
    for index, its in pods.items():
        place, found = judge.follow(places.get(index) or Place(worker=index), its)
        losses += found
        latest = max([place.attempt, *its])
        if latest > place.attempt:  # what was waited for is there
            waits = place.not_before if latest <= place.ended else None
            place = place.model_copy(update={"attempt": latest, "not_before": waits})
        places[index] = place
    for index in set(places) - set(pods):  # of a larger group; names must not come again
        gone = max([places[index].attempt, *(p.attempt for p in seen.workers if p.index == index)])
        places[index] = Place(worker=index, attempt=gone, ended=gone)
    attempts = [*status.attempts, *(loss.attempt for loss in losses)]
    changes = {
        "places": [places[index] for index in sorted(places) if places[index].attempt],
        "attempts": attempts[-KEPT_ATTEMPTS:],
        "restarts": reduce(_count, losses, status.restarts),
    }
    return status.model_copy(update=changes), losses


def _count(restarts: Restarts, loss: Loss) -> Restarts:
    """How often workers were started again, with one more that ended."""
    one = loss.attempt
    if one.cause in NO_LOSS:
        return restarts
    return Restarts(
        total=restarts.total + 1,
        counted=restarts.counted + one.counts,
        out_of_memory=restarts.out_of_memory + (one.counts and one.cause is Cause.OUT_OF_MEMORY),
        hung=restarts.hung + (one.counts and one.cause is Cause.HUNG),
    )


def regained(status: RunStatus, answers: Sequence[Answer]) -> tuple[RunStatus, list[Attempt]]:
    """The status with what it took until the run learned again; the attempts that this ends.

    Args:
        status: With all that ended.
        answers: Of the workers that train now.
    """
    active = status.active_since
    attempts = [
        _regained(lost, answers) if active is not None and lost.found_at >= active else lost
        for lost in status.attempts
    ]
    news = [new for new, old in zip(attempts, status.attempts, strict=True) if new is not old]
    return (status.model_copy(update={"attempts": attempts}) if news else status), news


def _regained(lost: Attempt, answers: Sequence[Answer]) -> Attempt:
    """An attempt, with how the run went on after it, if any answer tells that it did."""
    if lost.recovery_seconds is not None or lost.cause in NO_LOSS:
        return lost
    if lost.update is not None and not lost.life:  # of a version that did not tell it
        return lost
    first = min((one for one in answers if _goes_on(one, lost)), key=_moved, default=None)
    if first is None:
        return lost
    found: dict[str, Any] = {
        "recovery_seconds": round((first.moved - lost.ended).total_seconds(), 1),
        "lost_frames": 0,
    }
    resumed = first.status.resumed
    # Else others went on: among members, and maybe with a checkpoint of theirs later.
    nobody_did = resumed.life is not None and resumed.life <= (lost.life or 0)
    if lost.life and first.status.life > lost.life and nobody_did:
        found["resumed_from"] = resumed.update
        found["lost_frames"] = max(0, (lost.frames or 0) - resumed.frames)
    return lost.model_copy(update=found)


def _goes_on(answer: Answer, lost: Attempt) -> bool:
    """Whether this tells of an update that was done after the loss.

    What was known at the time was seconds old. So in the same life two answers count, both of them
    from after the loss, and the second with another update.
    """
    if answer.status.life > (lost.life or 0):
        return answer.moved > lost.found_at
    same = answer.status.life == (lost.life or 0)
    return same and answer.before is not None and answer.before > lost.found_at


def _moved(answer: Answer) -> datetime:
    return answer.moved


@dataclass(frozen=True)
class _Judge:
    """What an end is judged by: see `record`."""

    seen: Observation
    now: datetime
    outdated: set[str]
    config: str
    hung: Mapping[str, str]

    @cached_property
    def training(self) -> set[str]:
        """Names of pods that train."""
        return self.seen.training(self.now)

    @cached_property
    def stood(self) -> tuple[int | None, int | None, int | None]:
        """Life, update and frames of the run, as far as they were told: the status may lag."""
        known = [
            (one.status.life, one.status.update, one.status.frames)
            for one in self.seen.answers.values()
            if one.status.update
        ]
        if (training := self.seen.run.status.training) is not None:
            known.append((training.life, training.update, training.frames))
        return max(known, default=(None, None, None))

    def follow(self, place: Place, pods: Mapping[int, Pod]) -> tuple[Place, list[Loss]]:
        """A worker's place with all of its ends that are not recorded yet; those that are losses.

        Args:
            place: As it was.
            pods: Its pods, by their attempts; one that is not there was deleted.
        """
        losses = []
        for number in sorted({*pods, *range(place.ended + 1, place.attempt + 1)}):
            pod = pods.get(number)
            if number <= place.ended:
                continue
            if pod is not None and pod.live and pod.name not in self.hung:
                if place.failures and _ran(pod, self.now) > BACK_OFF_RESET:
                    place = place.model_copy(update={"failures": 0})
                continue
            why, place = self.why(pod, number, place)
            if why is not None:
                wait = (place.not_before - self.now).total_seconds() if place.not_before else 0.0
                losses.append(Loss(self.attempt(pod, place.worker, number, why), wait))
            place = place.model_copy(update={"ended": number})
        return place, losses

    def why(self, pod: Pod | None, number: int, place: Place) -> tuple[Verdict | None, Place]:
        """Why it ended, None where nobody need be told; and when the next may start."""
        run = self.seen.run
        if pod is None:
            why = Verdict(Cause.DELETED, "the pod was deleted")
        elif pod.name in self.hung:
            why = Verdict(Cause.HUNG, self.hung[pod.name])
        else:
            why = verdict(pod)
        name = pod.name if pod is not None else worker_name(run, place.worker, number)
        began = pod is not None and pod.started is not None
        if began:
            place = place.model_copy(update={"ran": True, "replaced": False})
        at_ease = place.model_copy(update={"failures": 0, "not_before": None})
        left = why.cause in (Cause.DELETED, Cause.DRAINED)
        if run.spec.suspend and left:
            return None, at_ease
        over = why.cause in (Cause.DONE, *FINAL_CAUSES)
        past = over and pod is not None and pod.config != self.config
        if past or (left and name in self.outdated | self.seen.deleted):
            why = Verdict(Cause.REPLACED, "replaced by one that is as the spec says now")
            return why, at_ease.model_copy(update={"replaced": place.replaced or began})
        if why.cause in OWN_CAUSES and self.others_go_on(pod):
            why = Verdict(Cause.CRASHED, why.message)
        ran_long = pod is not None and _ran(pod, self.now) > BACK_OFF_RESET
        failures = 1 if ran_long else place.failures + 1
        wait = timedelta(seconds=back_off(failures, run.spec.restart))
        not_before = self.now + wait if wait else None
        return why, place.model_copy(update={"failures": failures, "not_before": not_before})

    def others_go_on(self, pod: Pod | None) -> bool:
        """Whether others train, or run and may yet: then it is not the run that ends like this one.

        Who last ended like this as well may do so again.
        """
        code = pod.exit_code if pod is not None else None
        latest = {one.worker: one.exit_code for one in self.seen.run.status.attempts}
        return bool(self.training) or any(
            other.live and other.started is not None and latest.get(other.index) != code
            for other in self.seen.workers
        )

    @cached_property
    def unheard(self) -> set[str]:
        """Who has run for so long that it may well train, and cannot be asked."""
        heard = self.seen.heard(self.now)
        return {
            pod.name
            for pod in self.seen.workers
            if pod.live and pod.name not in heard and _ran(pod, self.now) > LOAD
        }

    def attempt(self, pod: Pod | None, index: int, number: int, why: Verdict) -> Attempt:
        """What is kept of an end."""
        life, update, frames = self.stood
        # While others learn it is not the run that fails, but a node, or an image that is new:
        # limits end runs that do not get on.
        others = self.training | self.unheard
        if pod is not None:
            others -= {pod.name}
        ended = pod.ended_at if pod is not None and pod.name not in self.hung else None
        if ended is not None and ended > self.now:  # a node's clock is another one
            ended = None
        return Attempt(
            worker=index,
            attempt=number,
            pod=pod.name if pod is not None else worker_name(self.seen.run, index, number),
            node=pod.node if pod is not None else None,
            cause=why.cause,
            counts=why.counts and not others,
            exit_code=pod.exit_code if pod is not None else None,
            message=why.message[:MAX_MESSAGE],
            update=update,
            frames=frames,
            life=life,
            started=pod.started if pod is not None else None,
            ended=ended or self.now,
            found=self.now if ended is not None else None,
        )


def _ran(pod: Pod, now: datetime) -> timedelta:
    """For how long its container has run.

    Its node tells both ends of that, by its own clock. One that still runs has only begun by it,
    and the clock may be behind ours: it cannot have run for longer than it is on that node.
    """
    if pod.started is None:
        return timedelta(0)
    if pod.finished is not None:
        return pod.finished - pod.started
    return now - max(pod.started, pod.scheduled or pod.started)


def back_off(failures: int, limits: Restart) -> float:
    """Seconds until the next try: none after the first failure, then doubling."""
    if failures < 2:
        return 0.0
    return min(limits.back_off_seconds * 2.0 ** min(failures - 2, 30), limits.max_back_off_seconds)
