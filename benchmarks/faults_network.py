"""Hosts that are cut off, far away, or wrong about the time.

Workers of one member each and their coordinator, on hosts of their own (`hosts`), with one folder.
"""

import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosts import Bad, Hosts
from injured import CLI, QUICK, RUN, SAVING, Event, Outcome, Row, Watched, check

COORDINATOR, WORKERS = "coord", ("one", "two", "three")
PORT = "29510"
CUT = 15.0  # seconds that a host is away
FAR = Bad(seconds=0.2, lost=0.05)
SKEW = 30  # seconds
CORES = {"DEMORESET_CORES": "1"}  # of a member, as `run --members` deals them on two cores


@contextmanager
def scattered(
    changes: Sequence[str] = QUICK,
    *,
    bad: Mapping[str, Bad] | None = None,
    dead_ms: int = 700,
    within: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[tuple[Watched, Hosts]]:
    """A group over hosts, which is stopped in the end; `within`: what a worker is run by."""
    with (
        tempfile.TemporaryDirectory() as name,
        Hosts([COORDINATOR, *WORKERS], bad) as hosts,
    ):
        folder = Path(name)
        where = f"{hosts.addresses[COORDINATOR]}:{PORT}"
        coordinator = [*CLI, "coordinator", "--port", PORT, "--dead-ms", str(dead_ms)]
        commands = [hosts.on(COORDINATOR, *coordinator)]
        for worker in WORKERS:
            command = [*CLI, "worker", "-f", str(RUN), "--dir", str(folder / "run"), *SAVING]
            command += [*changes, "--members", "1", "--log", "plain", "--id", worker]
            command += ["--coordinator", where, "--address", hosts.addresses[worker]]
            commands.append(hosts.on(worker, *(within or {}).get(worker, ()), *command))
        watched = Watched(folder, len(WORKERS), commands, CORES)
        try:
            yield watched, hosts
        finally:
            watched.close()


# Cut off


@dataclass(frozen=True)
class Parting:
    """Seconds that a cut has cost, and what should not have been.

    recovered: from the cut until the others went on. again: from the healing until there was one
    group. pause: the longest of the others, after the healing.
    """

    recovered: float
    again: float
    pause: float
    failures: list[str]


def apart(
    watched: Watched, hosts: Hosts, cut: Callable[[Hosts, str], None], seconds: float = CUT
) -> Parting:
    """A host is cut off for a while."""
    members = watched.whole()
    victim = random.choice(list(members))
    others = [id for id in members if id != victim]
    time.sleep(random.random())
    since = time.monotonic()
    cut(hosts, victim.partition("-")[0])
    recovered = watched.wait(lambda: _without(watched, victim, others, since), "the others go on")
    time.sleep(max(0.0, since + seconds - time.monotonic()))
    healed = time.monotonic()
    hosts.heal()
    whole = watched.whole()
    again = time.monotonic() - healed
    failures = []
    alone = [event for event in _of(watched, "commit", victim) if since < event["time"] < healed]
    if len(alone) > 1:  # one may have been under way
        failures.append(f"{victim}, cut off, went on for {len(alone)} updates")
    if set(whole) != set(members):
        failures.append(f"members were replaced: {sorted(members)}, then {sorted(whole)}")
    pauses = [
        after["time"] - before["time"]
        for id in others
        for before, after in itertools.pairwise(_of(watched, "commit", id))
        if after["time"] > healed
    ]
    return Parting(recovered, again, max(pauses), failures)


def _without(watched: Watched, victim: str, others: list[str], since: float) -> float | None:
    """Seconds until all of the others have finished a sum in a group without the victim."""
    times = []
    for id in others:
        formed = [
            event["time"]
            for event in _of(watched, "formed", id)
            if event["time"] > since and victim not in event["members"]
        ]
        summed = [e["time"] for e in _of(watched, "summed", id) if formed and e["time"] > formed[0]]
        if not summed:
            return None
        times.append(summed[0])
    return float(max(times) - since)


def _of(watched: Watched, name: str, member: str = "") -> list[Event]:
    """The events of a name, and of those members whose ids begin so."""
    return [
        event
        for event in watched.look()
        if event["event"] == name and event["member"].startswith(member)
    ]


def parted(cut: Callable[[Hosts, str], None], seconds: float = CUT) -> Callable[[int], Outcome]:
    """Again and again, in one run."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        again, pauses = [0.0], [0.0]
        with scattered() as (watched, hosts):
            while outcome.n < trials:
                outcome.n += 1
                try:
                    trial = apart(watched, hosts, cut, seconds)
                except (TimeoutError, RuntimeError) as error:
                    outcome.failures.append(str(error))
                    break  # what comes after would say nothing
                outcome.seconds.append(trial.recovered)
                outcome.failures += trial.failures
                again.append(trial.again)
                pauses.append(trial.pause)
                print(f"  {outcome.n}/{trials}: {trial}", flush=True)
        longest = {"again": round(max(again), 3), "pause": round(max(pauses), 3)}
        outcome.facts = {**check(watched.events), "longestAfterHealing": longest}
        outcome.events = watched.events
        return outcome

    return measure


def to_all(hosts: Hosts, victim: str) -> None:
    hosts.cut(victim)


def one_way(hosts: Hosts, victim: str) -> None:
    """What it sends is lost, or what it should hear."""
    sends = random.random() < 0.5
    hosts.cut(victim, sends=sends, hears=not sends)


def from_coordinator(hosts: Hosts, victim: str) -> None:
    hosts.cut(victim, to=COORDINATOR)


# Far away


def far(dead_ms: int) -> Callable[[int], Outcome]:
    """One host is far away, for `trials` minutes: what is learned, beside a group that is near."""

    def measure(trials: int) -> Outcome:
        near, _ = _learned({}, dead_ms, 60 * trials)
        pace, watched = _learned({WORKERS[-1]: FAR}, dead_ms, 60 * trials)
        count = Counter(event["event"] for event in watched.events)
        facts = {
            **check(watched.events),
            "goodput": round(pace / near, 3),
            "framesPerSecond": {"near": round(near), "far": round(pace)},
            "sumsLost": count["lost"],
            "groupsFormed": count["formed"],
            "membersAtUpdates": round(_size(watched.events), 2),
        }
        failures = [] if pace else ["nothing was learned"]
        return Outcome(trials, failures=failures, facts=facts, events=watched.events)

    return measure


def _learned(bad: Mapping[str, Bad], dead_ms: int, seconds: float) -> tuple[float, Watched]:
    """Frames per second of the updates that are committed once there is a group."""
    with scattered((), bad=bad, dead_ms=dead_ms) as (watched, _):
        if bad:  # it may never be whole
            watched.wait(lambda: _of(watched, "commit"), "a first update")
        else:
            watched.whole()
        begun = time.monotonic()
        before = _frames(watched)
        time.sleep(seconds)
        learned = _frames(watched) - before
        return learned / (time.monotonic() - begun), watched


def _frames(watched: Watched) -> int:
    return max((event["frames"] for event in _of(watched, "commit")), default=0)


def _size(events: Sequence[Event]) -> float:
    """How many members committed an update, on average."""
    updates = Counter(event["update"] for event in events if event["event"] == "commit")
    return sum(updates.values()) / max(1, len(updates))


# Wrong about the time


# libfaketime fails sleeps until a moment of the monotonic clock, when that one is not to be faked.
SLEEP = r"""
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
typedef struct timespec moment;
int clock_nanosleep(clockid_t clock, int flags, const moment *until, moment *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
"""


def faketime() -> Path | None:
    """The library of Debian's package."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def clock(seconds: int, folder: Path) -> list[str]:
    """Runs a command with a wall clock that is wrong; the monotonic one is right."""
    if (library := faketime()) is None:
        raise SystemExit("not installed: faketime")
    sleep = folder / "sleep.so"
    build = ["cc", "-shared", "-fPIC", "-o", str(sleep), "-x", "c", "-"]
    subprocess.run(build, input=SLEEP, text=True, check=True)
    return [
        *("env", f"LD_PRELOAD={sleep} {library}", f"FAKETIME={seconds:+d}s", "NO_FAKE_STAT=1"),
        *("FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1"),
    ]


def skewed(trials: int) -> Outcome:
    """One member's clock is fast, then slow, for half of so many minutes each: nothing happens."""
    outcome = Outcome(n=trials)
    facts: Counter[str] = Counter(updatesLost=0, forks=0)
    for skew in (SKEW, -SKEW):
        failures, events = one_skewed(skew, 60 * trials / 2)
        outcome.failures += failures
        facts.update(check(events))
        outcome.events += events
    outcome.facts = dict(facts)
    return outcome


def one_skewed(skew: int, seconds: float, dead_ms: int = 700) -> tuple[list[str], list[Event]]:
    """A group with one clock that is wrong, watched for so long: what happened that should not."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = clock(skew, Path(folder))
        if reason := _not_skewed(wrong, skew):
            return [reason], []
        with scattered(within={WORKERS[-1]: wrong}, dead_ms=dead_ms) as (watched, _):
            watched.whole()
            begun = time.monotonic()
            time.sleep(seconds)
            events = [event for event in watched.look() if event["time"] >= begun]
    found = [event["event"] for event in events if event["event"] in ("formed", "lost")]
    if not any(e["event"] == "commit" and e["member"].startswith(WORKERS[-1]) for e in events):
        found.append("no update")
    return [f"{what} at {skew:+d} s" for what in found], watched.events


def _not_skewed(wrong: Sequence[str], skew: int) -> str | None:
    """Why a command's clocks are not as they should be: the injection itself is looked at."""
    asked = [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"]
    wall, monotonic = map(float, subprocess.check_output([*wrong, *asked], text=True).split())
    if abs(wall - time.time() - skew) > 5 or abs(monotonic - time.monotonic()) > 5:
        return f"no clock was {skew:+d} s wrong: {wall}, {monotonic}"
    return None


ROWS: dict[str, Row] = {
    "cut": Row(11, "a host cut off for 15 s", 20, parted(to_all), 6.0),
    "cut-minute": Row(11, "a host cut off for 60 s", 5, parted(to_all, 60), 6.0),
    "one-way": Row(11, "a host heard by nobody, or deaf", 20, parted(one_way), 6.0),
    "no-coordinator": Row(
        11, "a host cut off from the coordinator", 20, parted(from_coordinator), 6.0
    ),
    "far": Row(12, "a host 200 ms away, 5 % of packets lost", 5, far(700), goodput=0.8),
    "far-patient": Row(12, "the same, dead after 5 s", 5, far(5000), goodput=0.8),
    "skewed": Row(13, "a clock 30 s fast, or slow", 4, skewed),
}
