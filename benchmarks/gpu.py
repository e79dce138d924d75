"""A whole training on a GPU: frames per second and where the time goes, preset by preset.

Each trains on the bundled Montezuma demo as `demoreset run` puts it together; the figures are
medians over the later half of its updates, with CUDA graphs and without.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from demoreset_api.names import ENV_CUDA_GRAPHS
from demoreset_trainer import demo as demos
from demoreset_trainer.machine import settle
from measure import machine, write

DEMO = "montezuma-first-key"
PHASES = ("rollout", "optimise", "record")
LEAST = 8  # updates


def train(preset: str, slots: int, seconds: float, *, graphs: bool) -> dict[str, Any]:
    """Train for so many seconds; medians per update."""
    import torch

    from demoreset_api.spec import RunSpec
    from demoreset_trainer.assemble import assemble
    from demoreset_trainer.group import Alone

    demo = demos.resolve(DEMO)
    spec = RunSpec.model_validate(
        {
            "demo": {"name": DEMO},
            "policy": {"preset": preset},
            "environment": {"slots": slots},
            "goal": {"successRate": 1.0, "episodes": 1_000_000},
        }
    )
    updates: list[tuple[float, dict[str, float]]] = []
    watch: Any = SimpleNamespace(
        phase=lambda name: None,
        note=print,
        update=lambda progress: updates.append((time.monotonic(), progress.phase_seconds)),
    )
    saver: Any = SimpleNamespace(due=lambda: False, facts=dict)
    os.environ[ENV_CUDA_GRAPHS] = str(int(graphs))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loop = assemble(spec, demo, group=Alone(), watch=watch, saver=saver, find=lambda: (1, None))
    end = time.monotonic() + seconds
    loop.run(lambda: len(updates) >= LEAST and time.monotonic() > end)
    warm = updates[len(updates) // 2 :]
    times = [at for at, _ in warm]
    length = statistics.median(later - at for at, later in itertools.pairwise(times))
    frames = slots * spec.ppo.rollout_length * spec.environment.frame_skip
    return {
        "preset": preset,
        "slots": slots,
        "graphs": graphs,
        "updates": len(warm),
        "framesPerSecond": round(frames / length),
        "updateMs": round(1e3 * length, 1),
        **{
            f"{name}Ms": round(1e3 * statistics.median(phases[name] for _, phases in warm), 1)
            for name in PHASES
        },
        "gpuMiB": round(torch.cuda.max_memory_reserved() / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["Small", "Base", "Original"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64])
    parser.add_argument("--seconds", type=float, default=10, help="of each (%(default)s)")
    parser.add_argument("--out", type=Path, help="the result as JSON; default: results/gpu.json")
    options = parser.parse_args()
    settle()
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU is here")
    rows = []
    print(f"{'preset':10}{'slots':>6}{'graphs':>8}{'frames/s':>10}{'rollout':>9}{'optimise':>9}")
    for preset, slots, graphs in itertools.product(options.presets, options.slots, (True, False)):
        row = train(preset, slots, options.seconds, graphs=graphs)
        rows.append(row)
        print(
            f"{preset:10}{slots:>6}{graphs!s:>8}{row['framesPerSecond']:>10,}"
            f"{row['rolloutMs']:>7.1f}ms{row['optimiseMs']:>7.1f}ms",
            flush=True,
        )
    facts = machine(("demoreset", "torch", "ale-py", "numpy"))
    facts["gpu"] = torch.cuda.get_device_name()
    write({"machine": facts, "rows": rows}, options.out, "gpu")


if __name__ == "__main__":
    main()
