"""Which worker is replaced where a group stands still: by its step counter, and nothing else.

A member whose loop stands still is its worker's business, and a worker that does not answer the
kubelet's. What is left is a group whose members all move, and do no update: a node that others
cannot reach, an emulator that never ends an episode, a fault of ours.
"""

from datetime import datetime, timedelta

from demoreset_api.names import CONFIRM, QUORUM, STARTING
from demoreset_operator.ending import NO_ROOM
from demoreset_operator.observation import HOPELESS_REASONS, LOAD, Observation, Pod
from demoreset_operator.worker_status import Answer

NOT_COMING = (*NO_ROOM, *HOPELESS_REASONS)


def hung(seen: Observation, now: datetime) -> dict[str, str]:
    """The pod that is to be replaced, with why; nothing where none is.

    Nobody is, while there is another reason to wait: for a pod that comes or goes, for a
    coordinator, for as many as train at least, for the goal's episodes. Who sits out is none of the
    group, and knows by itself when to come back. When such a reason is over the time begins anew,
    and so it does after every loss: one is replaced at a time, for the others hold what was
    learned.
    """
    workers = [pod for pod in seen.workers if pod.live and not seen.aside(pod)]
    answers = {pod.name: seen.answers[pod.name] for pod in workers if pod.name in seen.answers}
    answering = seen.heard(now)
    heard = [pod for pod in workers if pod.name in answering]
    since = _since(seen, heard)
    if since is None or len(heard) < seen.run.spec.workers.min or _waits(seen, workers, heard, now):
        return {}
    still = [pod for pod in heard if not answers[pod.name].trains(now)]
    patience = LOAD if len(still) < len(heard) else _patience(list(answers.values()))
    standing = [
        pod
        for pod in still
        if answers[pod.name].at - max(since, answers[pod.name].moved) > patience
    ]
    if not standing:
        return {}
    chosen = min(standing, key=lambda pod: _suspicion(pod, answers[pod.name]))
    seconds = answers[chosen.name].stood.total_seconds()
    return {
        chosen.name: f"no update for {seconds:.0f} s; where its threads stood is in hangs/ on the "
        "volume, if it could say so"
    }


def _since(seen: Observation, heard: list[Pod]) -> datetime | None:
    """Since when all that training needs is there; None where it is not."""
    coordinator = [pod.started for pod in seen.coordinators if pod.live and not pod.reason]
    begun = [at for at in (*coordinator, *(pod.started for pod in heard)) if at is not None]
    if not any(coordinator):
        return None
    return max([*begun, *(attempt.found_at for attempt in seen.run.status.attempts)])


def _waits(seen: Observation, workers: list[Pod], heard: list[Pod], now: datetime) -> bool:
    """Whether the others may be waiting for somebody who comes, goes, or confirms the goal."""
    comes = [pod for pod in workers if pod.reason not in NOT_COMING and not late(pod, now)]
    goes = any(pod.deleting and pod.present(now) for pod in seen.workers)
    confirms = any(seen.answers[pod.name].status.phase == CONFIRM for pod in heard)
    return len(comes) > len(heard) or goes or confirms


def late(pod: Pod, now: datetime) -> bool:
    """Whether its node does not get it to run, as where another one has its volume."""
    waited = pod.scheduled is not None and now > pod.scheduled + LOAD
    return waited and pod.phase != "Running"


def _patience(answers: list[Answer]) -> timedelta:
    """How long the group may stand."""
    loads = any(not one.status.update or one.status.phase == STARTING for one in answers)
    return LOAD if loads else max(one.patience for one in answers)


def _suspicion(pod: Pod, answer: Answer) -> tuple[bool, int, int]:
    """Who waits for the others in a quorum comes last; then who is ahead, or was there first."""
    return answer.status.phase == QUORUM, answer.status.update or 0, -pod.index
