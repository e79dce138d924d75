"""Members and coordinators that are killed, stopped, frozen, sent away and joined."""

import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demoreset_api.errors import DemoResetError
from demoreset_trainer import checkpoint
from faults_inside import HALF, SAVING_OFTEN, ending, inside, unsound
from injured import Event, Injured, Outcome, Row, alive, check, group

TOGETHER = 10  # kills, between two times without
# C met the goal of a run without noise within 34 minutes, and confirms it for a minute and more.
ENDLESS = (
    *("--set", "spec.goal.successRate=1", "--set", "spec.goal.episodes=1000"),
    *("--set", "spec.environment.stickyProbability=0.25"),
)

FLUSH = 0.1  # seconds that each of the flushes of a save takes, to be hit in the middle of it

_Span = tuple[float, float]  # seconds of the clock of events: from, to


# One trial each: seconds


def struck(injured: Injured, strike: Callable[[int], None], *, first: bool) -> float:
    """Strike the first member, or another one."""
    members = injured.whole()
    ids = list(members)
    victim = ids[0] if first else random.choice(ids[1:])
    time.sleep(random.random())
    since = time.monotonic()
    strike(members[victim])
    seconds = injured.recovered(since, [id for id in ids if id != victim])
    injured.wait(lambda: not alive(members[victim]), "the end of the victim")
    return seconds


def by_signal(number: int, *, first: bool = False) -> Callable[[Injured], float]:
    return lambda injured: struck(injured, lambda pid: os.kill(pid, number), first=first)


def back(injured: Injured) -> float:
    """A member is killed: seconds until all have done an update together with its successor."""
    members = injured.whole()
    victim = members[random.choice(list(members)[1:])]
    time.sleep(random.random())
    since = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    injured.wait(lambda: not alive(victim), "the end of the victim")
    injured.whole()
    return time.monotonic() - since


def thawed(injured: Injured) -> float:
    """Frozen for two seconds: until all three go on, from the thaw."""
    members = injured.whole()
    victim = random.choice(list(members))
    time.sleep(random.random())
    os.kill(members[victim], signal.SIGSTOP)
    time.sleep(2)
    since = time.monotonic()
    os.kill(members[victim], signal.SIGCONT)
    # In the midst of a sum the others had waited for it: then the group is the same.
    return injured.recovered(since, list(members), regrouped=False)


def without_coordinator(injured: Injured) -> float:
    """The coordinator is killed; the run starts another one: the longest pause of any member."""
    members = injured.whole()
    time.sleep(random.random())
    since = time.monotonic()
    os.kill(injured.child("coordinator"), signal.SIGKILL)
    time.sleep(12)  # one that is killed sooner is waited for longer before it is made again
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


# Rows


def repeated(trial: Callable[[Injured], float]) -> Callable[[int], Outcome]:
    """The same trial again and again, in one run."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        with group() as injured:
            for _ in range(trials):
                outcome.seconds.append(trial(injured))
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: {outcome.seconds[-1]:.3f} s", flush=True)
            injured.whole()
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


def in_a_save(number: int) -> Callable[[int], Outcome]:
    """A signal to the first member at any moment of a save: the next one goes on, and saves."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        slow = inside(what="slow-disk", seconds=FLUSH)
        with group(changes=SAVING_OFTEN, environment=slow) as injured:
            while outcome.n < trials:
                if (seconds := _struck_in_a_save(injured, number, outcome.failures)) is None:
                    continue  # it was over before
                outcome.seconds.append(seconds)
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: {seconds:.3f} s", flush=True)
            injured.whole()
            injured.close()
            outcome.failures += [
                wrong
                for wrong in unsound(injured.folder)
                if number != signal.SIGKILL or not wrong.startswith(HALF)  # the dead leave halves
            ]
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


def _struck_in_a_save(injured: Injured, number: int, failures: list[str]) -> float | None:
    """Seconds until the others have summed without it; None where the save was over before."""
    folder = injured.folder / "checkpoints"
    first, *others = members = injured.whole()
    known = set(folder.glob(HALF + "*"))
    begun = injured.wait(lambda: set(folder.glob(HALF + "*")) - known, "a save")
    time.sleep(6 * FLUSH * random.random())
    since = time.monotonic()
    os.kill(members[first], number)
    in_time = any(half.exists() for half in begun)
    seconds = injured.recovered(since, others)
    injured.wait(lambda: not alive(members[first]), "the end of the victim")
    left = _latest(folder)
    try:
        saved = checkpoint.read(left).update if left is not None else 0
    except DemoResetError as error:
        failures.append(f"what it left is not whole: {error}")
        return seconds
    if number == signal.SIGTERM:
        how = injured.wait(lambda: ending(injured, members[first]), "what is said of its end")
        if not how.startswith("exit code 143"):
            failures.append(how)
        commits = [event for event in injured.look() if event["event"] == "commit"]
        its = max(event["update"] for event in commits if event["member"] == first)
        if saved < its:
            failures.append(f"update {its} was its last, and {saved} is on the disk")
    injured.wait(lambda: _latest(folder) != left, "a checkpoint of the next one")
    return seconds if in_time else None


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint by its name."""
    return max(folder.glob("ckpt-*"), default=None)


def flapping(every: float) -> Callable[[int], Outcome]:
    """A kill of any member every so many seconds, `trials` of them: what is learned meanwhile.

    In one run, ten kills at a time and half as long without, before and after: a shared host's
    speed changes from minute to minute, and only what is close together compares.
    """

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        disturbed: list[_Span] = []
        calm: list[_Span] = []

        def spend(kills: int, seconds: float) -> _Span:
            begun = time.monotonic()
            for _ in range(kills):
                outcome.n += injured.kill_any()
                time.sleep(every)
            time.sleep(seconds)
            return begun, time.monotonic()

        with (
            tempfile.TemporaryDirectory() as scratch,
            group(changes=ENDLESS, environment={"TMPDIR": scratch}) as injured,
        ):
            injured.whole()
            before = _held(injured, scratch)
            while outcome.n < trials:
                injured.whole()
                calm.append(spend(0, every * TOGETHER / 2))
                disturbed.append(spend(min(TOGETHER, trials - outcome.n), 0))
                print(f"  {outcome.n}/{trials}", flush=True)
            injured.whole()
            calm.append(spend(0, every * TOGETHER / 2))
            injured.whole()
            for what, count in _held(injured, scratch).items():
                if count > before[what]:
                    outcome.failures.append(f"{what}: {before[what]}, in the end {count}")
        paces, sizes = _paces(injured.events, disturbed)
        quiet, whole = _paces(injured.events, calm)
        expected = [(before + after) / 2 for before, after in itertools.pairwise(quiet)]
        outcome.facts = {
            **check(injured.events),
            "goodput": round(sum(paces) / sum(expected), 3),
            "goodputs": [round(a / b, 2) for a, b in zip(paces, expected, strict=True)],
            "framesPerSecond": {
                "undisturbed": round(statistics.mean(expected)),
                "killed": round(statistics.mean(paces)),
            },
            "membersOnAverage": {
                "undisturbed": round(statistics.mean(whole), 2),
                "killed": round(statistics.mean(sizes), 2),
            },
        }
        outcome.events = injured.events
        return outcome

    return measure


def _held(injured: Injured, scratch: str) -> dict[str, int]:
    """What might leak with every member that is lost."""
    return {
        "open files of the supervisor": len(os.listdir(f"/proc/{injured.process.pid}/fd")),
        "files in shared memory": len(list(Path("/dev/shm").glob("pym-*"))),  # multiprocessing's
        "temporary files": len(os.listdir(scratch)),
    }


def _paces(events: list[Event], spans: list[_Span]) -> tuple[list[float], list[float]]:
    """Frames per second that were committed in each span, and the group's size over its time."""
    paces, sizes = zip(*(_pace(events, *span) for span in spans), strict=True)
    return list(paces), list(sizes)


def _pace(events: list[Event], begun: float, ended: float) -> tuple[float, float]:
    """Frames per second that were committed in a span, and the group's size over the time."""
    commits: dict[int, Any] = {}
    sizes: list[tuple[float, int]] = []
    for event in events:
        if not begun <= event["time"] <= ended:
            continue
        if event["event"] == "commit":
            commits[event["update"]] = event
        elif event["event"] == "formed":
            sizes.append((event["time"], len(event["members"])))
    first, last = commits[min(commits)], commits[max(commits)]
    pace = (last["frames"] - first["frames"]) / (last["time"] - first["time"])
    known = [event for event in events if event["event"] == "formed" and event["time"] < begun]
    steps = [(begun, len(known[-1]["members"])), *sizes, (ended, 0)]
    held = sum(size * (after - at) for (at, size), (after, _) in itertools.pairwise(steps))
    return pace, held / (ended - begun)


ROWS: dict[str, Row] = {
    "killed": Row(1, "a member, kill -9", 20, repeated(by_signal(signal.SIGKILL)), 1.0),
    "killed-back": Row(1, "the same: until the group is whole again", 20, repeated(back), 5.0),
    "segv": Row(1, "a member, segmentation fault", 20, repeated(by_signal(signal.SIGSEGV)), 1.0),
    "abort": Row(1, "a member, abort", 20, repeated(by_signal(signal.SIGABRT)), 1.0),
    "first": Row(
        3, "the first member, kill -9", 20, repeated(by_signal(signal.SIGKILL, first=True)), 1.0
    ),
    "first-saving": Row(3, "the same, in the middle of a save", 20, in_a_save(signal.SIGKILL), 1.0),
    "coordinator": Row(
        5, "the coordinator, kill -9; made again", 20, repeated(without_coordinator), 3.0
    ),
    "drained": Row(7, "SIGTERM to a member", 20, repeated(by_signal(signal.SIGTERM)), 10.0),
    "drained-saving": Row(
        8, "SIGTERM to the first member, in a save", 20, in_a_save(signal.SIGTERM), 10.0
    ),
    "frozen": Row(9, "a member stopped (SIGSTOP)", 10, repeated(by_signal(signal.SIGSTOP)), 6.0),
    "thawed": Row(10, "stopped for 2 s, then thawed: back in", 20, repeated(thawed), 6.0),
    "joined": Row(19, "a new member joins: cost to the others", 20, repeated(joined), 1.0),
    "flapping": Row(21, "any member, kill -9 every 15 s", 100, flapping(15), goodput=0.9),
    "flapping-5": Row(21, "any member, kill -9 every 5 s", 60, flapping(5), goodput=0.75),
}
