"""The operations page names what there is, and says what is so."""

import re
from datetime import timedelta
from pathlib import Path

import pytest

from demoreset_api import pace
from demoreset_api.spec import Restart
from demoreset_api.status import KEPT_ATTEMPTS, Cause, ConditionType
from demoreset_operator.causes import FINAL_CAUSES
from demoreset_operator.ending import HOPE, NO_ROOM
from demoreset_operator.ledger import BACK_OFF_RESET
from demoreset_operator.metrics import Metrics
from demoreset_operator.observation import HOPELESS_REASONS, LOAD
from demoreset_operator.reasons import Happened, Reason
from demoreset_operator.watch import DEAF_SECONDS
from demoreset_operator.why import CHANGES, DO

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
# Kubernetes' own, of pods that are not started yet, and that nothing of ours depends on.
OTHERS = {"ContainerCreating", "CrashLoopBackOff"}
EVENTS = {
    Reason.TOO_FEW_WORKERS,
    Reason.UNREACHABLE,
    Reason.SUSPENDED,
    Reason.RESUMED,
    Reason.NOT_WRITTEN,
}
EVENTS |= {Reason.GOAL_MET, Reason.NOT_UNDERSTOOD}
WORDS = {2: "two", 5: "five", 10: "ten"}


def rows(title: str) -> list[list[str]]:
    """The rows of the table whose head begins so; each a list of cells."""
    (table,) = re.findall(rf"^\| {title} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]


def named(cells: list[str]) -> list[str]:
    """All names in some cells."""
    return re.findall(r"[A-Z]\w+", " ".join(cells))


def test_every_metric_of_the_operator_is_documented() -> None:
    metrics = Metrics()
    names = set()
    for family in metrics.registry.collect():
        names.add(family.name + ("_total" if family.type == "counter" else ""))
    documented = set(re.findall(r"`(demoreset_operator_\w+)", PAGE))
    assert names == documented


def test_every_cause_has_its_row() -> None:
    causes = named([row[0] for row in rows("cause")])
    assert sorted(causes) == sorted(Cause)


def test_every_condition_and_every_reason_has_its_row() -> None:
    table = rows("condition")
    assert {name for row in table for name in named(row[:1])} == set(ConditionType)
    reasons = {name for row in table for name in named(row[1:2])}
    assert reasons == {*Reason, *FINAL_CAUSES, *HOPELESS_REASONS, *NO_ROOM, *OTHERS}
    assert reasons >= {*DO, *CHANGES}, "what is advised is of no other"
    assert {*HOPELESS_REASONS, *NO_ROOM, *OTHERS} <= {*DO}


def test_every_event_has_its_row() -> None:
    assert set(named([row[0] for row in rows("event")])) == {*Happened, *EVENTS}


def test_the_reasons_are_written_once() -> None:
    """What the operator says is of `Reason`, so that the tables above have all of it."""
    for file in ("controller", "decide", "ending", "group", "hang", "ledger", "story"):
        source = (ROOT / f"operator/demoreset_operator/{file}.py").read_text()
        assert not {*Reason, *Happened} & set(re.findall(r'"(\w+)"', source)), file


@pytest.mark.parametrize(
    "says",
    [
        f"`restart.limit` for crashes ({Restart().limit})",
        f"`restart.outOfMemoryLimit` ({Restart().out_of_memory_limit})",
        f"`restart.hangLimit` ({Restart().hang_limit})",
        f"fails after {HOPE // timedelta(minutes=1)} minutes",
        f"the latest {KEPT_ATTEMPTS}",
        f"no update for {WORDS[int(pace.QUIET / 60)]} minutes",
        f"or {pace.GAPS:g} times as long",
        f"out of the group for {WORDS[LOAD // timedelta(minutes=1)]} minutes",
        f"through a watch for {WORDS[int(DEAF_SECONDS / 60)]} minutes",
    ],
)
def test_limits_are_those_of_the_code(says: str) -> None:
    assert says in " ".join(PAGE.split())


def test_who_ran_for_more_than_a_minute_does_not_wait() -> None:
    assert timedelta(minutes=1) == BACK_OFF_RESET
    assert "Where a worker's container ran for more than a minute" in PAGE


def test_the_operator_is_a_plain_folder() -> None:
    assert not (ROOT / "operator/__init__.py").exists(), "a standard module has this name"
