"""Finding a demonstration: time until `demo explore` has a first one, over seeds.

    python benchmarks/explore.py                                   # the first key
    python benchmarks/explore.py --score 2500 --seconds 300 --seeds 3

A search then goes on for shorter ways, and for those that survive small disturbances; here it ends
with the first. The result is that of the score: results/explore-SCORE.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from demoreset_trainer.explore import Archive, explore
from demoreset_trainer.machine import cores
from measure import machine, write


def find(game: str, score: int, seed: int, seconds: float) -> dict[str, Any]:
    """One search, until it has found a way or the time is over."""
    archive = Archive(game, seed, score)
    begun = time.monotonic()

    def over() -> bool:
        return bool(archive.candidates) or time.monotonic() - begun > seconds

    for _ in explore(archive, decisions=10**9, processes=cores(), stopping=over):
        pass
    return {
        "seed": seed,
        "found": bool(archive.candidates),
        "seconds": round(time.monotonic() - begun, 1),
        "decisions": archive.decisions,
        "wayDecisions": len(archive.candidates[0]) if archive.candidates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--game", default="montezuma_revenge")
    parser.add_argument("--score", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="of one search, at most")
    parser.add_argument("--out", type=Path, help="the result as JSON; default: results/")
    options = parser.parse_args()
    on = machine(("demoreset", "ale-py", "numpy", "opencv-python-headless"))
    searches = []
    for seed in range(options.seeds):
        searches.append(find(options.game, options.score, seed, options.seconds))
        print(searches[-1], flush=True)
    found = [one["seconds"] for one in searches if one["found"]]
    if found:
        print(f"{len(found)} of {len(searches)}: median {statistics.median(found):.0f} s")
    write(
        {"game": options.game, "score": options.score, "machine": on, "searches": searches},
        options.out,
        f"explore-{options.score}",
    )


if __name__ == "__main__":
    main()
