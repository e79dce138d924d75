"""The control: the same fault under torchrun's own elasticity, with its default settings.

    python benchmarks/torchrun.py --kills 3

Three agents on this machine, one worker each; a step sums 5 MB over the members about every 70 ms.
One agent and its worker are killed (not those of the rendezvous' host, whose loss ends the run);
measured is the time until the other two step again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, machine

AGENTS, PATIENCE = 3, 300.0
STEPS = "STEPS_FILE"


def work() -> None:
    """A worker: steps until it is killed, and writes down when."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    gradient = torch.ones(1_250_000)
    file = os.open(os.environ[STEPS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        time.sleep(0.06)
        distributed.all_reduce(gradient)
        gradient.fill_(1.0)
        size = distributed.get_world_size()
        os.write(file, f"{time.monotonic()} {os.getpid()} {os.getppid()} {size}\n".encode())


def steps(path: Path) -> list[tuple[float, int, int, int]]:
    """Time, worker, agent and size of the group, of every step."""
    if not path.exists():
        return []
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(float(row[0]), int(row[1]), int(row[2]), int(row[3])) for row in rows]


def kill_one(port: int) -> float | None:
    """Seconds until two of three step again; None where they do not within minutes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", f"2:{AGENTS}"]
        command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "control"]
        command += ["--max-restarts", "10", "--rdzv-endpoint", f"127.0.0.1:{port}", __file__]
        quiet = subprocess.DEVNULL
        environment = {**os.environ, STEPS: str(path), "GLOO_SOCKET_IFNAME": "lo"}
        agents = [
            subprocess.Popen([*command, "--work"], env=environment, stdout=quiet, stderr=quiet)
            for _ in range(AGENTS)
        ]
        try:
            begun = time.monotonic()
            while not any(size == AGENTS for *_, size in steps(path)):
                if time.monotonic() - begun > PATIENCE:
                    return None
                time.sleep(0.2)
            time.sleep(3)
            victim = agents[-1]
            workers = {agent: worker for _, worker, agent, _ in steps(path)}
            since = time.monotonic()
            victim.kill()
            os.kill(workers[victim.pid], signal.SIGKILL)
            while time.monotonic() - since < PATIENCE:
                later = [row for row in steps(path) if row[0] > since + 0.2 and row[3] < AGENTS]
                if len({worker for _, worker, _, _ in later}) == AGENTS - 1:
                    return later[0][0] - since
                time.sleep(0.2)
            return None
        finally:
            for agent in agents:
                agent.terminate()
            for agent in agents:
                try:
                    agent.wait(40)
                except subprocess.TimeoutExpired:
                    agent.kill()
            for worker in {worker for _, worker, _, _ in steps(path)}:
                if Path(f"/proc/{worker}").exists():
                    os.kill(worker, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    seconds: list[float | None] = []
    for number in range(options.kills):
        seconds.append(kill_one(29600 + number))
        print(f"  {number + 1}/{options.kills}: {seconds[-1]}", flush=True)
    recovered = [one for one in seconds if one is not None]
    content = {
        "seconds": [None if one is None else round(one, 2) for one in seconds],
        "median": round(statistics.median(recovered), 2) if recovered else None,
        "patience": PATIENCE,
        "machine": machine(("torch",)),
    }
    (RESULTS / "torchrun.json").write_text(json.dumps(content, indent=2) + "\n")
    print(content["seconds"])


if __name__ == "__main__":
    main()
