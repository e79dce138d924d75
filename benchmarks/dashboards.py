"""Pictures of the dashboards: what a real Prometheus saw of a run that lost a worker.

    python benchmarks/dashboards.py --out docs    # writes dashboard-run.png and dashboard-fleet.png

On the test cluster (`../shared/kubernetes`, or DEMORESET_TEST_CLUSTER), with Debian's `prometheus`:
Montezuma's first key with two workers of one core each, one of which is killed half-way. The
answers to the dashboards' own questions are kept in a file and drawn from there, as Grafana would.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import yaml

import panels

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/cluster"))

import boards
import kube
import prometheus
from boards import Chosen
from kube import Cluster, Json, until
from told import CORE, Told

NAMESPACE, RUN = "games", "montezuma-first-key"
STEP = 5  # seconds between points
CHOSEN = Chosen(NAMESPACE, RUN, "1m")  # Grafana's interval for rates at the chart's scrapes, 15 s


def wanted() -> Json:
    """The run of the repository, with two workers."""
    body: Json = yaml.safe_load((ROOT / f"demos/{RUN}.yaml").read_text())
    body["spec"]["workers"] = {"min": 1, "max": 2, "resources": CORE}
    body["spec"]["checkpoint"] = {"volume": {"size": "1Gi", "retention": "Delete"}}
    return body


def injured(cluster: Cluster) -> None:
    """Train to the goal; a worker is lost when the start has moved half-way back."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.apply(NAMESPACE, wanted())
    run = Told(cluster, NAMESPACE, RUN)
    run.ready(2)

    def half() -> bool:
        place = run.status["curriculum"]
        return bool(place["startFrame"] < place["demoFrames"] / 2)

    until(half, "half-way", 1200)
    run.kill(sorted(run.live())[-1])
    until(lambda: run.status["phase"] == "Complete", "complete", 2400)


def record(answers: Path) -> None:
    """The run, and what Prometheus answers about it, into a file."""
    image = prometheus.image()
    assert image is not None, "no Prometheus: apt-get install prometheus"
    with kube.started(nodes=2) as cluster, kube.installed(cluster) as operator:
        objects = prometheus.rendered(cluster, operator)
        start = time.time()
        with prometheus.started(cluster, objects, image) as seen:
            injured(cluster)
            end = time.time()
            series = {
                one.expression: seen.series(one.expression, start, end, STEP)
                for board in boards.dashboards(objects)
                for one in boards.of_panels(board, CHOSEN)
            }
        kept = {"start": start, "end": end, "step": STEP, "series": series}
        answers.write_text(json.dumps(kept))
        cluster.kubectl("delete", "namespace", NAMESPACE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--answers", type=Path, default=Path("/tmp/dashboards.json"))
    parser.add_argument("--again", action="store_true", help="draw the answers that are kept")
    options = parser.parse_args()
    if not options.again:
        record(options.answers)
    answers = panels.Answers(**json.loads(options.answers.read_text()))
    for file in sorted((ROOT / "charts/demoreset/files").glob("dashboard-*.json")):
        panels.draw(
            json.loads(file.read_text()), answers, CHOSEN.fill, options.out / f"{file.stem}.png"
        )


if __name__ == "__main__":
    main()
