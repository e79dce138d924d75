"""The Grafana dashboards, of one run and of all.

python charts/demoreset/dashboards.py    # writes files/dashboard-run.json and dashboard-fleet.json

A panel is its title and its questions; the rest is the same for all. A run's pods all tell of the
same run, so questions about it take `max` over them, never `sum`; but each has a time of its own.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "files"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PATTERN = 'namespace=~"$namespace",run=~"$run"'
WIDTH, HEIGHT, LOW = 24, 8, 4  # of Grafana's grid, of a graph, of a number

Object = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Questions as (PromQL, legend); `kind`, `unit` and `options` are Grafana's."""

    title: str
    questions: tuple[tuple[str, str], ...]
    text: str = ""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    defaults: Object = field(default_factory=dict)
    stacked: bool = False
    dashed: str = ""  # the legend of a limit
    columns: tuple[tuple[str, str], ...] = ()  # of a table: names and units, one per question


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


def of_run(name: str, by: str = "") -> str:
    """A gauge of the chosen run."""
    return f"max{_by(by)}(demoreset_{name}{{{PATTERN}}})"


def rate(name: str, by: str = "") -> str:
    """How fast a counter of the chosen run climbs, per second."""
    return f"max{_by(by)}(rate(demoreset_{name}{{{PATTERN}}}[$__rate_interval]))"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


def number(title: str, question: str, unit: str = "short", **more: Any) -> Panel:
    """A panel with one large number."""
    return Panel(title, ((question, ""),), unit=unit, kind="stat", width=4, **more)


RATIO: Object = {"min": 0, "max": 1}
GOOD_AT_ONE: Object = {
    **RATIO,
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "blue", "value": None}, {"color": "green", "value": 1}],
    },
}
BAD_ABOVE_ZERO: Object = {
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1}],
    },
}

RUN = (
    Row(
        "Where it is",
        (
            number(
                "Progress",
                of_run("curriculum_progress_ratio"),
                "percentunit",
                text="Share of the demo that the start has moved back over.",
                defaults=GOOD_AT_ONE,
            ),
            number(
                "Start",
                of_run("curriculum_start_frame"),
                text="The frame of the demo at which episodes begin; 0 is the game's own start.",
            ),
            number(
                "Success from the game's start",
                of_run("goal_success_ratio"),
                "percentunit",
                text="Empty before any episode began there.",
                defaults=RATIO,
            ),
            number(
                "Time left",
                of_run("eta_seconds"),
                "s",
                text="Until the start is reached, at the present pace.",
            ),
            number("Frames", of_run("frames_total")),
            number("Members", of_run("members"), text="Of the group, now."),
            Panel(
                "Start",
                (
                    (of_run("curriculum_start_frame"), "start"),
                    (of_run("curriculum_demo_frames"), "length of the demo"),
                ),
                "It moves back towards 0.",
                dashed="length of the demo",
                defaults={"min": 0},
            ),
            Panel(
                "Success",
                (
                    (of_run("curriculum_success_ratio"), "around the start"),
                    (of_run("goal_success_ratio"), "from the game's own start"),
                    (of_run("goal_ratio"), "wanted from there"),
                ),
                unit="percentunit",
                defaults=RATIO,
                dashed="wanted from there",
            ),
            Panel(
                "Score",
                (
                    (of_run("episode_score_mean"), "mean of all episodes"),
                    (of_run("episode_score_max"), "best of all episodes"),
                    (of_run("score_mean"), "mean from the game's own start"),
                    (of_run("score_max"), "best from there, so far"),
                ),
            ),
            Panel(
                "Episodes by end",
                ((rate("episodes_total", "outcome"), "{{outcome}}"),),
                unit="eps",
                stacked=True,
            ),
            Panel(
                "Remedies against a plateau",
                ((of_run("stall_rung"), "in force"), (of_run("stalled"), "all tried in vain")),
                defaults={"min": 0},
            ),
            Panel(
                "Restarts",
                (
                    (
                        f"max by (run) (demoreset_operator_run_restarts{{{PATTERN}}})",
                        "workers",
                    ),
                ),
                "Workers that the operator started again; the run's status has the causes.",
                defaults={"min": 0},
            ),
        ),
    ),
    Row(
        "How it learns",
        (
            Panel("Entropy", ((of_run("entropy_nats"), "nats"),), defaults={"min": 0}),
            Panel(
                "Divergence and clipping",
                ((of_run("kl_nats"), "KL, nats"), (of_run("clip_ratio"), "share clipped")),
            ),
            Panel(
                "Losses",
                (
                    (of_run("policy_loss"), "policy"),
                    (of_run("value_loss"), "value"),
                    (of_run("guide_loss"), "guide"),
                ),
            ),
            Panel(
                "Explained variance",
                ((of_run("explained_variance_ratio"), "of the returns"),),
                unit="percentunit",
                defaults={"max": 1},
            ),
            Panel("Gradient's norm", ((of_run("gradient_norm"), "before clipping"),)),
            Panel(
                "Step size and entropy's weight",
                (
                    (of_run("learning_rate"), "learning rate"),
                    (of_run("entropy_coefficient"), "entropy coefficient"),
                ),
                unit="sci",
            ),
        ),
    ),
    Row(
        "The machine",
        (
            Panel(
                "Frames per second", ((of_run("frames_per_second"), "frames"),), defaults={"min": 0}
            ),
            Panel("Time of an update", ((of_run("update_seconds"), "update"),), unit="s"),
            Panel(
                "Time by phase",
                (
                    (
                        "avg by (phase) "
                        f"(rate(demoreset_phase_seconds_total{{{PATTERN}}}[$__rate_interval]))",
                        "{{phase}}",
                    ),
                ),
                "Of each second of a worker; `quorum` is the wait for the other members.",
                unit="percentunit",
                stacked=True,
            ),
            Panel(
                "Since the last sign of life",
                (
                    (
                        f"time()-max by (worker) "
                        f"(demoreset_heartbeat_timestamp_seconds{{{PATTERN}}})",
                        "worker {{worker}}",
                    ),
                ),
                unit="s",
                defaults={"min": 0},
            ),
            Panel(
                "Checkpoint's age",
                ((f"min(demoreset_checkpoint_age_seconds{{{PATTERN}}})", "of the latest"),),
                unit="s",
                defaults={"min": 0},
            ),
            Panel(
                "Time to write a checkpoint",
                ((of_run("checkpoint_write_seconds"), "in the background"),),
                unit="s",
                defaults={"min": 0},
            ),
            Panel(
                "Checkpoint's size",
                ((of_run("checkpoint_bytes"), "of the latest"),),
                unit="bytes",
                defaults={"min": 0},
            ),
        ),
    ),
    Row(
        "The group",
        (
            Panel(
                "Members and generation",
                ((of_run("members"), "members"), (of_run("generation"), "generation")),
                "Every change of members makes a new generation.",
                defaults={"min": 0},
            ),
            Panel(
                "Recoveries by cause",
                (
                    (
                        "max by (cause) (increase("
                        f"demoreset_recoveries_total{{{PATTERN}}}[$__rate_interval]))",
                        "{{cause}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Goodput",
                ((of_run("goodput_ratio"), "time not spent on recoveries"),),
                unit="percentunit",
                defaults=RATIO,
            ),
            Panel(
                "Seconds per recovery",
                (
                    (
                        f"{rate('recovery_seconds_total', 'cause')}/"
                        f"{rate('recoveries_total', 'cause')}",
                        "{{cause}}",
                    ),
                ),
                unit="s",
                defaults={"min": 0},
            ),
            Panel(
                "Updates done again",
                (
                    (of_run("updates_rolled_back_total"), "after a loss"),
                    (of_run("rejected_updates_total"), "not finite"),
                ),
                defaults={"min": 0},
            ),
            Panel(
                "Frames of lost members",
                ((of_run("frames_discarded_total"), "never learned from"),),
                defaults={"min": 0},
            ),
        ),
    ),
)

BY_RUN = "namespace,run"
TABLE = (
    (of_run("curriculum_progress_ratio", BY_RUN), "progress", "percentunit"),
    (of_run("curriculum_start_frame", BY_RUN), "start", "short"),
    (of_run("goal_success_ratio", BY_RUN), "success", "percentunit"),
    (of_run("eta_seconds", BY_RUN), "time left", "s"),
    (of_run("frames_per_second", BY_RUN), "frames/s", "short"),
    (of_run("members", BY_RUN), "members", "short"),
    (of_run("goodput_ratio", BY_RUN), "goodput", "percentunit"),
    (
        f"min by ({BY_RUN}) (demoreset_checkpoint_age_seconds{{{PATTERN}}})",
        "checkpoint's age",
        "s",
    ),
)
FLEET = (
    Row(
        "Runs",
        (
            Panel(
                "Runs by phase",
                (("sum by (phase) (demoreset_operator_runs)", "{{phase}}"),),
                kind="stat",
                width=12,
            ),
            number(
                "Failed",
                f"count(max by ({BY_RUN}) (demoreset_operator_run_failed{{{PATTERN}}})==1)"
                " or vector(0)",
                defaults=BAD_ABOVE_ZERO,
            ),
            number(
                "Frames per second",
                f"sum({of_run('frames_per_second', BY_RUN)})",
                text="Of all chosen runs.",
            ),
            number("Members", f"sum({of_run('members', BY_RUN)})", text="Of all chosen runs."),
            Panel(
                "Runs that train",
                tuple((question, "") for question, _, _ in TABLE),
                "A click on a run opens its own dashboard.",
                kind="table",
                width=24,
                columns=tuple((name, unit) for _, name, unit in TABLE),
            ),
            Panel(
                "Progress",
                ((of_run("curriculum_progress_ratio", BY_RUN), "{{namespace}}/{{run}}"),),
                unit="percentunit",
                defaults=RATIO,
                width=12,
            ),
            Panel(
                "Frames per second",
                ((of_run("frames_per_second", BY_RUN), "{{namespace}}/{{run}}"),),
                stacked=True,
                width=12,
            ),
            Panel(
                "Start by the operator",
                (
                    (
                        f"max by ({BY_RUN}) (demoreset_operator_run_start_frame{{{PATTERN}}})",
                        "{{namespace}}/{{run}}",
                    ),
                ),
                "Also of runs that have no pods now.",
                defaults={"min": 0},
            ),
            Panel(
                "Restarts by cause",
                (
                    (
                        "sum by (cause) "
                        "(increase(demoreset_operator_restarts_total[$__rate_interval]))",
                        "{{cause}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Restarts by run",
                (
                    (
                        f"sum by ({BY_RUN}) (increase("
                        f"demoreset_operator_run_restarts{{{PATTERN}}}[$__rate_interval]))",
                        "{{namespace}}/{{run}}",
                    ),
                ),
                stacked=True,
            ),
        ),
    ),
    Row(
        "The operator",
        (
            Panel(
                "Reconciles",
                (
                    (
                        "sum by (result) "
                        "(rate(demoreset_operator_reconciles_total[$__rate_interval]))",
                        "{{result}}",
                    ),
                ),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "Time of a reconcile",
                tuple(
                    (
                        f"histogram_quantile({share},sum by (le) "
                        "(rate(demoreset_operator_reconcile_seconds_bucket[$__rate_interval])))",
                        legend,
                    )
                    for share, legend in ((0.5, "median"), (0.99, "99th percentile"))
                ),
                unit="s",
                defaults={"min": 0},
            ),
            Panel(
                "Runs that wait to be looked at",
                (("max(demoreset_operator_queue_depth)", "in the queue"),),
                defaults={"min": 0},
            ),
            Panel(
                "Requests to the API server",
                (
                    (
                        "sum by (verb,code) "
                        "(rate(demoreset_operator_api_requests_total[$__rate_interval]))",
                        "{{verb}} {{code}}",
                    ),
                ),
                unit="reqps",
                stacked=True,
                width=16,
            ),
            Panel(
                "Operators that act",
                (("sum(demoreset_operator_is_leader)", "hold the Lease"),),
                "One, always.",
                defaults={"min": 0, "decimals": 0},
            ),
        ),
    ),
)


def variable(name: str, query: str, *, several: bool) -> Object:
    """A choice on top of the dashboard, filled from label values."""
    return {
        "name": name,
        "type": "query",
        "label": name,
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"variable-{name}"},
        "refresh": 2,
        "sort": 1,
        "multi": several,
        "includeAll": several,
        **({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if several else {}),
    }


def dashboard(uid: str, title: str, rows: tuple[Row, ...], *, several: bool) -> Object:
    """What Grafana imports. `several`: of namespaces and runs many can be chosen."""
    known = "demoreset_operator_run_failed" if several else "demoreset_heartbeat_timestamp_seconds"
    return {
        "uid": uid,
        "title": title,
        "tags": ["demoreset"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "links": [
            {
                "type": "dashboards",
                "title": "demoreset",
                "tags": ["demoreset"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "label": "datasource",
                    "query": "prometheus",
                    "refresh": 1,
                },
                variable("namespace", f"label_values({known}, namespace)", several=several),
                variable(
                    "run",
                    f'label_values({known}{{namespace=~"$namespace"}}, run)',
                    several=several,
                ),
            ]
        },
        "annotations": {"list": []},
        "panels": placed(rows),
    }


def placed(rows: tuple[Row, ...]) -> list[Object]:
    """All panels, from left to right and from top to bottom."""
    made: list[Object] = []
    top = 0
    for row in rows:
        grid = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": grid,
                "panels": [],
            }
        )
        left, top, height = 0, top + 1, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top, height = 0, top + height, 0
            wanted = LOW if panel.kind == "stat" else HEIGHT
            grid = {"x": left, "y": top, "w": panel.width, "h": wanted}
            made.append({"id": len(made) + 1, "gridPos": grid, **drawn(panel)})
            left, height = left + panel.width, max(height, wanted)
        top += height
    return made


def drawn(panel: Panel) -> Object:
    """One panel, but its place."""
    table = panel.kind == "table"
    made: Object = {
        "type": panel.kind,
        "title": panel.title,
        **({"description": panel.text} if panel.text else {}),
        "datasource": SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": question,
                **({"legendFormat": legend} if legend else {}),
                **({"format": "table", "instant": True} if table else {}),
            }
            for index, (question, legend) in enumerate(panel.questions)
        ],
        "fieldConfig": {"defaults": {"unit": panel.unit, **panel.defaults}, "overrides": []},
        "options": {},
    }
    match panel.kind:
        case "stat":
            made["options"] = {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "colorMode": "value",
                "graphMode": "area",
                "textMode": "auto",
            }
        case "timeseries":
            made["options"] = {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
            made["fieldConfig"]["defaults"]["custom"] = {
                "fillOpacity": 30 if panel.stacked else 5,
                "lineWidth": 1,
                "showPoints": "never",
                "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            }
            if panel.dashed:
                made["fieldConfig"]["overrides"] = [
                    {
                        "matcher": {"id": "byName", "options": panel.dashed},
                        "properties": [
                            {
                                "id": "custom.lineStyle",
                                "value": {"fill": "dash", "dash": [10, 10]},
                            },
                            {"id": "color", "value": {"mode": "fixed", "fixedColor": "gray"}},
                        ],
                    }
                ]
        case "table":
            names = {f"Value #{one['refId']}": one["refId"] for one in made["targets"]}
            titles = dict(zip(names, (name for name, _ in panel.columns), strict=True))
            made["transformations"] = [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {"excludeByName": {"Time": True}, "renameByName": titles},
                },
            ]
            link = {
                "title": "The run",
                "url": "/d/demoreset-run?var-datasource=${datasource}"
                "&var-namespace=${__data.fields.namespace}&var-run=${__data.fields.run}",
            }
            made["fieldConfig"]["overrides"] = [
                {
                    "matcher": {"id": "byName", "options": name},
                    "properties": [{"id": "unit", "value": unit}],
                }
                for name, unit in panel.columns
            ] + [
                {
                    "matcher": {"id": "byName", "options": "run"},
                    "properties": [{"id": "links", "value": [link]}],
                }
            ]
    return made


def files() -> dict[str, str]:
    """Names and contents."""
    return {
        f"dashboard-{name}.json": json.dumps(made, indent=1) + "\n"
        for name, made in (
            ("run", dashboard("demoreset-run", "demoreset: a run", RUN, several=False)),
            ("fleet", dashboard("demoreset-fleet", "demoreset: all runs", FLEET, several=True)),
        )
    }


if __name__ == "__main__":
    for name, text in files().items():
        (FILES / name).write_text(text)
