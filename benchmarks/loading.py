"""Seconds to load a long demo with all its start states: made anew, and from the cache.

Each time in a new process, on one core. The demo is Montezuma's of 53,061 frames, as published
with atari-reset, if DEMORESET_PUBLISHED_DEMOS names the folder that it lies in; otherwise one of
the same length in which nothing is done. The imports of Python's modules do not count.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from demoreset_trainer import demo as demos
from measure import arguments, machine, write

FRAMES = 53_061
SKIP = 4
LIMITS = {"cold": 10.0, "cached": 1.0}
PUBLISHED = "MontezumaRevenge.demo"
PACKAGES = ("demoreset", "ale-py", "numpy", "opencv-python-headless")


def demonstration() -> tuple[demos.Demo, str]:
    """The demo, and what it is."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "demos"
    file = Path(os.environ.get("DEMORESET_PUBLISHED_DEMOS") or beside) / PUBLISHED
    if file.exists():
        from demoreset_trainer import demo_import

        return demo_import.read(file), "published"
    nothing = np.zeros(FRAMES, np.uint8)
    return demos.record("montezuma_revenge", nothing, frame_skip=SKIP), "nothing is done"


def load(link: Connection, file: str) -> None:
    """Read the demo and all its start states; send seconds, CPU seconds and their number."""
    from demoreset_trainer.states import View, start_states

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    begun, busy = time.perf_counter(), time.process_time()
    states = start_states(demos.load(Path(file)), View(), SKIP)
    for index in range(len(states)):  # they are mapped: unread, they would cost nothing
        states.state(index)
        states.images[index].max()
    link.send((time.perf_counter() - begun, time.process_time() - busy, len(states)))


def timed(file: Path) -> tuple[float, float, int]:
    """Load in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=load, args=(there, str(file)))
    process.start()
    there.close()
    answer: tuple[float, float, int] = here.recv()
    process.join()
    return answer


def main() -> None:
    options = arguments(__doc__, seconds=0).parse_args()
    demo, kind = demonstration()
    taken: dict[str, list[float]] = {name: [] for name in LIMITS}
    busy: dict[str, list[float]] = {name: [] for name in LIMITS}
    states = cached_bytes = 0
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"long{demos.SUFFIX}"
            demo.save(file)
            cache = Path(folder) / "cache"
            os.environ["DEMORESET_CACHE"] = str(cache)  # the new processes inherit it
            for name in taken:
                seconds, of_cpu, states = timed(file)
                taken[name].append(round(seconds, 3))
                busy[name].append(round(of_cpu, 3))
            cached_bytes = sum(path.stat().st_size for path in cache.rglob("*.npy"))
    print(
        f"{len(demo):,} frames ({kind}), {states:,} start states, {cached_bytes >> 20} MiB cached"
    )
    for name, values in taken.items():
        print(
            f"{name:8}{statistics.median(values):8.3f} s, of which the core worked "
            f"{statistics.median(busy[name]):.3f} (each: {values}; wanted: under {LIMITS[name]:g})"
        )
    result = {
        "machine": machine(PACKAGES),
        "demo": kind,
        "frames": len(demo),
        "startStates": states,
        "cacheBytes": cached_bytes,
        "seconds": taken,
        "cpuSeconds": busy,
        "medianSeconds": {name: statistics.median(values) for name, values in taken.items()},
        "limits": LIMITS,
    }
    write(result, options.out, "loading")


if __name__ == "__main__":
    main()
