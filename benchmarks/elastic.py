"""What a group costs when nothing fails, and what a second member brings.

    python benchmarks/elastic.py overhead --seconds 60
    python benchmarks/elastic.py scaling --seconds 60
    python benchmarks/elastic.py coordinator

overhead: one member of a group with a coordinator, beside the same run alone, in turns, one core
each. scaling: one member with one core, and two with one core each. coordinator: its memory, and
how soon it listens. Let nothing else run.
"""

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demoreset_trainer.metrics import NAME, read
from measure import RESULTS, machine

RUN = Path(__file__).parents[1] / "demos/montezuma-first-key.yaml"
CLI = [sys.executable, "-m", "demoreset_trainer.cli"]
STARTS = 10  # of a coordinator
WARM = 5  # updates that are left out
ENDLESS = ("--set", "spec.goal.successRate=1", "--set", "spec.goal.episodes=1000000")


def trained(command: list[str], cores: set[int], seconds: float) -> list[dict[str, Any]]:
    """The lines of a run's metrics, after so many seconds on these cores."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "-f", str(RUN), "--dir", folder, "--log", "json", *ENDLESS],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        metrics = Path(folder) / NAME
        while not metrics.exists() or len(read(metrics)) < WARM:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.2)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        return read(metrics)[WARM:]


def listening() -> tuple[subprocess.Popen[str], str]:
    """A coordinator and its address."""
    process = subprocess.Popen(
        [*CLI, "coordinator", "--port", "0", "--host", "127.0.0.1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    found = re.search(r"port (\d+)", process.stderr.readline())
    assert found
    return process, f"127.0.0.1:{found[1]}"


def pace(lines: list[dict[str, Any]]) -> float:
    """Median seconds of an update."""
    gaps = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(lines)]
    return float(statistics.median(gaps))


def share(lines: list[dict[str, Any]], *phases: str) -> float:
    """Median share of these phases in the time of an update."""
    shares = []
    for line in lines:
        total = sum(line["phase_seconds"].values())
        shares.append(sum(line["phase_seconds"].get(phase, 0.0) for phase in phases) / total)
    return float(statistics.median(shares))


def overhead(seconds: float, turns: int) -> dict[str, Any]:
    helper, address = listening()
    alone, group = [], []
    try:
        for _ in range(turns):
            alone.append(trained([*CLI, "run"], {0}, seconds))
            worker = [*CLI, "worker", "--members", "1", "--coordinator", address, "--port", "0"]
            group.append(trained(worker, {0}, seconds))
    finally:
        helper.terminate()
        helper.wait()
    return {
        "aloneSeconds": [round(pace(lines), 4) for lines in alone],
        "groupSeconds": [round(pace(lines), 4) for lines in group],
        "ratio": [round(pace(b) / pace(a), 4) for a, b in zip(alone, group, strict=True)],
        "quorumAndCopyShare": [round(share(lines, "quorum", "copy"), 4) for lines in group],
        "updates": [len(lines) for lines in group],
    }


def scaling(seconds: float, turns: int) -> dict[str, Any]:
    one, two = [], []
    for _ in range(turns):
        one.append(trained([*CLI, "run"], {0}, seconds))
        two.append(trained([*CLI, "run", "--members", "2"], {0, 1}, seconds))
    frames = [[lines[-1]["frames"] - lines[0]["frames"] for lines in runs] for runs in (one, two)]
    times = [[lines[-1]["seconds"] - lines[0]["seconds"] for lines in runs] for runs in (one, two)]
    speeds = [
        [round(f / t) for f, t in zip(*pair, strict=True)]
        for pair in zip(frames, times, strict=True)
    ]
    return {
        "framesPerSecond1": speeds[0],
        "framesPerSecond2": speeds[1],
        "ratio": [round(b / a, 3) for a, b in zip(*speeds, strict=True)],
        "quorumShare": [round(share(lines, "quorum"), 4) for lines in two],
    }


def coordinator() -> dict[str, Any]:
    memory, waited = [], []
    for _ in range(STARTS):
        begun = time.monotonic()
        process, _ = listening()
        waited.append(time.monotonic() - begun)
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s*(\d+) kB", status)
        assert found
        memory.append(int(found[1]) / 1024)
        process.terminate()
        process.wait()
    return {
        "residentMiB": round(statistics.median(memory), 1),
        "listensAfterSeconds": round(statistics.median(waited), 3),
        "worst": {"residentMiB": round(max(memory), 1), "seconds": round(max(waited), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("overhead", "scaling", "coordinator"), nargs="+")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / "elastic.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for what in options.what:
        on = machine(("demoreset", "torch", "torchft"))
        if what == "coordinator":
            found = coordinator()
        else:
            measure = {"overhead": overhead, "scaling": scaling}[what]
            found = measure(options.seconds, options.turns)
        known[what] = {**found, "machine": on}
        print(what, json.dumps(known[what], indent=2))
    path.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
