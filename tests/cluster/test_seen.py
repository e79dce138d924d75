"""What a real Prometheus sees of a real run: every dashboard and every alert has its data."""

import math
import time
from typing import Any

import pytest

import boards
import prometheus
from boards import Chosen
from kube import Cluster, Json
from told import RUN, Told

RATE = f"{4 * prometheus.INTERVAL}s"  # Grafana's $__rate_interval where it shows every scrape


def numbers(series: list[Json]) -> list[float]:
    """All values that can be drawn."""
    values = [float(text) for one in series for _, text in one["values"]]
    return [value for value in values if math.isfinite(value)]


def test_every_question_of_dashboards_and_alerts_is_answered(
    cluster: Cluster, operator: str, namespace: str, wanted: dict[str, Any]
) -> None:
    if (image := prometheus.image()) is None:
        pytest.skip("no Prometheus: Debian's package, or DEMORESET_PROMETHEUS_IMAGE")
    objects = prometheus.rendered(cluster, operator)
    del wanted["spec"]["goal"]  # the default is met soon
    del wanted["spec"]["environment"]["stickyProbability"]  # without noise it is learned sooner
    wanted["spec"]["environment"]["slots"] = 16
    begun = time.time()
    cluster.apply(namespace, wanted)
    with prometheus.started(cluster, objects, image) as seen:
        run = Told(cluster, namespace, RUN)
        run.ready(2)
        run.goes_on()
        run.kill(sorted(run.live())[-1])
        cluster.kubectl(
            "wait", "--for=condition=Complete", f"drr/{RUN}", "-n", namespace, "--timeout=300s"
        )
        window = (begun, time.time(), prometheus.INTERVAL)
        chosen = Chosen(namespace, RUN, RATE)
        asked = boards.selectors(boards.of_alerts(objects))
        for board in boards.dashboards(objects):
            panels = boards.of_panels(board, chosen)
            asked += panels + boards.selectors(panels)
        drawn = {
            expression: numbers(seen.series(expression, *window))
            for expression in {one.expression for one in asked}
        }
        without = [one for one in asked if not drawn[one.expression]]
        assert not without
        for board in boards.dashboards(objects):
            for label, metric in boards.of_variables(board, chosen):
                listed = {one["metric"].get(label) for one in seen.series(metric, *window)}
                assert getattr(chosen, label) in listed, (board["title"], label, metric)
        rules = [rule for group in seen.answer("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == len(boards.of_alerts(objects))
        assert {rule["health"] for rule in rules} == {"ok"}, rules
