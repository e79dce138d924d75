"""How long it takes to sum gradients over members on one machine, through torchft's gloo.

    python benchmarks/collectives.py

So that a reader can tell when gloo stops serving: 12 sums of a gradient are in an update of the
default run. Let nothing else run.
"""

import json
import multiprocessing
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    TCPStore,
)
from torchft.process_group import ProcessGroupGloo

from demoreset_trainer.network import bind_gloo_to
from measure import RESULTS, machine

MEMBERS, MEGABYTES, SUMS = (2, 4), (5, 12, 38), 40
SUMS_PER_UPDATE = 12


def member(address: str, rank: int, members: int, out: Any) -> None:
    torch.set_num_threads(1)
    bind_gloo_to("127.0.0.1")
    group = ProcessGroupGloo(timeout=timedelta(seconds=30))
    group.configure(f"{address}/{members}", str(rank), rank, members)
    for size in MEGABYTES:
        gradient = torch.ones(size * 250_000)
        times = []
        for _ in range(SUMS + 5):
            begun = time.perf_counter()
            group.allreduce([gradient], AllreduceOptions()).wait(timedelta(seconds=30))
            times.append(time.perf_counter() - begun)
            gradient.fill_(1.0)
        if rank == 0:
            out.put((members, size, sorted(times[5:])))
    group.abort(errored=False)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    entries = []
    for members in MEMBERS:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        out = context.Queue()
        processes = [
            context.Process(target=member, args=(f"127.0.0.1:{store.port}", rank, members, out))
            for rank in range(members)
        ]
        for process in processes:
            process.start()
        for _ in MEGABYTES:
            count, size, times = out.get()
            entries.append(
                {
                    "members": count,
                    "megabytes": size,
                    "medianMs": round(1000 * statistics.median(times), 1),
                    "p95Ms": round(1000 * times[round(0.95 * len(times)) - 1], 1),
                    "secondsPerUpdate": round(SUMS_PER_UPDATE * statistics.median(times), 3),
                }
            )
            print(entries[-1], flush=True)
        for process in processes:
            process.join()
    content = {"entries": entries, "machine": machine(("torch", "torchft"))}
    (RESULTS / "collectives.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
