"""What is wrong inside: hung and poisoned members, a coordinator's port, signals at any moment.

Members are harmed from inside by `inside/sitecustomize.py`; the product knows nothing of it.
"""

import json
import os
import random
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from demoreset_api.errors import ExitCode
from demoreset_trainer import checkpoint
from demoreset_trainer.local_coordinator import ASK_EVERY, WORKS_AFTER, free_port
from injured import (
    CLI,
    PATIENCE,
    QUICK,
    RUN,
    SAVING,
    Injured,
    Outcome,
    Row,
    Watched,
    alive,
    check,
    group,
)
from measure import tree

INSIDE = Path(__file__).parent / "inside"
SAVING_OFTEN = (*QUICK, "--set", "spec.checkpoint.intervalSeconds=1")
FRAMES = 12 * 8 * 4  # of an update: QUICK's slots, times its rollout, times the frame skip
DRAINED = (ExitCode.DRAINED, -signal.SIGTERM)  # the second: before Python could listen
GRACE = 25.0  # seconds from SIGTERM to the end, of a command
LIFE = 20.0  # seconds of a command's or member's life over which signals are swept
NOT_FINITE = "demoreset: update 21 failed 3 times: the gradient's norm is nan"
CRASHED = "update 21 failed 3 times; the last: sitecustomize.Poisoned: poisoned at update 20"
HALF = ".partial-"  # a checkpoint that is being written, or whose writer died
AFTERMATH = 5.0  # seconds until whatever it started has ended, too


def inside(**poison: Any) -> dict[str, str]:
    """The environment of members that can be harmed; `poison`: how (inside/sitecustomize.py)."""
    paths = [str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)} | (
        {"DEMORESET_POISON": json.dumps(poison)} if poison else {}
    )


def gone(pids: Sequence[int], patience: float) -> bool:
    """Whether these processes end within so many seconds."""
    deadline = time.monotonic() + patience
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def words(pid: int) -> list[str]:
    """The command line of a process; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def unsound(folder: Path) -> list[str]:
    """What is wrong with the checkpoints of a run that has ended: torn, set aside, half written."""
    wrong = []
    for path in (folder / "checkpoints").glob("*"):
        if path.name.startswith("ckpt-"):
            try:
                checkpoint.read(path)
            except Exception as error:
                wrong.append(f"{path.name}: {error}")
        elif path.name.startswith((".", "broken-")):
            wrong.append(f"{path.name} is left")
    return wrong


# The coordinator's port


class Squatter:
    """Listens on a port of this machine in the place of another, in one of three ways."""

    def __init__(self, port: int, way: str) -> None:
        self._way = way
        self._taken: list[socket.socket] = []
        self._server = socket.socket()
        # The first owner's connections linger; who comes later is kept out all the same.
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind(("127.0.0.1", port))
        self._server.listen(100)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if self._way == "silent":
                    self._taken.append(client)
                    continue
                if self._way == "garbage":
                    with suppress(OSError):
                        client.sendall(os.urandom(random.randrange(1, 10_000)))
                hang_up(client)

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for client in self._taken:
            hang_up(client)


def hang_up(client: socket.socket) -> None:
    """Reset a connection, so that nothing of it lingers."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def port_of(injured: Injured) -> int:
    """The coordinator's."""
    line = words(injured.child("coordinator"))
    return int(line[line.index("--port") + 1])


def without_port(injured: Injured, seconds: float, way: str) -> float:
    """The coordinator is killed and its port taken: seconds from its return until all go on."""
    members = injured.whole()
    time.sleep(1 + WORKS_AFTER)  # one that dies early is started again later each time
    port = port_of(injured)
    squatter = None
    while squatter is None:  # until we are faster than its successor
        with suppress(IndexError, ProcessLookupError):
            os.kill(injured.child("coordinator"), signal.SIGKILL)
        with suppress(OSError):
            squatter = Squatter(port, way)
    time.sleep(seconds)
    since = time.monotonic()
    squatter.close()
    return injured.recovered(since, list(members), regrouped=False)


def squatted(injured: Injured) -> float:
    """For up to three seconds; then garbage on the port of the new one, which must not notice."""
    way = random.choice(("away", "silent", "garbage"))
    seconds = without_port(injured, 3 * random.random(), way)
    members = injured.whole()
    _litter(port_of(injured))
    injured.recovered(time.monotonic(), list(members), regrouped=False)
    return seconds


def _litter(port: int) -> None:
    for _ in range(20):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as client:
            client.sendall(os.urandom(random.choice((0, 1, 24, 1000, 100_000))))


def frozen_coordinator(injured: Injured) -> float:
    """Stopped for five seconds: from its thaw until all go on."""
    members, pid = injured.whole(), injured.child("coordinator")
    time.sleep(2 * ASK_EVERY)  # it has answered its watcher, who kills it when it is deaf for long
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    since = time.monotonic()
    os.kill(pid, signal.SIGCONT)
    return injured.recovered(since, list(members), regrouped=False)


def losing_nobody(trial: Callable[[Injured], float]) -> Callable[[int], Outcome]:
    """The same trial again and again, in one run whose members all live through it."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        with group() as injured:
            members = injured.whole()
            for _ in range(trials):
                outcome.seconds.append(trial(injured))
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: {outcome.seconds[-1]:.3f} s", flush=True)
            if set(injured.whole()) != set(members):
                outcome.failures.append("members were lost with the coordinator")
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


# Signals at any moment


def swept(trials: int) -> Outcome:
    """SIGTERM to the command, every other time to all of its processes, as systemd does it.

    At every moment of its life; then it goes on in the same folder.
    """
    outcome = Outcome(facts={"updatesLost": 0})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for trial in range(trials):
            after = LIFE * (trial + random.random()) / trials
            injured = Injured(folder, 2, SAVING_OFTEN)
            time.sleep(after)
            started = tree(injured.process.pid)
            since = time.monotonic()
            for pid in started if trial % 2 else started[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            try:
                injured.process.wait(GRACE + AFTERMATH)
            except subprocess.TimeoutExpired:
                injured.process.kill()
            outcome.seconds.append(time.monotonic() - since)
            outcome.n += 1
            code, at = injured.close(), f"after {after:.2f} s"
            print(f"  {outcome.n}/{trials}: {at}: {code}, {outcome.seconds[-1]:.3f} s", flush=True)
            if code not in DRAINED or outcome.seconds[-1] > GRACE:
                outcome.failures.append(f"{at}: {code} after {outcome.seconds[-1]:.1f} s")
            if not gone(started, AFTERMATH):
                left = [words(pid) for pid in started if alive(pid)]
                outcome.failures.append(f"{at}: left behind: {left}")
            outcome.failures += [f"{at}: {wrong}" for wrong in unsound(injured.folder)]
            outcome.facts["updatesLost"] += _unsaved(injured)
            outcome.events += injured.events
            injured.events_file.unlink(missing_ok=True)
    return outcome


def _unsaved(injured: Injured) -> int:
    """Updates that were committed and are not on the disk."""
    committed = max((e["update"] for e in injured.look() if e["event"] == "commit"), default=0)
    saved = checkpoint.newest(injured.folder / "checkpoints") if committed else None
    return max(0, committed - (checkpoint.read(saved).update if saved else 0))


def ended(injured: Injured) -> list[str]:
    """Stop it; what is wrong with what it leaves."""
    injured.close()
    lost = _unsaved(injured)
    return unsound(injured.folder) + ([f"{lost} updates are not on the disk"] if lost else [])


def swept_member(trials: int) -> Outcome:
    """SIGTERM to a member at every moment of its life; every other time to the group's first."""
    outcome = Outcome()
    with group(2, SAVING_OFTEN) as injured:
        for trial in range(trials):
            after = None if trial % 2 else LIFE / 2 * (trial + random.random()) / trials
            seconds, how = asked(injured, after)
            outcome.seconds.append(seconds)
            outcome.n += 1
            print(f"  {outcome.n}/{trials}: {seconds:.3f} s: {how}", flush=True)
            if not how.startswith(("SIGTERM: killed by SIGTERM", "exit code 143")):
                outcome.failures.append(how)
        injured.whole()
        outcome.failures += ended(injured)
    outcome.facts, outcome.events = dict(check(injured.events)), injured.events
    return outcome


def asked(injured: Injured, after: float | None) -> tuple[float, str]:
    """SIGTERM to the first member, or so long after its start to its successor: how it ended."""
    members = injured.whole()
    victim = next(iter(members.values()))
    if after is None:
        time.sleep(random.random())
    else:
        known = {*members.values(), *tree(victim)}  # its environments are orphans for a moment
        os.kill(victim, signal.SIGKILL)
        victim = injured.wait(lambda: _successor(injured, known), "another member")
        time.sleep(after)
    since = time.monotonic()
    os.kill(victim, signal.SIGTERM)
    injured.wait(lambda: not alive(victim), "the end of the victim")
    seconds = time.monotonic() - since
    return seconds, injured.wait(lambda: ending(injured, victim), "what is said of its end")


def _successor(injured: Injured, known: set[int]) -> int | None:
    """A member that was started meanwhile."""
    search = ("pgrep", "-P", str(injured.process.pid), "-f", "demoreset_trainer.cli members? ")
    for pid in map(int, subprocess.run(search, capture_output=True, text=True).stdout.split()):
        with suppress(ProcessLookupError):
            # The leader of their process group is the one that members are forked from.
            if pid not in known and os.getpgid(pid) != pid:
                return pid
    return None


def ending(injured: Injured, pid: int) -> str | None:
    """What the supervisor says of a member's end."""
    for line in injured.said().splitlines():
        if line.startswith("lost member ") and f"(pid {pid})" in line:
            return line.partition(f"(pid {pid}) at update ")[2].partition(": ")[2]
    return None


# Members that hang


def hold_lock(pid: int) -> None:
    """The member's main thread sleeps with the interpreter's lock in its hands."""
    os.kill(pid, signal.SIGUSR2)


def stop_environment(pid: int) -> int:
    """One of its environment processes answers no longer."""
    victim = random.choice(
        [
            child
            for child in tree(pid)
            if child != pid and "resource_tracker" not in " ".join(words(child))
        ]
    )
    os.kill(victim, signal.SIGSTOP)
    return victim


def hung(injured: Injured, strike: Callable[[int], int | None]) -> tuple[float, bool]:
    """Seconds until the others have added up without the victim; whether all of it then ends."""
    members = injured.whole()
    victim = random.choice(list(members)[1:])
    time.sleep(random.random())
    since = time.monotonic()
    harmed = strike(members[victim])

    def without() -> float | None:
        times: dict[str, float] = {}
        for event in injured.events:
            if event["event"] == "summed" and event["time"] > since:  # the first sum of a new group
                times.setdefault(event["member"], event["time"])
        others = set(members) - {victim}
        return max(times[id] for id in others) if others <= set(times) else None

    seconds = injured.wait(without, "the others go on") - since
    injured.wait(lambda: not alive(members[victim]), "the end of the victim")
    if harmed is None or gone([harmed], AFTERMATH):
        return seconds, True
    os.kill(harmed, signal.SIGKILL)
    return seconds, False


def hanging(strike: Callable[[int], int | None]) -> Callable[[int], Outcome]:
    """A member hangs: the others go on, its supervisor kills it, and nothing of it is left."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        with group(environment=inside()) as injured:
            for _ in range(trials):
                seconds, clean = hung(injured, strike)
                outcome.seconds.append(seconds)
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: {seconds:.3f} s", flush=True)
                if not clean:
                    outcome.failures.append("an environment process outlived its member")
            injured.whole()
            if injured.said().count(": hung: no beat for ") != trials:
                outcome.failures.append("not every victim was found hung by its supervisor")
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


# Poison


def poisoned(what: str) -> Callable[[int], Outcome]:
    """One member's numbers are spoiled again and again: all do without, nothing is saved of it."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        seen = "lost" if what == "weights" else "rejected"
        with group(environment=inside(what=what, place=1, every=20)) as injured:
            injured.whole()

            def hit() -> dict[int, set[str]]:
                found: dict[int, set[str]] = defaultdict(set)
                for event in injured.events:
                    if event["event"] == seen:
                        found[event["update"]].add(event["member"])
                return found

            last = 1 + max(e["update"] for e in injured.events if e["event"] == "commit")
            injured.wait(
                lambda: sum(update >= last for update in hit()) >= trials,
                f"{trials} that are {seen}",
                PATIENCE + 10 * trials,
            )
            injured.whole()
            time.sleep(1)
            members = set(injured.whole())
            outcome.failures += ended(injured)
        for update, those in sorted(hit().items()):
            if update >= last:
                outcome.n += 1
                if those != members:
                    outcome.failures.append(f"update {update} {seen} by {len(those)} members")
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


def hopeless(last_words: str, **poison: Any) -> Callable[[int], Outcome]:
    """Poison that stays: the run ends with 66 and these words, and all before it is on the disk."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome(facts={"updatesLost": 0})
        for _ in range(trials):
            with group(environment=inside(**poison)) as injured:
                begun = time.monotonic()
                code = injured.process.wait(PATIENCE)
                outcome.seconds.append(time.monotonic() - begun)
                outcome.n += 1
                last = injured.said().splitlines()[-1]
                print(f"  {outcome.n}/{trials}: {code}: {last}", flush=True)
                if code != ExitCode.NO_PROGRESS or last_words not in last:
                    outcome.failures.append(f"{code}: {last}")
                outcome.failures += unsound(injured.folder)
                outcome.facts["updatesLost"] += _unsaved(injured)
            outcome.events += injured.events
        return outcome

    return measure


# A changing number of members


class Crew(Watched):
    """A coordinator, and workers with a member each that come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        port = free_port()
        serve = ("coordinator", "--host", "127.0.0.1", "--port", str(port))
        super().__init__(folder, 0, [[*CLI, *serve]])
        self._command = [*CLI, "worker", "-f", str(RUN), "--dir", str(self.folder)]
        self._command += ["--coordinator", f"127.0.0.1:{port}", "--members", "1", "--port", "0"]
        self._command += ["--log", "plain", *SAVING, *QUICK]
        self._environment = {**os.environ, "DEMORESET_EVENTS": str(self.events_file)}
        self._born = 0

    def become(self, count: int) -> None:
        """Start workers, or ask some to stop, until there are so many; then wait for the group."""
        while self.count < count:
            self._born += 1
            command = [*self._command, "--id", f"w{self._born}"]
            self.processes.append(
                subprocess.Popen(
                    command, env=self._environment, stdout=self.log, stderr=subprocess.STDOUT
                )
            )
            self.count += 1
        leaving = [
            self.processes.pop(random.randrange(1, len(self.processes)))
            for _ in range(self.count - count)
        ]
        self.count = count
        for process in leaving:
            process.terminate()
        for process in leaving:
            if (code := process.wait(PATIENCE)) != ExitCode.DRAINED:
                raise RuntimeError(f"a worker that was asked to stop ended with {code}")
        self.whole()


def changing(trials: int, counts: Sequence[int] = (4, 2, 3, 1)) -> Outcome:
    """From one member to so many, trials times: every update has all frames, in all the same."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name:
        crew = Crew(Path(name))
        try:
            crew.become(1)
            for _ in range(trials):
                for count in counts:
                    crew.become(count)
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: at update {crew.events[-1]['update']}", flush=True)
        finally:
            crew.close()
        outcome.failures += unsound(crew.folder)
    drift = {e["frames"] - FRAMES * e["update"] for e in crew.events if e["event"] == "commit"}
    if drift != {0}:
        outcome.failures.append(f"frames are off by {sorted(drift)}")
    outcome.facts, outcome.events = {**check(crew.events), "framesDrift": max(drift)}, crew.events
    return outcome


def away(seconds: float) -> Callable[[Injured], float]:
    return lambda injured: without_port(injured, seconds, "away")


ROWS: dict[str, Row] = {
    "coordinator-5": Row(
        5, "the coordinator away for 5 s: after it", 20, losing_nobody(away(5)), 3.0
    ),
    "coordinator-60": Row(
        5, "the coordinator away for 60 s: after it", 5, losing_nobody(away(60)), 3.0
    ),
    "coordinator-frozen": Row(
        5, "the coordinator stopped for 5 s: after it", 20, losing_nobody(frozen_coordinator), 3.0
    ),
    "squatted": Row(
        6, "its port taken up to 3 s: after it; then garbage", 100, losing_nobody(squatted), 3.0
    ),
    "swept": Row(8, "SIGTERM at any moment of a command's life", 100, swept, GRACE),
    "swept-member": Row(8, "SIGTERM at any moment of a member's life", 100, swept_member, GRACE),
    "lock": Row(9, "a member holds the interpreter's lock", 10, hanging(hold_lock), 6.0),
    "environment": Row(
        9, "a member's environment process stopped", 10, hanging(stop_environment), 7.0
    ),
    "nan-loss": Row(17, "a member's loss is NaN", 20, poisoned("loss")),
    "inf-gradient": Row(17, "a member's gradient is infinite", 20, poisoned("gradient")),
    "nan-weights": Row(17, "a member's weights are NaN", 20, poisoned("weights")),
    "nan-always": Row(
        17, "a member's loss stays NaN: 66", 5, hopeless(NOT_FINITE, what="loss", place=1, since=20)
    ),
    "changing": Row(19, "1, 4, 2, 3, 1 members", 5, changing),
    "crash": Row(
        22, "all crash at the same update: 66", 5, hopeless(CRASHED, what="crash", since=20)
    ),
}
