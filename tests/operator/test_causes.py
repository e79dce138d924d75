"""Why a pod ended, by its exit code and Kubernetes' own words."""

import pytest

from demoreset_api.status import Cause
from demoreset_operator.causes import MAX_LAST_WORDS, verdict
from demoreset_operator.observation import Pod
from world import BEGIN, LAST_WORDS


def pod(**facts: object) -> Pod:
    given: dict[str, object] = {"phase": "Failed", "node": "node1", **facts}
    return Pod("p", 0, 1, "", "", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "cause", "counts"),
    [
        (pod(phase="Succeeded", exit_code=0, last_words=LAST_WORDS), Cause.DONE, False),
        (pod(exit_code=2, last_words=LAST_WORDS), Cause.BUDGET_SPENT, False),
        # Another image ends so, too.
        (pod(phase="Succeeded", exit_code=0), Cause.CRASHED, True),
        (pod(exit_code=2, last_words="usage: demoreset-operator"), Cause.CRASHED, True),
        (pod(exit_code=64), Cause.WRONG_RUN, False),
        (pod(exit_code=65), Cause.NO_VALID_CHECKPOINT, False),
        (pod(exit_code=66), Cause.NO_PROGRESS, False),
        (pod(exit_code=75), Cause.TRY_AGAIN, False),
        (pod(exit_code=143), Cause.DRAINED, False),
        (pod(exit_code=1), Cause.CRASHED, True),
        (pod(exit_code=137), Cause.CRASHED, True),
        (pod(exit_code=139), Cause.CRASHED, True),
        (pod(exit_code=137, oom_killed=True), Cause.OUT_OF_MEMORY, True),
        (pod(exit_code=137, last_words="OutOfMemory: the kernel"), Cause.OUT_OF_MEMORY, True),
        (pod(reason="Evicted", message="low on memory"), Cause.EVICTED, False),
        (pod(reason="Evicted", exit_code=137), Cause.EVICTED, False),
        (pod(reason="NodeLost"), Cause.NODE_LOST, False),
        (pod(reason="Evicted", exit_code=137, unknown=True), Cause.EVICTED, False),
        (pod(exit_code=255, unknown=True), Cause.NODE_LOST, False),  # it was started again
        (pod(reason="NodeShutdown", exit_code=143), Cause.NODE_LOST, False),
        (pod(reason="UnexpectedAdmissionError"), Cause.EVICTED, False),
        (pod(reason="OutOfcpu", message="no cpu"), Cause.EVICTED, False),
        (pod(reason="PodInitializing", unready="init container vault: no"), Cause.CRASHED, True),
        (pod(disruption="PreemptionByScheduler", exit_code=143), Cause.EVICTED, False),
        (pod(disruption="DeletionByTaintManager"), Cause.NODE_LOST, False),
        (pod(phase="Running", leaves_at=BEGIN), Cause.DELETED, False),
        # Its goal was met while somebody deleted it.
        (
            pod(exit_code=0, disruption="EvictionByEvictionAPI", last_words=LAST_WORDS),
            Cause.DONE,
            False,
        ),
    ],
)
def test_a_verdict(seen: Pod, cause: Cause, counts: bool) -> None:
    found = verdict(seen)
    assert (found.cause, found.counts) == (cause, counts)


def test_who_was_stopped_and_not_deleted_is_told_by_whom() -> None:
    """As by a liveness probe that never gets through: the run would begin anew for ever."""
    assert "liveness probe" in verdict(pod(exit_code=143)).message
    assert verdict(pod(exit_code=143, leaves_at=BEGIN)).message == ""


def test_a_signal_is_named() -> None:
    assert verdict(pod(exit_code=139)).message == "exit code 139 (signal 11)"
    assert verdict(pod(exit_code=255)).message == "exit code 255"


@pytest.mark.parametrize("before", ["", "usage: server [-h]\n              [--port PORT]\n"])
def test_another_image_is_found_out_by_its_last_word(before: str) -> None:
    words = before + "error: unrecognized arguments: worker"
    message = verdict(pod(exit_code=2, last_words=words)).message
    assert message.endswith("is this its image? error: unrecognized arguments: worker")
    assert "usage" not in message


def test_half_a_letter_is_no_word_for_a_status() -> None:
    message = verdict(pod(exit_code=1, last_words='{"text": "cannot open /data/\\udcff"}')).message
    assert message == "exit code 1: cannot open /data/?"


def test_of_a_log_s_end_the_notes_are_told_and_no_numbers() -> None:
    log = (
        '12, "goodput": 0.98}\n{"time": 7.5, "event": "note", "text": "generation 2: 3 members"}\n'
        '{"time": 8.1, "event": "update", "update": 424}\nTraceback {'
    )
    message = verdict(pod(exit_code=137, last_words=log)).message
    assert message == "exit code 137 (signal 9): generation 2: 3 members\nTraceback {"
    assert verdict(pod(exit_code=137, last_words=log[:20])).message == "exit code 137 (signal 9)"


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: bad {'a': 1}",
        'status: Cancelled, message: "Timeout expired", metadata: MetadataMap { headers: {} }',
        "[" * 4000 + "}",
    ],
)
def test_a_line_that_looks_like_json_and_is_none_is_told(line: str) -> None:
    assert verdict(pod(exit_code=1, last_words=line)).message.endswith(line[-20:])


def test_long_last_words_are_cut() -> None:
    message = verdict(pod(exit_code=64, last_words="x" * 5000)).message
    assert len(message) == MAX_LAST_WORDS
    assert "…" in message
