"""Why a worker's pod ended: from its exit code and Kubernetes' own words, and nothing else."""

import json
from dataclasses import dataclass

from demoreset_api.errors import ExitCode
from demoreset_api.names import METRICS_PORT, OUT_OF_MEMORY
from demoreset_api.status import Cause
from demoreset_operator.observation import Pod
from demoreset_operator.worker_status import read

BY_CODE: dict[int, Cause] = {
    ExitCode.DONE: Cause.DONE,
    ExitCode.BUDGET_SPENT: Cause.BUDGET_SPENT,
    ExitCode.USER_ERROR: Cause.WRONG_RUN,
    ExitCode.NO_VALID_CHECKPOINT: Cause.NO_VALID_CHECKPOINT,
    ExitCode.NO_PROGRESS: Cause.NO_PROGRESS,
    ExitCode.TRY_AGAIN: Cause.TRY_AGAIN,
    ExitCode.DRAINED: Cause.DRAINED,
}
# The run's own; or its node's, or its image's.
OWN_CAUSES = (Cause.WRONG_RUN, Cause.NO_VALID_CHECKPOINT, Cause.NO_PROGRESS)
FINAL_CAUSES = (Cause.BUDGET_SPENT, *OWN_CAUSES)
NO_LOSS = (Cause.REPLACED, Cause.DONE, *FINAL_CAUSES)  # nobody is started again for these
COUNTED_CAUSES = (Cause.CRASHED, Cause.OUT_OF_MEMORY, Cause.HUNG)
NODE_LOST_REASONS = (
    "NodeLost",
    "NodeShutdown",
    "Terminated",
    "DeletionByTaintManager",
    "DeletionByPodGC",
)
MAX_LAST_WORDS = 900  # characters
STOPPED = (
    "SIGTERM, though nobody had deleted the pod: its node was started again, or its liveness probe "
    f"failed (`kubectl get events`): port {METRICS_PORT} is not reached from the node, or the "
    "worker gave no sign of life"
)


@dataclass(frozen=True)
class Verdict:
    """Why a pod ended, and for people, how."""

    cause: Cause
    message: str

    @property
    def counts(self) -> bool:
        """Whether it is the run's own fault."""
        return self.cause in COUNTED_CAUSES


def verdict(pod: Pod) -> Verdict:
    """Why a pod that has ended, or is being deleted, did."""
    words = last_words(pod.last_words)
    by_code = BY_CODE.get(pod.exit_code) if pod.exit_code is not None else None
    if by_code in (Cause.DONE, Cause.BUDGET_SPENT):
        if _stands(pod.last_words):
            return Verdict(by_code, "")
        no_trainer = f"exit code {pod.exit_code}, and not a word of the run: is this its image?"
        last = words.rpartition("\n")[2]  # of an argparse that tells all that it would take
        return Verdict(Cause.CRASHED, f"{no_trainer} {last}".strip())
    if by_code in FINAL_CAUSES:  # it has the last word, however the pod ended
        return Verdict(by_code, words)
    if pod.oom_killed or (
        pod.exit_code == ExitCode.OUT_OF_MEMORY and words.startswith(OUT_OF_MEMORY)
    ):
        limit = f"its limit of {pod.memory_limit}" if pod.memory_limit else "the node's memory"
        return Verdict(
            Cause.OUT_OF_MEMORY,
            f"the worker needed more than {limit}; raise spec.workers.resources.limits.memory",
        )
    for word in (pod.disruption, pod.reason):
        if word in NODE_LOST_REASONS:
            return Verdict(Cause.NODE_LOST, f"node {pod.node}: {word}")
    if pod.disruption or pod.reason in ("Evicted", "Preempting", "UnexpectedAdmissionError"):
        word = pod.disruption or pod.reason
        return Verdict(Cause.EVICTED, f"{word}: {pod.message}".removesuffix(": "))
    if pod.unknown:
        return Verdict(Cause.NODE_LOST, f"node {pod.node} does not know how its container ended")
    if by_code is Cause.DRAINED and not pod.deleting:
        return Verdict(by_code, STOPPED)
    if by_code is not None:
        return Verdict(by_code, words)
    if pod.exit_code is None:
        if pod.ended and pod.unready:
            return Verdict(Cause.CRASHED, pod.unready)
        if pod.ended:  # the kubelet refused it, or lost it
            return Verdict(Cause.EVICTED, f"{pod.reason}: {pod.message}".strip(": "))
        return Verdict(Cause.DELETED, "the pod was deleted")
    how = f"exit code {pod.exit_code}"
    if 128 < pod.exit_code <= 128 + 64:
        how += f" (signal {pod.exit_code - 128})"
    return Verdict(Cause.CRASHED, f"{how}: {words}" if words else how)


def _stands(words: str) -> bool:
    """Whether these are a worker's last words of a run that is over: how it stands."""
    try:
        read(words.encode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def last_words(text: str) -> str:
    """What a worker left as its termination message: its error, then its last lines.

    One that was killed left nothing, and the kubelet took the end of its log instead.
    """
    words = "\n".join(filter(None, map(_words, text.strip().splitlines())))
    if len(words) <= MAX_LAST_WORDS:
        return words
    half = MAX_LAST_WORDS // 2  # what it is comes first; where there is only a log, last
    return f"{words[: half - 3]} … {words[-half:]}"


def _words(line: str) -> str:
    """A line as a person reads it: of the log's JSON, the text of a note, and no numbers."""
    if not line.endswith("}"):
        return line
    try:
        text = str(json.loads(line).get("text", ""))
        return text.encode(errors="replace").decode()  # half a letter, which no status may have
    except (ValueError, AttributeError, RecursionError):
        return "" if '": ' in line else line  # of JSON that begins in its middle nothing
