"""Memory of a training at its peak, summed over all its processes.

RSS counts a page that processes share once for each of them; PSS divides it among them, and their
sum is what the machine has to spare. By default a short run is watched that passes through all that
a run does: it learns Freeway's first crossing, confirms its goal in environments of their own,
saves every few seconds, and plays on. Anything after `--` is watched instead:

    python benchmarks/memory.py -- make demo
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from demoreset_api.errors import ExitCode
from measure import machine, tree, write

LIMIT = 2 << 30
MB = 1 << 20
PACKAGES = ("demoreset", "torch", "ale-py", "numpy", "opencv-python-headless")


@dataclass(frozen=True)
class Moment:
    """Memory of a tree of processes, in bytes, the largest process first."""

    rss: tuple[int, ...] = ()
    pss: tuple[int, ...] = ()


def now(root: int) -> Moment:
    """Read the memory of all processes of the tree."""
    rss, pss = [], []
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        rss.append(kilobytes.get("Rss", 0) << 10)
        pss.append(kilobytes.get("Pss", 0) << 10)
    return Moment(tuple(sorted(rss, reverse=True)), tuple(sorted(pss, reverse=True)))


def watch(command: list[str], seconds: float | None, interval: float) -> tuple[Moment, Moment]:
    """Run a command; the moments of its highest RSS and its highest PSS."""
    process = subprocess.Popen(command)
    until = time.monotonic() + seconds if seconds else float("inf")
    most_rss = most_pss = Moment()
    while process.poll() is None and time.monotonic() < until:
        moment = now(process.pid)
        most_rss = max(most_rss, moment, key=lambda at: sum(at.rss))
        most_pss = max(most_pss, moment, key=lambda at: sum(at.pss))
        time.sleep(interval)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # it saves, and that counts, too
        while process.poll() is None:
            most_rss = max(most_rss, now(process.pid), key=lambda at: sum(at.rss))
            time.sleep(interval)
    elif process.returncode not in (ExitCode.DONE, ExitCode.BUDGET_SPENT):
        sys.exit(f"{command[0]}: ended with {process.returncode}; nothing is written")
    return most_rss, most_pss


def training(folder: Path, frames: int) -> list[str]:
    """The command of a run that soon meets its goal and goes on."""
    run = {
        "apiVersion": "demoreset.dev/v1alpha1",
        "kind": "DemoResetRun",
        "metadata": {"name": "memory"},
        "spec": {
            "demo": {"name": "freeway-crossing"},
            "goal": {"after": "PlayOn"},
            "checkpoint": {"intervalSeconds": 5},
            "budget": {"frames": frames},
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "demoreset_trainer.cli", "run", "-f", str(file)]
    return [*command, "--dir", str(folder / "run"), "--log", "plain"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=300_000, help="of the run (%(default)s)")
    parser.add_argument("--seconds", type=float, help="stop it then, with SIGTERM")
    parser.add_argument("--interval", type=float, default=0.25, help="between readings")
    parser.add_argument("--out", type=Path, help="the result as JSON; default: results/")
    parser.add_argument("command", nargs="*", help="watched instead of a run")
    options = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = options.command or training(Path(folder), options.frames)
        rss, pss = watch(command, options.seconds, options.interval)
    result = {
        "machine": machine(PACKAGES),
        "watched": " ".join(options.command) if options.command else "demoreset run",
        "frames": None if options.command else options.frames,
        "processes": len(rss.rss),
        "peakRssBytes": sum(rss.rss),
        "peakPssBytes": sum(pss.pss),
        "rssByProcess": rss.rss,
        "pssByProcess": pss.pss,
        "limitBytes": LIMIT,
    }
    for name, values in (("RSS", rss.rss), ("PSS", pss.pss)):
        each = ", ".join(f"{value // MB}" for value in values)
        verdict = "under" if sum(values) < LIMIT else "OVER"
        print(f"{name} at its peak: {sum(values) // MB} MiB ({each}); {verdict} {LIMIT // MB}")
    write(result, options.out, "memory")


if __name__ == "__main__":
    main()
