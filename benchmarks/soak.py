"""The soak: a run with three members, of which one is killed again and again, to its goal.

    python benchmarks/soak.py --every 20

It is the run of `make demo` as a user types it. What it took is written to results/soak.json; the
run's folder, with a film of the policy from the game's own start, is left in --dir.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from injured import CLI, Watched, check
from measure import RESULTS, machine

RUN = Path(__file__).parents[1] / "demos/montezuma-first-key.yaml"


def soak(folder: Path, members: int, every: float) -> dict[str, object]:
    """Train to the end with a kill of any member every so many seconds."""
    run = folder / "run"
    command = [*CLI, "run", "-f", str(RUN), "--dir", str(run), "--members", str(members)]
    watched = Watched(folder, members, [[*command, "--log", "plain"]])
    (process,) = watched.processes
    watched.whole()
    due, kills = time.monotonic() + every, 0
    while process.poll() is None:
        if time.monotonic() < due:
            time.sleep(0.2)
            continue
        due += every
        kills += watched.kill_any()
        print(f"  {kills} killed; {watched.said().splitlines()[-1]}", flush=True)
    watched.log.close()
    told = json.loads((run / "summary.json").read_text())
    wanted = ("goalMet", "frames", "seconds", "successRate", "startReachedSeconds", "recoveries")
    return {
        "exitCode": process.returncode,
        "members": members,
        "everySeconds": every,
        "kills": kills,
        **{name: told[name] for name in (*wanted, "goodput")},
        **check(watched.look()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--every", type=float, default=20.0, help="seconds from kill to kill")
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"), help="a new folder")
    options = parser.parse_args()
    options.dir.mkdir(parents=True)
    on = machine(("demoreset", "torch", "torchft"))
    found = soak(options.dir, options.members, options.every)
    (RESULTS / "soak.json").write_text(json.dumps({**found, "machine": on}, indent=2) + "\n")
    print(found)
    run = str(options.dir / "run")
    subprocess.run([*CLI, "video", run, "--force"], check=True)
    evaluate = (
        "evaluate",
        run,
        "--noise",
        "none,sticky",
        "--act",
        "sampled",
        "--max-frames",
        "3600",
    )
    sys.exit(subprocess.run([*CLI, *evaluate]).returncode)


if __name__ == "__main__":
    main()
