"""Learning: frames and minutes until the goal, over seeds, and the honest controls.

    python benchmarks/learning.py default --goal 0.93 --seeds 5   # what `make demo` does
    python benchmarks/learning.py "no curriculum" "uniform starts" "guide alone" --frames 2000000
    python benchmarks/learning.py --demo pe.demo.safetensors --end 1009 default --minutes 60

Each run goes through the same loop, in this process, and adds a line to results/learning.jsonl;
`--show` prints the table of all lines. Times are wall clock, so let nothing else run.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from demoreset_trainer.machine import cores, settle

settle()


from demoreset_api.spec import RunSpec
from demoreset_trainer import demo as demos
from demoreset_trainer import lives
from demoreset_trainer.assemble import assemble
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.curriculum import Guidance, Result
from demoreset_trainer.demo import Demo
from demoreset_trainer.episode import rules
from demoreset_trainer.group import Alone
from demoreset_trainer.play import play
from demoreset_trainer.progress import Progress
from demoreset_trainer.slots import Begin, Slots
from measure import RESULTS, machine

STICKY = {"environment": {"stickyProbability": 0.25}}
# What is changed in the spec.
CONDITIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no guide": {"curriculum": {"guide": 0}},
    "no guide, exploring 8": {"curriculum": {"guide": 0, "exploreFrames": 8}},
    "no guide, exploring 40": {"curriculum": {"guide": 0, "exploreFrames": 40}},
    "original": {"curriculum": {"mode": "Original"}},
    "sticky": STICKY,
    "recurrent": {"policy": {"recurrent": True}},
    "no curriculum": {"curriculum": {"guide": 0}},
    "uniform starts": {"curriculum": {"guide": 0}},
    "no guide, sticky": STICKY | {"curriculum": {"guide": 0}},
    "no curriculum, sticky": STICKY | {"curriculum": {"guide": 0}},
    "uniform starts, sticky": STICKY | {"curriculum": {"guide": 0}},
    "guide alone": {},
    "guide alone, sticky": STICKY,
    "random policy": {},
}
# Controls, whose starts never move, and whether they are uniform over the demo.
FIXED = {
    "no curriculum": False,
    "uniform starts": True,
    "no curriculum, sticky": False,
    "uniform starts, sticky": True,
    "guide alone": False,
    "guide alone, sticky": False,
}


class Fixed:
    """A control: starts that never move. Its frontier says where most of them are."""

    def __init__(self, demo: Demo, frame_skip: int, *, uniform: bool) -> None:
        self._starts = len(demo) // frame_skip
        self._skip, self._uniform = frame_skip, uniform
        self._last = 0.0
        self.frontier = 0

    def choose(self, slot: int, random: np.random.Generator) -> int:
        return int(random.integers(self._starts)) * self._skip if self._uniform else 0

    def record(self, results: Sequence[Result]) -> None:
        if results:
            self._last = sum(result.success for result in results) / len(results)

    def success_rate(self) -> float:
        return self._last

    def guidance(self) -> Guidance:
        return Guidance(0, self._starts, np.ones(self._starts))

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Diary:
    """Watch and saver of a run that is not kept."""

    overtaken = lives.NOBODY

    def __init__(self, name: str) -> None:
        self.name, self.told = name, time.monotonic()
        self.latest: Progress | None = None
        self.earliest = 10**9

    def phase(self, name: str) -> None:
        pass

    def update(self, progress: Progress) -> None:
        self.latest = progress
        self.earliest = min(self.earliest, progress.start_frame)
        if time.monotonic() - self.told > 15:
            self.told = time.monotonic()
            p = progress
            print(
                f"  {self.name}: {p.seconds:.0f} s, {p.frames / 1e6:.2f} M frames, start "
                f"{p.start_frame}, success {p.success_rate:.2f}, from the start {p.goal_rate}",
                flush=True,
            )

    def note(self, text: str) -> None:
        print(f"  {self.name}: {text}", flush=True)

    def due(self) -> bool:
        return False

    def save(self, snapshot: Snapshot, *, candidate: bool) -> None:
        pass

    def finish(self, snapshot: Snapshot, *, candidate: bool) -> bool:
        return True

    def take_life(self) -> int:
        return 1

    def facts(self) -> dict[str, Any]:
        return {}


def learn(
    demo: Demo, name: str, condition: str, seed: int, goal: float, frames: int, seconds: float
) -> dict[str, Any]:
    changes = CONDITIONS[condition]
    spec = RunSpec.model_validate(
        {
            "demo": {"name": "x"},
            "seed": seed,
            "goal": {"successRate": goal},
            "budget": {"frames": frames},
            **changes,
        }
    )
    diary = Diary(f"{name}, {condition}, seed {seed}")
    loop = assemble(spec, demo, group=Alone(), watch=diary, saver=diary, find=lambda: (1, None))
    if condition in FIXED:
        loop.state.curriculum = Fixed(demo, 4, uniform=FIXED[condition])
    load = os.getloadavg()[0]
    begun = time.monotonic()
    if condition != "random policy":
        loop.run(lambda: time.monotonic() - begun > seconds)
    policy = loop.ppo.policy
    with Slots(demo, rules(spec), policy.shape.view, slots=32, processes=cores()) as slots:
        begins = [Begin(0, 1000 + number) for number in range(100)]
        played = play(slots, policy, begins, seed=seed)
    latest = diary.latest
    return {
        "demo": name,
        "condition": condition,
        "guide": spec.curriculum.in_force.guide if condition != "random policy" else 0,
        "entropy": spec.entropy if condition != "random policy" else 0,
        "seed": seed,
        "goal": goal,
        "goalMet": loop.state.goal.met,
        "seconds": round(latest.seconds, 1) if latest else 0,
        "frames": latest.frames if latest else 0,
        "startReachedSeconds": loop.state.counters.start_reached_seconds,
        "startReachedFrames": loop.state.counters.start_reached_frames,
        "earliestStart": diary.earliest if latest else None,
        "demoFrames": len(demo),
        "success100": sum(episode.success for episode in played) / 100,
        "loadBefore": round(load, 2),
        "machine": machine(("demoreset", "torch", "ale-py", "numpy")),
        "last": asdict(latest) if latest else None,
    }


def show(path: Path) -> None:
    # What is said of a row holds for all of its runs.
    columns = ("demo", "condition", "guide", "entropy", "goal")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        groups.setdefault(tuple(entry[column] for column in columns), []).append(entry)
    print(f"| {' | '.join(columns)} | runs | goal met | median min (all) | median M frames |")
    print("| --- " * (len(columns) + 4) + "|")
    for row, entries in groups.items():
        minutes = [entry["seconds"] / 60 for entry in entries]
        met = sum(entry["goalMet"] for entry in entries)
        frames = statistics.median(entry["frames"] for entry in entries) / 1e6
        print(
            f"| {' | '.join(map(str, row))} | {len(entries)} | {met} | "
            f"{statistics.median(minutes):.1f} ({', '.join(f'{m:.1f}' for m in minutes)}) | "
            f"{frames:.2f} |"
        )
        rates = ", ".join(f"{entry['success100']:.0%}" for entry in entries)
        starts = ", ".join(str(entry["earliestStart"]) for entry in entries)
        print(f"  success of 100: {rates}; earliest start: {starts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("conditions", nargs="*", metavar="CONDITION", help=", ".join(CONDITIONS))
    parser.add_argument("--demo", default="montezuma-first-key", help="a bundled one, or a file")
    parser.add_argument("--end", type=int, help="learn this many frames of it")
    parser.add_argument("--name", help="what the table calls it")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--goal", type=float, default=0.9, help="share that ties the demo")
    parser.add_argument("--frames", type=int, default=12_000_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.jsonl")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    unknown = set(options.conditions) - set(CONDITIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CONDITIONS)}")
    demo = demos.resolve(options.demo)
    if options.end:
        demo = demo.prefix(options.end)
    name = options.name or Path(options.demo).name.removesuffix(demos.SUFFIX)
    for condition in options.conditions:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            entry = learn(
                demo, name, condition, seed, options.goal, options.frames, options.minutes * 60
            )
            with options.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print({key: entry[key] for key in list(entry)[:13]}, flush=True)
    if options.show:
        show(options.out)


if __name__ == "__main__":
    main()
