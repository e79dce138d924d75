"""What the chart's dashboards and alerts ask Prometheus."""

import json
import re
from dataclasses import dataclass

from kube import Json

SELECTOR = re.compile(r"\bdemoreset_\w+(?:\{[^}]*\})?")
VARIABLE = re.compile(r"label_values\((.*), (\w+)\)")


@dataclass(frozen=True)
class Chosen:
    """What is chosen on top of a dashboard, and what Grafana chooses by itself."""

    namespace: str
    run: str
    rate: str

    def fill(self, expression: str) -> str:
        """An expression as Grafana sends it."""
        for variable, value in (
            ("$__rate_interval", self.rate),
            ("$namespace", self.namespace),
            ("$run", self.run),
        ):
            expression = expression.replace(variable, value)
        return expression


@dataclass(frozen=True)
class Question:
    """An expression, and where it is asked."""

    where: str
    expression: str


def dashboards(objects: list[Json]) -> list[Json]:
    """Those among the chart's objects."""
    return [
        json.loads(text)
        for one in objects
        if one["kind"] == "ConfigMap"
        for name, text in one["data"].items()
        if name.endswith(".json")
    ]


def of_panels(board: Json, chosen: Chosen) -> list[Question]:
    """All expressions of a dashboard."""
    return [
        Question(f"{board['title']}, {panel['title']}", chosen.fill(target["expr"]))
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def of_alerts(objects: list[Json]) -> list[Question]:
    """All expressions of alerts among the chart's objects."""
    return [
        Question(rule["alert"], rule["expr"])
        for one in objects
        if one["kind"] == "PrometheusRule"
        for group in one["spec"]["groups"]
        for rule in group["rules"]
    ]


def selectors(questions: list[Question]) -> list[Question]:
    """The metrics of expressions, alone: an `or` does not hide them, nor a limit that holds."""
    return [
        Question(one.where, selector)
        for one in questions
        for selector in SELECTOR.findall(one.expression)
    ]


def of_variables(board: Json, chosen: Chosen) -> list[tuple[str, str]]:
    """The label that each choice on top lists, and the metric that it is a label of."""
    found = []
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            query = VARIABLE.fullmatch(one["definition"])
            assert query is not None, one["definition"]
            found.append((query[2], chosen.fill(query[1])))
    return found
