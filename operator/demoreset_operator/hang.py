"""Which worker is replaced where a group stands still: by its step counter, and nothing else.

A member whose loop stands still is its worker's business, and a worker that does not answer the
kubelet's. What is left is a group whose members all move, and do no update: a node that others
cannot reach, an emulator that never ends an episode, a fault of ours.
"""

from datetime import datetime, timedelta

from demoreset_operator.observation import Observation, Pod
from demoreset_operator.said import Told

NEVER = timedelta(minutes=10)  # without a first update, while others stand still


def hung(seen: Observation, now: datetime) -> dict[str, str]:
    """The pod that is to be replaced, with why; nothing where none is.

    One at a time, for the others hold what was learned; the one furthest behind is the likeliest to
    hold the others up. Nobody is replaced while there is another reason to wait: for pods that are
    about to come, for a coordinator, for as many as train at least.
    """
    workers = [pod for pod in seen.workers if pod.live]
    told = {pod.name: seen.told[pod.name] for pod in workers if pod.name in seen.told}
    heard = [pod for pod in workers if pod.name in told and now <= told[pod.name].until]
    if len(heard) < seen.run.spec.workers.min or _comes(seen, heard):
        return {}
    since = {pod.name: now - told[pod.name].moved for pod in heard}
    still = [pod for pod in heard if since[pod.name] > _patience(told[pod.name])]
    if not any(told[pod.name].said.update for pod in still):
        return {}
    chosen = min(still, key=lambda pod: (told[pod.name].said.update or 0, -(pod.worker or 0)))
    seconds = since[chosen.name].total_seconds()
    return {
        chosen.name: f"no update for {seconds:.0f} s; where its threads stood is in hangs/ on the "
        "volume"
    }


def _comes(seen: Observation, heard: list[Pod]) -> bool:
    """Whether a pod is on its way that the others may be waiting for."""
    waited = [
        pod
        for pod in seen.pods
        if pod.live and pod.reason != "Unschedulable" and pod.worker is not None
    ]
    coordinated = any(pod.live and pod.phase == "Running" for pod in seen.coordinators)
    return len(waited) > len(heard) or not coordinated


def _patience(told: Told) -> timedelta:
    return told.patience if told.said.update else NEVER
