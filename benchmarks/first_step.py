"""From `kubectl apply` to the first update in a real pod, part by part, on an idle cluster.

    python benchmarks/first_step.py --trials 5

On the test cluster, as `faults_cluster`; the run is the bundled `montezuma-2500`, with its own
settings and one worker. A part ends when a watch tells so, or a member's own events do.
"""

import argparse
import json
import statistics
import subprocess
import threading
import time
from typing import Any

from faults_cluster import Deployed, cluster, prepared
from injured import PATIENCE
from measure import RESULTS, machine

PARTS = ("operator", "schedule", "container", "import", "load", "first update")


class Pods:
    """What a watch tells of a namespace's workers, with the time."""

    def __init__(self, run: Deployed) -> None:
        words = ("get", "pods", "-n", run.told.namespace, "-l", "demoreset.dev/worker=0")
        self._process = subprocess.Popen(
            ["kubectl", *words, "--watch", "--output=json"],
            env=run.told.cluster.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: dict[str, float] = {}  # when something was first so
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        text = ""
        for line in self._process.stdout:
            text += line
            if line.rstrip() == "}":  # the end of an object
                self._tell(json.loads(text), time.monotonic())
                text = ""

    def _tell(self, pod: dict[str, Any], now: float) -> None:
        status = pod["status"]
        conditions = {one["type"]: one["status"] for one in status.get("conditions", ())}
        running = any("running" in one["state"] for one in status.get("containerStatuses", ()))
        for what, so in (
            ("exists", True),
            ("scheduled", conditions.get("PodScheduled") == "True"),
            ("running", running),
        ):
            if so:
                self.seen.setdefault(what, now)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def parts(run: Deployed, applied: float, pods: Pods) -> dict[str, float]:
    """Seconds of each part."""

    def first(event: str) -> float | None:
        return next((one["time"] for one in run.events if one["event"] == event), None)

    run.find()
    run.wait(lambda: first("commit"), "an update", PATIENCE)
    ends = [pods.seen["exists"], pods.seen["scheduled"], pods.seen["running"]]
    for event in ("imported", "quorum", "commit"):
        happened = first(event)
        assert happened is not None, event
        ends.append(happened)
    begins = [applied, *ends[:-1]]
    return dict(zip(PARTS, (b - a for a, b in zip(begins, ends, strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    trials = []
    with cluster() as (made, _):
        on = machine(("demoreset", "torch", "kubernetes"))
        for number in range(options.trials):
            with prepared(made, 1, environment={}, ppo={}) as run:
                pods = Pods(run)
                time.sleep(1)  # until the watch stands
                applied = run.apply()
                trials.append(parts(run, applied, pods))
                pods.close()
            print(f"  {number + 1}/{options.trials}: {trials[-1]}", flush=True)
    medians = {part: round(statistics.median(one[part] for one in trials), 3) for part in PARTS}
    medians["all"] = round(statistics.median(sum(one.values()) for one in trials), 3)
    print(medians)
    found = {"median": medians, "trials": trials, "machine": on}
    (RESULTS / "first-step.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
