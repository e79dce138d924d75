"""A running group that is to be injured: its processes, and what its members wrote down.

The group is `demoreset run --members N` on this machine, with the run file of a demonstration that
is far from its goal. Members append events to one file, with times of one clock
(`demoreset_trainer.events`); all figures of faults come from these.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN = Path(__file__).parents[1] / "demos/montezuma-2500.yaml"  # far from any goal for a while
CLI = [sys.executable, "-m", "demoreset_trainer.cli"]
SAVING = ("--set", "spec.checkpoint.intervalSeconds=5")
# An update every tenth of a second or so: what is measured is the fault, not a rollout's length.
QUICK = (
    *("--set", "spec.environment.slots=12", "--set", "spec.ppo.rolloutLength=8"),
    *("--set", "spec.ppo.epochs=1", "--set", "spec.ppo.minibatches=2"),
)
MEMBERS = 3
PATIENCE = 120.0  # seconds until something that should happen counts as never
Event = dict[str, Any]


@dataclass
class Outcome:
    """What a row of the fault matrix has shown."""

    n: int = 0  # trials
    seconds: list[float] = field(default_factory=list)  # of each trial, where time counts
    failures: list[str] = field(default_factory=list)  # what should not have happened
    facts: dict[str, Any] = field(default_factory=dict)  # updatesLost, forks, goodput, ...
    events: list[Event] = field(default_factory=list)  # kept beside the figures

    def entry(self) -> dict[str, Any]:
        """As it is kept."""
        times = {}
        if self.seconds:
            ranked = sorted(self.seconds)
            times = {
                "p50": round(statistics.median(ranked), 3),
                "p95": round(ranked[max(0, round(0.95 * len(ranked)) - 1)], 3),
                "max": round(ranked[-1], 3),
            }
        failures = {"failures": len(self.failures), "reasons": self.failures[:5]}
        return {"n": self.n, **times, **failures, **self.facts}


@dataclass(frozen=True)
class Row:
    """A fault, and how it is tried.

    number: in the fault matrix. trials: of the full count. measure: tries it so often.
    p95, goodput: what is wanted, where it is more than that nothing fails, is lost or forks.
    """

    number: int
    fault: str
    trials: int
    measure: Callable[[int], Outcome]
    p95: float | None = None
    goodput: float | None = None

    def met(self, entry: Mapping[str, Any]) -> bool:
        """Whether a kept outcome is what is wanted."""
        return (
            not any(entry.get(what, 0) for what in ("failures", "updatesLost", "forks"))
            and (self.p95 is None or entry.get("p95", 0.0) <= self.p95)
            and (self.goodput is None or entry.get("goodput", 0.0) >= self.goodput)
        )


class Watched:
    """A running group, what its members wrote down, and its processes.

    Args:
        folder: Its own.
        count: Members that it has when it is whole.
        commands: What runs it.
        environment: More of it, for all commands.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.count = count
        self.events_file = folder / "events.jsonl"
        self.log_file = folder / "run.log"
        self.log = self.log_file.open("a")
        self.events: list[Event] = []
        self._read = 0
        its = {**os.environ, **(environment or {}), "DEMORESET_EVENTS": str(self.events_file)}
        self.processes = [
            subprocess.Popen(command, env=its, stdout=self.log, stderr=subprocess.STDOUT)
            for command in commands
        ]

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

    def said(self) -> str:
        """What the command has written."""
        return self.log_file.read_text()

    def wait(self, met: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """Until something is so; what `met` returned then."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.look()
            if result := met():
                return result
            for process in self.processes:
                if process.poll() is not None:
                    raise RuntimeError(f"one ended with {process.returncode} before: {what}")
            time.sleep(0.01)
        raise TimeoutError(f"not within {patience} s: {what}; latest {self.events[-3:]}")

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
            if set(pids) != set(ids) or left & set(ids) or not self.alive(pids):
                return None
            return {id: pids[id] for id in ids}

        found: dict[str, int] = self.wait(together, "a whole group")
        return found

    def alive(self, members: Mapping[str, int]) -> bool:
        """Whether the processes of all of these members run."""
        return all(map(alive, members.values()))

    def recovered(self, since: float, others: Sequence[str], *, regrouped: bool = True) -> float:
        """Seconds until all of the others finished a sum in a new group, or in the same: an update.

        An update that was all but done when the fault came says nothing about a new group.
        """
        signs = ("summed",) if regrouped else ("summed", "commit")

        def done() -> float | None:
            times = []
            for id in others:
                later = [
                    event["time"]
                    for event in self.events
                    if event["member"] == id and event["time"] > since and event["event"] in signs
                ]
                if not later:
                    return None
                times.append(later[0])
            return float(max(times) - since)

        seconds: float = self.wait(done, "the others go on")
        return seconds

    def kill_any(self) -> bool:
        """Kill one of the members that live; whether there was one."""
        pids = {event["member"]: event["pid"] for event in self.look() if event["member"]}
        living = [pid for pid in pids.values() if alive(pid)]
        if living:
            os.kill(random.choice(living), signal.SIGKILL)
        return bool(living)

    def close(self) -> int:
        """Stop all of it as Ctrl-C does; the exit code of what was started last."""
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        try:
            return [process.wait(60) for process in self.processes][-1]
        finally:
            for process in self.processes:
                process.kill()
            self.log.close()
            self.look()


class Injured(Watched):
    """`demoreset run --members`."""

    def __init__(
        self,
        folder: Path,
        members: int,
        changes: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder / "run"
        command = [*CLI, "run", "-f", str(RUN), "--dir", str(self.folder), *SAVING, *changes]
        command += ["--members", str(members), "--log", "plain"]
        super().__init__(folder, members, [command], environment)
        (self.process,) = self.processes

    def child(self, word: str) -> int:
        """The process id of a child of the run with this word in its command."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", word], capture_output=True, text=True
        ).stdout.split()
        return int(found[0])


@contextmanager
def group(
    members: int = MEMBERS,
    changes: Sequence[str] = QUICK,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Injured]:
    """A group that is stopped in the end; its events stay."""
    with tempfile.TemporaryDirectory() as folder:
        injured = Injured(Path(folder), members, changes, environment)
        try:
            yield injured
        finally:
            injured.close()


def check(events: Sequence[Event]) -> dict[str, int]:
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


def alive(pid: int) -> bool:
    """Whether a process runs, or is only stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
