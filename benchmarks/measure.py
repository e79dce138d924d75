"""Side by side: contestants that take turns, each in a process of its own.

    A B C A B C A B C ...

On a shared machine the speed of everything changes from minute to minute; what is compared within
a round was measured within seconds of each other. While one plays, the others wait in a pipe.
Work on such a machine also gets the more of it the more processes it has: so the seconds of all
cores are counted, too, and work per second of a core compared.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from demoreset_trainer.machine import cores

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Sample:
    """What a contestant did in one round."""

    done: int
    seconds: float
    core_seconds: float = 0.0  # over all processes of the contestant
    besides: dict[str, float] = field(default_factory=dict)  # seconds of a phase, episodes, ..

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.done / self.seconds

    @property
    def per_core(self) -> float:
        """Work per second of a core."""
        return self.done / self.core_seconds


class Turn:
    """A contestant's side: called after every piece of work, it returns when the next is due."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._until = self._begun = 0.0
        self._done = 0
        self._besides: dict[str, float] = {}

    def __call__(self, done: int, besides: dict[str, float] | None = None) -> bool:
        """Count work; False when the benchmark is over."""
        now = time.perf_counter()
        self._done += done
        for name, amount in (besides or {}).items():
            self._besides[name] = self._besides.get(name, 0.0) + amount
        if now < self._until:
            return True
        sample = (
            Sample(self._done, now - self._begun, besides=self._besides) if self._begun else None
        )
        self._link.send(sample)
        seconds = self._link.recv()
        if not seconds:
            return False
        self._done, self._besides = 0, {}
        self._begun = time.perf_counter()
        self._until = self._begun + seconds
        return True


# Makes itself ready, then works in a loop, calling the turn after each piece.
Contestant = Callable[..., None]


def take_turns(
    contestants: dict[str, tuple[Contestant, tuple[Any, ...]]],
    *,
    rounds: int,
    seconds: float,
    only: Sequence[str] | None = None,
) -> dict[str, list[Sample]]:
    """Measure every contestant once in each round, after one round that does not count.

    The first contestant is ours; `only` names those of the others that take part.
    """
    ours = next(iter(contestants))
    if only is not None:
        contestants = {name: contestants[name] for name in (ours, *only)}
    context = multiprocessing.get_context("spawn")
    links: dict[str, tuple[Connection, int]] = {}
    samples: dict[str, list[Sample]] = {}
    for name, (contestant, arguments) in contestants.items():
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, contestant, arguments), name=name)
        process.start()
        there.close()
        try:
            here.recv()  # it is ready
        except EOFError:
            print(f"{name}: did not start; left out (its own lines above say why)")
            continue
        links[name], samples[name] = (here, process.pid or 0), []
    for number in range(rounds + 1):
        for name, (link, pid) in links.items():
            before = core_seconds(tree(pid))
            link.send(seconds if number else min(seconds, 2.0))
            sample: Sample = link.recv()
            if number:
                sample = replace(sample, core_seconds=core_seconds(tree(pid)) - before)
                samples[name].append(sample)
                print(
                    f"round {number}/{rounds}  {name:32}{sample.rate:10,.0f}/s on "
                    f"{sample.core_seconds / sample.seconds:.2f} cores",
                    flush=True,
                )
    for link, _ in links.values():
        link.send(0)
    return samples


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def core_seconds(pids: Iterable[int]) -> float:
    """What those of some processes that live have used so far."""
    stats = map(_stat, pids)
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats if stat)  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of a process behind its name: state, parent, ..; none when it is gone."""
    try:
        # The name, in brackets, may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _serve(link: Connection, contestant: Contestant, arguments: tuple[Any, ...]) -> None:
    try:
        contestant(Turn(link), *arguments)
    except ImportError as error:
        print(f"{error.name}: not installed")
        sys.exit(1)


def compare(samples: dict[str, list[Sample]], ours: str) -> list[dict[str, Any]]:
    """One row for each contestant; ratios are medians of the ratios within each round."""
    rows = []
    for name, taken in samples.items():
        rates = [sample.rate for sample in taken]
        pairs = list(zip(samples[ours], taken, strict=True))
        ratios = [mine.rate / theirs.rate for mine, theirs in pairs]
        per_core = [mine.per_core / theirs.per_core for mine, theirs in pairs]
        row: dict[str, Any] = {
            "name": name,
            "median": round(statistics.median(rates), 1),
            "rates": [round(rate, 1) for rate in rates],
            "oursIsTimes": round(statistics.median(ratios), 3),
            "oursIsTimesPerCore": round(statistics.median(per_core), 3),
            "coresUsed": round(statistics.median(s.core_seconds / s.seconds for s in taken), 2),
        }
        seconds = sum(sample.seconds for sample in taken)
        besides = {what for sample in taken for what in sample.besides}
        if besides:
            row["besidesPerSecond"] = {
                what: round(sum(s.besides.get(what, 0.0) for s in taken) / seconds, 3)
                for what in sorted(besides)
            }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], unit: str) -> None:
    """Print the comparison."""
    print(f"\n{'':34}{unit + '/s':>14}{'cores':>8}{'ours is':>10}{'per core':>10}")
    for row in rows:
        print(
            f"{row['name']:34}{row['median']:>14,.0f}{row['coresUsed']:>8.2f}"
            f"{row['oursIsTimes']:>8.2f} x{row['oursIsTimesPerCore']:>8.2f} x"
        )
        for what, amount in row.get("besidesPerSecond", {}).items():
            print(f"    {what} {amount:,.3g} per second")


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """What was measured on, without a trace of whose it is."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu(),
        "kind": _kind(),
        "cores": cores(),
        "commit": _commit(),
        "python": sys.version.split()[0],
        "versions": versions,
        "loadBefore": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str:
    """The commit that was measured, with a plus where the product's files differ from it."""
    git = ("git", "-C", str(RESULTS.parent))
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../trainer", "../operator"])
    return head.stdout.strip() + "+" * bool(same.returncode)


def _cpu() -> str:
    return _about_cpu("model name") or "unknown"


def _kind() -> str:
    """Of machine: by what decides most how fast a run trains on it."""
    return ("" if "avx512_bf16" in _about_cpu("flags").split() else "no ") + "AVX512-BF16"


def _about_cpu(what: str) -> str:
    """What the kernel says of the first core; nothing where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(what))
    return next(found, "")


def arguments(what: str, *, seconds: float) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seconds", type=float, default=seconds, help="of one turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the others, these alone")
    parser.add_argument("--out", type=Path, help="the result as JSON; default: results/")
    return parser


def write(result: dict[str, Any], out: Path | None, name: str) -> None:
    """Keep a result."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")
