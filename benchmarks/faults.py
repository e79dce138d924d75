"""Injures a group of three members for real, and measures until the others go on.

    python benchmarks/faults.py                     # every row, 20 trials each
    python benchmarks/faults.py killed frozen --trials 5
    python benchmarks/faults.py goodput --minutes 25 --every 15

The group is `demoreset run --members 3`, on this machine. Recovery is the time from the injection
until the last of the others has finished a sum or an update in a group without the victim; updates
lost are gaps in the updates that were committed; forks are updates that two members committed with
other weights. The events of all members are kept in results/faults-events.jsonl.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import RESULTS, machine

RUN = Path(__file__).parents[1] / "demos/montezuma-2500.yaml"  # far from any goal for a while
CLI = [sys.executable, "-m", "demoreset_trainer.cli"]
SAVING = ("--set", "spec.checkpoint.intervalSeconds=5")
# An update every tenth of a second or so: what is measured is the fault, not a rollout's length.
QUICK = (
    *("--set", "spec.environment.slots=12", "--set", "spec.ppo.rolloutLength=8"),
    *("--set", "spec.ppo.epochs=1", "--set", "spec.ppo.minibatches=2"),
)
MEMBERS = 3
PATIENCE = 120.0
Event = dict[str, Any]


class Injured:
    """A running group, what its members wrote down, and its processes."""

    def __init__(self, folder: Path, members: int, changes: Sequence[str]) -> None:
        self.events_file = folder / "events.jsonl"
        self.log = (folder / "run.log").open("w")
        command = [*CLI, "run", "-f", str(RUN), "--dir", str(folder / "run"), *SAVING, *changes]
        self.process = subprocess.Popen(
            [*command, "--members", str(members), "--log", "plain"],
            env={**os.environ, "DEMORESET_EVENTS": str(self.events_file)},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.count = members
        self.events: list[Event] = []
        self._read = 0

    def look(self) -> list[Event]:
        """All events until now."""
        if self.events_file.exists():
            with self.events_file.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read += len(whole)
            self.events += [json.loads(line) for line in whole.splitlines()]
        return self.events

    def wait(self, met: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.look()
            if result := met():
                return result
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended with {self.process.returncode} before: {what}")
            time.sleep(0.01)
        raise TimeoutError(f"not within {PATIENCE} s: {what}; latest {self.events[-3:]}")

    def whole(self) -> dict[str, int]:
        """Wait until all members train in one group; id to pid, the first one first."""

        def together() -> dict[str, int] | None:
            formed = [event for event in self.events if event["event"] == "formed"]
            if not formed or len(formed[-1]["members"]) != self.count:
                return None
            ids, since = formed[-1]["members"], formed[-1]["time"]
            pids = {
                event["member"]: event["pid"]
                for event in self.events
                if event["event"] == "commit" and event["time"] > since
            }
            left = {event["member"] for event in self.events if event["event"] == "left"}
            if set(pids) != set(ids) or left & set(ids) or not all(map(_alive, pids.values())):
                return None
            return {id: pids[id] for id in ids}

        found: dict[str, int] = self.wait(together, "a whole group")
        return found

    def recovered(self, since: float, others: list[str]) -> float:
        """Seconds until all of the others finished a sum in a new group, or an update."""

        def done() -> float | None:
            times = []
            for id in others:
                later = [
                    event["time"]
                    for event in self.events
                    if event["member"] == id
                    and event["time"] > since
                    and event["event"] in ("summed", "commit")
                ]
                if not later:
                    return None
                times.append(later[0])
            return float(max(times) - since)

        seconds: float = self.wait(done, "the others go on")
        return seconds

    def child(self, word: str) -> int:
        """The process id of a child of the run with this word in its command."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", word], capture_output=True, text=True
        ).stdout.split()
        return int(found[0])

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.log.close()


@contextmanager
def group(members: int = MEMBERS, changes: Sequence[str] = QUICK) -> Iterator[Injured]:
    with tempfile.TemporaryDirectory() as folder:
        injured = Injured(Path(folder), members, changes)
        try:
            yield injured
        finally:
            injured.close()
            injured.look()


def check(events: list[Event]) -> dict[str, int]:
    """Updates lost and forks, over all events of a run."""
    states: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for event in events:
        if event["event"] == "commit":
            states[event["update"]].add((event["frames"], event["digest"]))
    updates = sorted(states)
    return {
        "updates": len(updates),
        "updatesLost": updates[-1] - updates[0] + 1 - len(updates) if updates else 0,
        "forks": sum(len(known) > 1 for known in states.values()),
    }


# The rows


def struck(injured: Injured, strike: Callable[[int], None], *, first: bool) -> float:
    """Strike the first member, or another one."""
    members = injured.whole()
    ids = list(members)
    victim = ids[0] if first else random.choice(ids[1:])
    time.sleep(random.random())
    since = time.monotonic()
    strike(members[victim])
    seconds = injured.recovered(since, [id for id in ids if id != victim])
    injured.wait(lambda: not _alive(members[victim]), "the end of the victim")
    return seconds


def by_signal(number: int, *, first: bool = False) -> Callable[[Injured], float]:
    return lambda injured: struck(injured, lambda pid: os.kill(pid, number), first=first)


def thawed(injured: Injured) -> float:
    """Frozen for two seconds: until all three are one group again, from the thaw."""
    members = injured.whole()
    victim = random.choice(list(members))
    time.sleep(random.random())
    os.kill(members[victim], signal.SIGSTOP)
    time.sleep(2)
    since = time.monotonic()
    os.kill(members[victim], signal.SIGCONT)
    return injured.recovered(since, list(members))


def without_coordinator(injured: Injured) -> float:
    """The coordinator is killed; the run starts another one: the longest pause of any member."""
    members = injured.whole()
    time.sleep(random.random())
    since = time.monotonic()
    os.kill(injured.child("coordinator"), signal.SIGKILL)
    time.sleep(8)
    pauses = []
    for id in members:
        times = [
            event["time"]
            for event in injured.look()
            if event["member"] == id and event["event"] == "commit"
        ]
        pauses += [b - max(a, since) for a, b in itertools.pairwise(times) if b > since]
    return float(max(pauses))


def joined(injured: Injured) -> float:
    """A member is killed: seconds that its successor's entry costs the others."""
    members = injured.whole()
    victim = list(members)[-1]
    os.kill(members[victim], signal.SIGKILL)
    injured.recovered(time.monotonic(), [id for id in members if id != victim])
    entered = injured.whole()
    new = next(id for id in entered if id not in members)
    formed = [
        event for event in injured.events if event["event"] == "formed" and new in event["members"]
    ]
    synced = [
        event["seconds"]
        for event in injured.events
        if event["event"] == "synced" and event["time"] > formed[0]["time"]
    ]
    return float(max(event["seconds"] for event in formed) + max(synced))


# name: fault, trial, target in seconds, the row of the fault matrix
ROWS: dict[str, tuple[str, Callable[[Injured], float], float, int]] = {
    "killed": ("a member, kill -9", by_signal(signal.SIGKILL), 1.0, 1),
    "segv": ("a member, segmentation fault", by_signal(signal.SIGSEGV), 1.0, 1),
    "abort": ("a member, abort", by_signal(signal.SIGABRT), 1.0, 1),
    "first": ("the first member, kill -9", by_signal(signal.SIGKILL, first=True), 1.0, 3),
    "coordinator": ("the coordinator, kill -9; made again", without_coordinator, 3.0, 5),
    "drained": ("SIGTERM to a member", by_signal(signal.SIGTERM), 10.0, 7),
    "frozen": ("a member stopped (SIGSTOP)", by_signal(signal.SIGSTOP), 6.0, 9),
    "thawed": ("stopped for 2 s, then thawed: back in", thawed, 6.0, 10),
    "joined": ("a new member joins: cost to the others", joined, 1.0, 19),
}


def measure(name: str, trials: int, kept: list[Event]) -> dict[str, Any]:
    fault, trial, target, row = ROWS[name]
    seconds = []
    with group() as injured:
        for number in range(trials):
            seconds.append(trial(injured))
            print(f"  {name} {number + 1}/{trials}: {seconds[-1]:.3f} s", flush=True)
        injured.whole()
    kept += [{"row": name, **event} for event in injured.events if event["event"] != "quorum"]
    ranked = sorted(seconds)
    return {
        "row": row,
        "fault": fault,
        "n": len(ranked),
        "p50": round(statistics.median(ranked), 3),
        "p95": round(ranked[max(0, round(0.95 * len(ranked)) - 1)], 3),
        "max": round(ranked[-1], 3),
        "target": target,
        **check(injured.events),
    }


def goodput(minutes: float, every: float, kept: list[Event]) -> dict[str, Any]:
    """A kill of any member every so many seconds; what is learned meanwhile, beside no kills."""
    pace = {}
    kills = 0
    for kind in ("undisturbed", "killed"):
        with group(changes=()) as injured:
            injured.whole()
            begun = time.monotonic()
            span = 60 * (minutes if kind == "killed" else min(minutes, 3))
            while time.monotonic() - begun < span:
                time.sleep(every)
                injured.look()
                if kind == "killed":
                    pids = {e["member"]: e["pid"] for e in injured.events}
                    alive = [pid for pid in pids.values() if _alive(pid)]
                    if alive:
                        os.kill(random.choice(alive), signal.SIGKILL)
                        kills += 1
            ended = time.monotonic()
            injured.look()
        frames = {
            event["update"]: (event["time"], event["frames"])
            for event in injured.events
            if event["event"] == "commit" and begun <= event["time"] <= ended
        }
        first, last = min(frames), max(frames)
        pace[kind] = (frames[last][1] - frames[first][1]) / (frames[last][0] - frames[first][0])
        facts = check(injured.events)
        if kind == "killed":
            kept += [{"row": "goodput", **e} for e in injured.events if e["event"] != "quorum"]
    return {
        "row": 21,
        "fault": f"any member, kill -9 every {every:g} s for {minutes:g} min",
        "n": kills,
        "framesPerSecond": {kind: round(speed) for kind, speed in pace.items()},
        "goodput": round(pace["killed"] / pace["undisturbed"], 3),
        "target": 0.9,
        **facts,
    }


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def show(table: dict[str, dict[str, Any]]) -> None:
    print("| row | fault | n | p50 s | p95 s | max s | target | updates lost | forks |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for entry in table.values():
        if "p50" in entry:
            print(
                f"| {entry['row']} | {entry['fault']} | {entry['n']} | {entry['p50']} | "
                f"{entry['p95']} | {entry['max']} | {entry['target']} | {entry['updatesLost']} | "
                f"{entry['forks']} |"
            )
        else:
            print(
                f"| {entry['row']} | {entry['fault']} | {entry['n']} | goodput "
                f"{entry['goodput']:.1%} | | | {entry['target']:.0%} | {entry['updatesLost']} | "
                f"{entry['forks']} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*ROWS, "goodput"]))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--every", type=float, default=15)
    options = parser.parse_args()
    path, log = RESULTS / "faults.json", RESULTS / "faults-events.jsonl"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name in options.rows or ROWS:
        kept: list[Event] = []
        if name == "goodput":
            known["rows"][name] = goodput(options.minutes, options.every, kept)
        else:
            known["rows"][name] = measure(name, options.trials, kept)
        lines = log.read_text().splitlines() if log.exists() else []
        lines = [line for line in lines if json.loads(line)["row"] != name]
        log.write_text("\n".join([*lines, *map(json.dumps, kept)]) + "\n")
        known["machine"] = machine(("demoreset", "torch", "torchft"))
        path.write_text(json.dumps(known, indent=2) + "\n")
    show(known["rows"])


if __name__ == "__main__":
    main()
