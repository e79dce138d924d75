"""The operations page names what there is."""

import re
from pathlib import Path

from demoreset_api.status import Cause, ConditionType
from demoreset_operator.ending import EXPLANATIONS, NO_ROOM
from demoreset_operator.metrics import Metrics
from demoreset_operator.observation import HOPELESS_REASONS
from demoreset_operator.why import DO

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()


def test_every_metric_of_the_operator_is_documented() -> None:
    metrics = Metrics()
    names = set()
    for family in metrics.registry.collect():
        names.add(family.name + ("_total" if family.type == "counter" else ""))
    documented = set(re.findall(r"`(demoreset_operator_\w+)", PAGE))
    assert names == documented


def test_every_cause_and_condition_is_explained() -> None:
    for cause in Cause:
        assert cause.value in PAGE
    for condition in ConditionType:
        assert condition.value in PAGE
    for reason in (*HOPELESS_REASONS, *NO_ROOM):
        assert reason in DO, reason
    for reason in DO:
        assert reason in PAGE, reason
    for cause in EXPLANATIONS:
        assert cause.value in PAGE


def test_the_operator_is_a_plain_folder() -> None:
    assert not (ROOT / "operator/__init__.py").exists(), "a standard module has this name"
