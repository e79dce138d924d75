"""Alerts and dashboards ask for metrics that there are, and alerts fire when they should."""

import json
import re
import runpy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from demoreset_operator.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/demoreset"
ALERTS = CHART / "files/alerts.yaml"
DASHBOARDS = [CHART / "files/dashboard-run.json", CHART / "files/dashboard-fleet.json"]
RUNBOOK = ROOT / "docs/operations.md"

Object = dict[str, Any]
Run = Callable[..., subprocess.CompletedProcess[str]]


def rules() -> list[Object]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def panels(path: Path) -> list[Object]:
    found = json.loads(path.read_text())["panels"]
    assert isinstance(found, list)
    return found


def questions(path: Path) -> Iterator[str]:
    for panel in panels(path):
        yield from (target["expr"] for target in panel.get("targets", ()))


def known() -> set[str]:
    """The trainer's metrics, of which a test keeps the page complete, and the operator's."""
    page = (ROOT / "docs/metrics.md").read_text()
    names = set(re.findall(r"^\| `(demoreset_\w+)", page, re.MULTILINE))
    for family in Metrics().registry.collect():
        match family.type:
            case "counter":
                names.add(family.name + "_total")
            case "histogram":
                names |= {family.name + part for part in ("_bucket", "_sum", "_count")}
            case _:
                names.add(family.name)
    return names


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bdemoreset_\w+", expression))


def test_alerts_ask_for_metrics_that_there_are() -> None:
    names = known()
    for rule in rules():
        assert asked(rule["expr"]), rule["alert"]
        assert asked(rule["expr"]) <= names, rule["alert"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_for_metrics_that_there_are(path: Path) -> None:
    names = known()
    for question in questions(path):
        assert asked(question) <= names, question


def test_dashboards_show_everything_that_is_told_of_a_run() -> None:
    shown = {
        name for path in DASHBOARDS for question in questions(path) for name in asked(question)
    }
    unseen = {  # totals of what is shown as a rate, and a number that rows of others imply
        "demoreset_training_seconds_total",
        "demoreset_update",
        "demoreset_checkpoint_update",
        "demoreset_checkpoint_failing",  # an alert, as is the next
        "demoreset_operator_run_training",
        "demoreset_operator_reconcile_seconds_sum",
        "demoreset_operator_reconcile_seconds_count",
    }
    assert known() - shown == unseen


def test_dashboards_are_current() -> None:
    made = runpy.run_path(str(CHART / "dashboards.py"))["files"]()
    assert set(made) == {path.name for path in DASHBOARDS}
    for path in DASHBOARDS:
        assert path.read_text() == made[path.name], "run: python charts/demoreset/dashboards.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_told_where_to_look(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem.replace("dashboard-", "demoreset-")
    assert [one["name"] for one in board["templating"]["list"]] == [
        "datasource",
        "namespace",
        "run",
    ]
    for panel in panels(path):
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(one["datasource"]["uid"] == "${datasource}" for one in panel["targets"])
    for question in questions(path):
        assert re.findall(r"\[(.*?)\]", question) in (
            [],
            ["$__rate_interval"],
            2 * ["$__rate_interval"],
        )
        if "demoreset_operator_" not in question:
            assert 'namespace=~"$namespace",run=~"$run"' in question


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_ids_of_their_own_and_do_not_overlap(path: Path) -> None:
    ids = [panel["id"] for panel in panels(path)]
    assert len(set(ids)) == len(ids)
    covered: set[tuple[int, int]] = set()
    for panel in panels(path):
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & covered, panel["title"]
        covered |= cells
        references = [one["refId"] for one in panel.get("targets", ())]
        assert len(set(references)) == len(references)


def test_an_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{anchor}"


def test_every_alert_has_a_section_in_the_runbook() -> None:
    headings = re.findall(r"^#+ (.*)$", RUNBOOK.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
    assert {rule["alert"].lower() for rule in rules()} <= anchors


def test_prometheus_takes_the_alerts(promtool: Run) -> None:
    said = promtool("check", "rules", str(ALERTS))
    assert said.returncode == 0, said.stdout + said.stderr


def test_alerts_fire_when_they_should_and_not_otherwise(promtool: Run) -> None:
    said = promtool("test", "rules", str(Path(__file__).parent / "alerts_test.yaml"))
    assert said.returncode == 0, said.stdout + said.stderr


def test_an_operator_that_is_down_is_told_though_one_of_another_release_acts(
    render: Callable[..., list[Object]], promtool: Run, tmp_path: Path
) -> None:
    (made,) = (
        one for one in render("prometheusRule.enabled=true") if one["kind"] == "PrometheusRule"
    )
    (tmp_path / "rules.json").write_text(json.dumps(made["spec"]))
    (rule,) = (one for one in rules() if one["alert"] == "DemoresetOperatorDown")
    expected = {"exp_labels": rule["labels"], "exp_annotations": rule["annotations"]}
    acts = "demoreset_operator_is_leader"
    series = [
        {"series": f'{acts}{{namespace="demoreset-system"}}', "values": "1x10 stale"},
        {"series": f'{acts}{{namespace="theirs"}}', "values": "1x30"},
    ]
    times: list[Object] = [
        {"eval_time": "9m", "exp_alerts": []},
        {"eval_time": "20m", "exp_alerts": [expected]},
    ]
    asked = [{"alertname": rule["alert"], **one} for one in times]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": asked}
    file = tmp_path / "tests.json"
    file.write_text(json.dumps({"rule_files": ["rules.json"], "tests": [test]}))
    said = promtool("test", "rules", str(file))
    assert said.returncode == 0, said.stdout + said.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((Path(__file__).parent / "alerts_test.yaml").read_text())["tests"]
    tested = {one["alertname"] for test in tests for one in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_prometheus_understands_the_dashboards(promtool: Run, tmp_path: Path, path: Path) -> None:
    made = [
        {"record": f"question:{number}", "expr": question.replace("$__rate_interval", "5m")}
        for number, question in enumerate(questions(path))
    ]
    file = tmp_path / "questions.yaml"
    file.write_text(json.dumps({"groups": [{"name": "questions", "rules": made}]}))
    said = promtool("check", "rules", "--lint=none", str(file))
    assert said.returncode == 0, said.stdout + said.stderr
