"""What is told of a run: progress, conditions, and one word for people."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Literal

from demoreset_api.errors import ExitCode
from demoreset_api.names import ASIDE, METRICS_PORT, STARTING
from demoreset_api.status import (
    MAX_MESSAGE,
    CheckpointStatus,
    Condition,
    ConditionType,
    CurriculumStatus,
    EvaluationStatus,
    Phase,
    RunStatus,
    TrainingStatus,
    WorkersStatus,
)
from demoreset_operator import render
from demoreset_operator.ending import lacks, speaks, unbound, volume_lost, waiting, who
from demoreset_operator.observation import UNANSWERED, Json, Observation, Pod
from demoreset_operator.reasons import Reason
from demoreset_operator.worker_status import Answer, read

TROUBLE = (Reason.TOO_FEW_WORKERS, Reason.UNREACHABLE, Reason.NOT_WRITTEN)
AWAITED = (*TROUBLE, Reason.RESUMED, Reason.REFUSED)  # that are told at once
MAX_TROUBLES = 3  # that are told at once
ALL_TRAIN = "all workers train"


def progress(seen: Observation, status: RunStatus, now: datetime) -> RunStatus:
    """The status with what the workers answered."""
    ready = ready_pods(seen, status, now)
    answers = [seen.answers[name] for name in seen.training(now)]
    first = max(answers, key=_update, default=None)
    farewells = _farewells(seen, status, now)
    latest = max((*answers, *farewells), key=_update, default=None)
    # Who ends with its run has seen the last checkpoint, whoever wrote that.
    writers = [*farewells, *(one for one in answers if one.status.rank == 0)]
    writer = max(writers, key=_update, default=None)
    live = [pod for pod in seen.workers if pod.live]
    wanted = 0 if seen.run.spec.suspend or over(status) else seen.run.spec.workers.max
    workers = WorkersStatus(
        wanted=wanted,
        current=len(live),
        ready=len(ready),
        shown=f"{len(ready)}/{wanted}",
        selector=render.selector(seen.run),
        members=first.status.world_size if first and ready else 0,
        generation=first.status.generation if first else status.workers.generation,
    )
    if seen.unasked and not ready:  # an operator that has just begun knows no better yet
        before = status.workers
        shown = f"{before.ready}/{wanted}"
        same = {"ready": before.ready, "shown": shown, "members": before.members}
        workers = workers.model_copy(update=same)
    changes: Json = {"workers": workers}
    if latest is not None and _newer(latest, status):
        changes |= _progress(latest, status)
    if writer is not None:
        changes["checkpoint"] = _kept(writer, status.checkpoint)
    return status.model_copy(update=changes)


def ready_pods(seen: Observation, status: RunStatus, now: datetime) -> set[str]:
    """Names of pods whose worker trains: none where too few are there, for then all wait."""
    return set() if _too_few(seen, status, now) else seen.training(now)


def _there(seen: Observation, now: datetime) -> list[Pod]:
    """Whose worker has loaded, and neither sits out nor starts its members again."""
    heard = seen.heard(now)
    told = [(pod, heard[pod.name].status) for pod in seen.workers if pod.name in heard]
    return [pod for pod, one in told if one.update and one.phase not in (ASIDE, STARTING)]


def _too_few(seen: Observation, status: RunStatus, now: datetime) -> bool:
    """Whether the group waits for spec.workers.min.

    Who is not heard, as by an operator that has just begun, may be there: what was told stands.
    """
    heard = seen.heard(now)
    silent = [one for one in seen.workers if one.live and one.started and one.name not in heard]
    maybe = len(silent) if holds(status, ConditionType.RUNNING) else 0
    return len(_there(seen, now)) + maybe < seen.run.spec.workers.min


def _update(answer: Answer) -> int:
    return answer.status.update or 0


def _farewells(seen: Observation, status: RunStatus, now: datetime) -> list[Answer]:
    """How the run stood when it was over: the last words of workers that are done.

    Those of workers with an earlier goal are passed over when the run has gone on since.
    """
    found = []
    furthest = status.training.update if status.training is not None else 0
    for pod in seen.workers:
        if pod.ended and pod.exit_code in (ExitCode.DONE, ExitCode.BUDGET_SPENT):
            with suppress(ValueError, RecursionError):
                at, last = pod.finished or now, read(pod.last_words.encode())
                if last.update and last.update >= furthest:
                    found.append(Answer(at, at, at, last))
    return found


def _newer(answer: Answer, status: RunStatus) -> bool:
    return status.training is None or answer.status.update != status.training.update


def _progress(answer: Answer, status: RunStatus) -> Json:
    latest = answer.status
    where, how = latest.curriculum, latest.training
    assert where is not None, "read() sees to it"
    before = status.curriculum
    stands = before is not None and before.start_frame == where.start_frame
    curriculum = CurriculumStatus(
        start_frame=where.start_frame,
        demo_frames=where.demo_frames,
        progress=f"{where.progress:.0%}",
        success_rate=_short(where.success_rate),
        goal_rate=_short(where.goal_rate),
        last_move=before.last_move if before is not None and stands else answer.at,
    )
    learning = TrainingStatus(
        frames=latest.frames,
        update=latest.update or 0,
        seconds=round(latest.seconds, 1),
        life=latest.life,
        frames_per_second=_short(how.frames_per_second, 0),
        score_mean=_short(how.score_mean),
        score_max=_short(how.score_max),
        entropy=_short(how.entropy),
        learning_rate=how.learning_rate,
        eta_seconds=_short(how.eta_seconds, 0),
    )
    changes: Json = {"curriculum": curriculum, "training": learning}
    tried = latest.evaluation
    if tried.update is not None and tried.episodes and tried.success_rate is not None:
        changes["evaluation"] = EvaluationStatus(
            update=tried.update, episodes=tried.episodes, success_rate=round(tried.success_rate, 3)
        )
    return changes


def _kept(answer: Answer, before: CheckpointStatus | None) -> CheckpointStatus | None:
    """The latest checkpoint, by the answer of the worker that writes them."""
    kept = answer.status.checkpoint
    if kept.update is None and kept.error is None:  # it has not written any: others may have
        return before
    error = None if kept.error is None else kept.error[:MAX_MESSAGE]
    if before is not None and (kept.update, error) == (before.update, before.error):
        return before  # its age has grown, and no news
    age = None if kept.age_seconds is None else timedelta(seconds=kept.age_seconds)
    return CheckpointStatus(
        update=kept.update,
        time=None if age is None else (answer.at - age).replace(microsecond=0),
        bytes=kept.bytes,
        error=error,
    )


def _short(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def conditions(seen: Observation, status: RunStatus, now: datetime) -> RunStatus:
    """The conditions of a run that is not over."""
    ready = ready_pods(seen, status, now)
    answers = [seen.answers[name] for name in ready]
    made: list[tuple[ConditionType, bool, str, str]] = []
    if seen.run.spec.suspend:
        left = [pod for pod in seen.workers if pod.present(now)]
        made.append((ConditionType.RUNNING, False, Reason.SUSPENDED, "spec.suspend is true"))
        if left:
            message = f"{len(left)} pods save and leave"
            message = "; ".join(filter(None, (message, seen.refused)))[:MAX_MESSAGE]
            made.append((ConditionType.SUSPENDED, False, Reason.SUSPENDING, message))
        else:
            does = "goes on from the checkpoint" if status.saved else "begins the run"
            message = f"no pods; spec.suspend: false {does}"
            if volume_lost(seen, status, now):
                message = "no pods, nor the claim with the checkpoints"
            made.append((ConditionType.SUSPENDED, True, Reason.SUSPENDED, message))
    else:
        if ready or not (seen.unasked and holds(status, ConditionType.RUNNING)):
            made.append((ConditionType.RUNNING, bool(ready), *_running(seen, status, ready, now)))
        if find(status, ConditionType.SUSPENDED) is not None:
            made.append((ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false"))
    if answers:
        stalled = any(one.status.training.stalled for one in answers)
        message = "all remedies of spec.stall were tried in vain" if stalled else "it learns"
        if stalled or find(status, ConditionType.STALLED) is not None:
            reason = Reason.PLATEAU if stalled else Reason.MOVES
            made.append((ConditionType.STALLED, stalled, reason, message))
    for one in made:
        status = put(status, *one, now, seen.run.generation)
    return _checkpoint_ready(seen, status, now)


def last(seen: Observation, status: RunStatus, now: datetime) -> RunStatus:
    """The status of a run that is over, with what its workers told last."""
    status = progress(seen, status, now)
    if holds(status, ConditionType.COMPLETE) and find(status, ConditionType.STALLED) is not None:
        moved = ConditionType.STALLED, False, Reason.MOVES, "the goal is met"
        status = put(status, *moved, now, seen.run.generation)
    return _checkpoint_ready(seen, status, now)


def _checkpoint_ready(seen: Observation, status: RunStatus, now: datetime) -> RunStatus:
    """The status with whether what was learned is on the volume."""
    kept = status.checkpoint
    if kept is None:
        return status
    well, reason, message = True, Reason.WRITTEN, "what was learned is on the volume"
    if kept.error is not None:
        well, reason, message = False, Reason.NOT_WRITTEN, kept.error
    claim = render.claim_name(seen.run)
    if failed(status) == Reason.VOLUME_LOST:
        well, reason, message = False, Reason.VOLUME_LOST, f"the claim {claim} is gone"
    elif seen.run.spec.suspend and not over(status) and volume_lost(seen, status, now):
        well, reason = False, Reason.VOLUME_LOST
        message = (
            f"the claim {claim} is gone: put it back, as from a snapshot, before spec.suspend is "
            "false, or the run fails then"
        )
    ready = ConditionType.CHECKPOINT_READY
    return put(status, ready, well, reason, message, now, seen.run.generation)


def _running(
    seen: Observation, status: RunStatus, ready: set[str], now: datetime
) -> tuple[str, str]:
    """Reason and message of the condition Running."""
    lacking = [pod for pod in seen.pods if pod.live and pod.name not in ready and speaks(pod, seen)]
    refused = f"{Reason.REFUSED}: {seen.refused}" if seen.refused else ""
    trouble = refused or _troubles(lacking)
    trouble = trouble or _aside(seen, now) or _unreachable(seen) or _begins(seen, ready)
    wanted, there = seen.run.spec.workers.max, len(_there(seen, now))
    if len(ready) == wanted:
        return Reason.TRAINING, (ALL_TRAIN + (refused and f"; {refused}"))[:MAX_MESSAGE]
    if ready:
        told, trouble = f"{len(ready)} of {wanted} workers train", trouble or _stands(seen, ready)
        return Reason.TRAINING, (told + (trouble and f"; {trouble}"))[:MAX_MESSAGE]
    held = _held(status, now)
    if there and _too_few(seen, status, now):
        text = f"{there} of the {seen.run.spec.workers.min} workers that it needs "
        text += "(spec.workers.min) are there; the others are waited for"
        trouble = trouble or held
        return Reason.TOO_FEW_WORKERS, (text + (trouble and f"; {trouble}"))[:MAX_MESSAGE]
    if seen.refused:
        return Reason.REFUSED, seen.refused
    if lacking:
        reason = lacking[0].reason
        return reason if reason.isalnum() else Reason.WAITING, trouble[:MAX_MESSAGE]
    if held and not any(pod.live for pod in seen.workers):
        return Reason.BACK_OFF, held[:MAX_MESSAGE]
    if unreachable := _unreachable(seen):
        return Reason.UNREACHABLE, unreachable[:MAX_MESSAGE]
    still = [pod for pod in seen.workers if pod.live and seen.answers.get(pod.name)]
    if any(seen.answers[pod.name].status.update for pod in still):
        message = "workers answer, and have done no update for a while"
        return Reason.NO_UPDATES, _aside(seen, now) or message
    if any(pod.started and pod.live for pod in seen.workers):
        return Reason.STARTING, "workers load the demonstration and meet one another"
    if claim := unbound(seen):
        return Reason.CLAIM_PENDING, claim
    return Reason.CREATING, waiting(seen)


def _held(status: RunStatus, now: datetime) -> str:
    """Why a worker is not started again yet."""
    if not any(place.not_before and place.not_before > now for place in status.places):
        return ""
    last = status.attempts[-1]
    message = f"{last.pod}: {last.cause}: {last.message}".removesuffix(": ")
    return f"waiting before the next try; {message}"


def _troubles(lacking: Sequence[Pod]) -> str:
    """What keeps pods from training, each trouble once."""
    of: dict[str, list[str]] = {}
    for pod in lacking:
        of.setdefault(lacks(pod), []).append(who(pod))
    told = [f"{', '.join(names)}: {trouble}" for trouble, names in of.items()]
    return "; ".join(told[:MAX_TROUBLES])


def _begins(seen: Observation, ready: set[str]) -> str:
    """Which workers have done no update yet."""
    trained = ready | {name for name, answer in seen.answers.items() if answer.status.update}
    new = [pod for pod in seen.workers if pod.live and pod.started and pod.name not in trained]
    return ", ".join(f"{who(pod)} loads" for pod in new)


def _unreachable(seen: Observation) -> str:
    """Which workers answer the kubelet, and have not answered the operator for a while."""
    missed = [pod for pod in seen.workers if seen.missed.get(pod.name, 0) >= UNANSWERED]
    told = ", ".join(who(pod) for pod in missed if pod.live and pod.ready)
    return told and f"{told}: ready, but the operator cannot reach port {METRICS_PORT}"


def _stands(seen: Observation, ready: set[str]) -> str:
    """Which workers have trained, and do not now: as one that was frozen."""
    still = [pod for pod in seen.workers if pod.live and pod.started and pod.name not in ready]
    told = ", ".join(who(pod) for pod in still)
    return told and f"{told}: no update for a while"


def _aside(seen: Observation, now: datetime) -> str:
    """Which workers sit out."""
    heard = seen.heard(now)
    out = [pod for pod in seen.workers if pod.name in heard and seen.aside(pod)]
    told = ", ".join(f"{who(pod)} on {pod.node} sits out" for pod in out)
    return told and f"{told}: the network to the others is too slow"


def not_understood(
    status: RunStatus, what: str, now: datetime, generation: int, *, trains: bool
) -> RunStatus:
    """The status of a run that this version cannot read: what trains, trains on."""
    message = unknown(what)[:MAX_MESSAGE]
    status = put(
        status, ConditionType.RUNNING, trains, Reason.NOT_UNDERSTOOD, message, now, generation
    )
    return status.model_copy(update={"observed_generation": generation, "phase": phase(status)})


def outline(raw: Json, *, trains: bool) -> RunStatus:
    """What is known of a run whose status this version cannot read either."""
    rests = {one.value: one for one in (Phase.COMPLETE, Phase.FAILED, Phase.SUSPENDED)}
    return RunStatus(
        phase=rests.get(raw.get("phase", ""), Phase.RUNNING if trains else Phase.PENDING)
    )


def unknown(what: str) -> str:
    """What of a run this version does not know, in words."""
    left = "the run is left as it is, and a worker that is lost is not replaced"
    return f"this version of the operator does not know {what}; {left}"


def put(
    status: RunStatus,
    kind: ConditionType,
    value: bool,
    reason: str,
    message: str,
    now: datetime,
    generation: int,
) -> RunStatus:
    """The status with a condition; its time changes with its status alone."""
    before = find(status, kind)
    text: Literal["True", "False"] = "True" if value else "False"
    since = before.last_transition_time if before and before.status == text else now
    made = Condition(
        type=kind,
        status=text,
        reason=reason,
        message=message,
        last_transition_time=since.replace(microsecond=0),
        observed_generation=generation,
    )
    others = [one for one in status.conditions if one.type is not kind]
    kept = sorted([*others, made], key=lambda one: list(ConditionType).index(one.type))
    return status.model_copy(update={"conditions": kept})


def find(status: RunStatus, kind: ConditionType) -> Condition | None:
    """A condition, if it was ever told."""
    return next((one for one in status.conditions if one.type is kind), None)


def holds(status: RunStatus, kind: ConditionType) -> bool:
    """Whether a condition is true."""
    found = find(status, kind)
    return found is not None and found.status == "True"


def over(status: RunStatus) -> bool:
    """Whether a run has completed or failed."""
    return holds(status, ConditionType.COMPLETE) or holds(status, ConditionType.FAILED)


def failed(status: RunStatus) -> str | None:
    """The reason for which a run has failed; None where it has not."""
    found = find(status, ConditionType.FAILED)
    return found.reason if found is not None and found.status == "True" else None


def claim_gone(status: RunStatus) -> bool:
    """Whether it is told that the claim with the checkpoints is gone."""
    found = find(status, ConditionType.CHECKPOINT_READY)
    return found is not None and found.reason == Reason.VOLUME_LOST


def phase(status: RunStatus) -> Phase:
    """One word for people."""
    for kind, word in (
        (ConditionType.COMPLETE, Phase.COMPLETE),
        (ConditionType.FAILED, Phase.FAILED),
        (ConditionType.SUSPENDED, Phase.SUSPENDED),
        (ConditionType.RUNNING, Phase.RUNNING),
    ):
        if holds(status, kind):
            return word
    return Phase.PENDING


def urgent(before: RunStatus, after: RunStatus, *, others: bool = False) -> bool:
    """Whether a status must be written at once: it has what must not be forgotten, or is awaited.

    All else, as progress, may wait for a few seconds.

    Args:
        before: As it is.
        after: As it is to be.
        others: Whether other runs are due. They go first where a run only begins.
    """
    if others and _introduces(before, after):
        return False

    def key(status: RunStatus) -> object:
        return (
            status.phase,
            [
                (one.type, one.status, one.reason if one.reason in AWAITED else "")
                for one in status.conditions
            ],
            status.evaluation,
            status.restarts,
            [one.recovery_seconds for one in status.attempts],
            [
                (one.worker, one.attempt, one.ended, one.not_before)
                for one in status.places
                if one.ended
            ],
            status.started,
            status.active_since,
            status.begun is None and not others,
            status.observed_generation,
        )

    return key(before) != key(after)


def _introduces(before: RunStatus, after: RunStatus) -> bool:
    """Whether a run's first status has nothing that is awaited, or could be forgotten."""
    return (
        not before.observed_generation
        and after.phase is Phase.PENDING
        and all(one.status == "False" and one.reason not in AWAITED for one in after.conditions)
        and not any(place.ended for place in after.places)
    )


def news(before: RunStatus, after: RunStatus) -> list[Condition]:
    """What people are told of: conditions that are true now, and some that are not and say why."""
    return [one for one in after.conditions if _tells(one) and not _same(one, before)]


def _tells(one: Condition) -> bool:
    if one.status == "True":
        return one.type is not ConditionType.CHECKPOINT_READY
    return one.reason in (*TROUBLE, Reason.RESUMED)


def _same(one: Condition, before: RunStatus) -> bool:
    """Whether it was so before; why it is true is not of interest."""
    was = find(before, one.type)
    if was is None or was.status != one.status:
        return False
    return one.status == "True" or was.reason == one.reason
