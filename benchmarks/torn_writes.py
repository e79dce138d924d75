"""kill -9 at every point of saving: is there always a whole checkpoint, and the right one?

Each round forks a writer that begins as a run does (newest checkpoint, next life), then saves one
update after the other, and is killed: at a random moment, or (`--syscalls`) at the beginning and
the end of each of its system calls in turn. The folder must then hold a checkpoint that verifies,
whose every value is the one of its update, and that is not older than the last save that was
reported as done. `--control` writes without the hidden name, to show that kills do hit.

    python benchmarks/torn_writes.py --kills 1000
    python benchmarks/torn_writes.py --kills 1000 --syscalls

This is the death of a process; the power of a machine is not cut here.
"""

import argparse
import ctypes
import itertools
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from demoreset_api.errors import DemoResetError
from demoreset_trainer import checkpoint
from demoreset_trainer.checkpoint import Snapshot

SIZES = (1_000, 100_000, 425_000)  # parameters; the last is the size of a real run's policy
KEEP = 3
REPORT = 12  # bytes: one letter, eleven digits
LONGEST = 0.15  # seconds until a kill at a random moment
PTRACE_TRACEME, PTRACE_SYSCALL = 0, 24


@dataclass
class Outcome:
    """What the kills did."""

    kills: int = 0
    mid_save: int = 0  # a save was begun and not reported as done
    leftovers: int = 0  # half a checkpoint, or half a deletion, lay hidden in the folder
    saves: int = 0
    sweeps: int = 0  # times that a writer was killed at each of its system calls
    failures: list[str] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Written:
    """What a writer reported: the last update that it began and that it saved, and how many."""

    begun: int
    done: int
    saves: int
    killed: bool = True


Killer = Callable[[Path], Written]
Write = Callable[[Path, Snapshot], Path]


def snapshot(life: int, update: int) -> Snapshot:
    """A state whose every value follows from its update."""
    size = SIZES[update % len(SIZES)]
    values = torch.arange(size, dtype=torch.float32) + update
    return Snapshot(
        life=life,
        update=update,
        frames=update * 1024,
        members=1,
        model={"weights": values},
        optimizer={"0.exp_avg": values + 1, "0.exp_avg_sq": values + 2},
        state={"update": update, "curriculum": list(range(update, update + 100))},
    )


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two states are equal, bit by bit."""
    return (
        (a.update, a.frames, a.members, a.state) == (b.update, b.frames, b.members, b.state)
        and a.model.keys() == b.model.keys()
        and a.optimizer.keys() == b.optimizer.keys()
        and all(torch.equal(a.model[name], b.model[name]) for name in a.model)
        and all(torch.equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer)
    )


# The writer


def write_in_place(folder: Path, state: Snapshot) -> Path:
    """The control: as `checkpoint.write`, but under the final name from the first byte."""
    whole = checkpoint.write(Path(tempfile.mkdtemp(dir=folder.parent)), state)
    target = folder / state.name
    target.mkdir()
    for file in (checkpoint.MANIFEST, checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
        (target / file).write_bytes((whole / file).read_bytes())
    shutil.rmtree(whole.parent)
    return target


def save(folder: Path, reports: int, write: Write, saves: int | None = None) -> None:
    """The writer's life: as a run that begins, then one save after the other."""
    found = checkpoint.newest(folder)
    first = checkpoint.read(found).update + 1 if found else 1
    life = checkpoint.next_life(folder)
    for update in itertools.islice(itertools.count(first), saves):
        state = snapshot(life, update)
        os.write(reports, b"b%011d" % update)
        path = write(folder, state)
        os.write(reports, b"d%011d" % update)
        if update % 7 == 0:
            checkpoint.mark_best(folder, path)
        checkpoint.prune(folder, KEEP)


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """A writer: its process, and where to read what it reports."""
    receive, send = os.pipe()
    child = os.fork()  # one thread, torch imported already: 2 ms instead of 2 s
    if child == 0:
        code = 1
        try:
            os.close(receive)
            work(send)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    return child, receive


def told(receive: int, status: int) -> Written:
    """All that a writer that has ended reported."""
    reports = b""
    while part := os.read(receive, 1 << 16):
        reports += part
    os.close(receive)
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        raise RuntimeError("the writer ended by itself: its error is above")
    lines = [reports[at : at + REPORT] for at in range(0, len(reports), REPORT)]
    begun = max((int(line[1:]) for line in lines if line[:1] == b"b"), default=0)
    done = [int(line[1:]) for line in lines if line[:1] == b"d"]
    return Written(begun, max(done, default=0), len(done), killed)


# The killers


def at_random(longest: float, write: Write = checkpoint.write) -> Killer:
    """Let a writer work for up to `longest` seconds from its first save."""

    def kill(folder: Path) -> Written:
        child, receive = fork(lambda reports: save(folder, reports, write))
        if random.random() < 0.8:  # the others die wherever they are, perhaps before the first save
            select.select([receive], [], [], 10)
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return told(receive, status)

    return kill


def at_syscalls(step: int) -> Killer:
    """Stop a writer of one save at each system call, and kill it at every `step`-th stop in turn.

    It is stopped where a call begins and where it ends. One that outlives its last stop is whole;
    the next is killed at the first one again, shifted where not every stop has its turn.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    turns = itertools.count()  # of the stops of this sweep
    shifts = itertools.cycle(range(step))
    shift = next(shifts)

    def kill(folder: Path) -> Written:
        nonlocal turns, shift

        def work(reports: int) -> None:
            ptrace(PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            save(folder, reports, checkpoint.write, saves=1)

        child, receive = fork(work)
        _, status = os.waitpid(child, 0)
        left = shift + step * next(turns)
        while os.WIFSTOPPED(status):
            if left == 0:
                os.kill(child, signal.SIGKILL)
            left -= 1
            ptrace(PTRACE_SYSCALL, child, None, None)
            _, status = os.waitpid(child, 0)
        written = told(receive, status)
        if not written.killed:
            turns, shift = itertools.count(), next(shifts)
        return written

    return kill


def run(folder: Path, kills: int, kill: Killer) -> Outcome:
    """Kill `kills` writers; after each, look at what they left."""
    outcome, last = Outcome(), 0  # the newest update that must be there
    while outcome.kills < kills:
        written = kill(folder)
        begun = written.begun
        outcome.kills += written.killed
        outcome.sweeps += not written.killed
        outcome.saves += written.saves
        outcome.mid_save += begun > written.done
        outcome.leftovers += any(folder.glob(".partial-*"))
        last = max(last, written.done)
        started = time.perf_counter()
        broken = len(list(folder.glob("broken-*")))
        try:
            found = checkpoint.newest(folder)
            if found is None:
                if last:
                    outcome.failures.append(f"update {last} was saved, nothing is there")
                continue
            state = checkpoint.read(found)
        except DemoResetError as error:
            outcome.failures.append(str(error))
            for path in folder.iterdir():  # else the next writer would refuse to begin, rightly
                if path.is_dir():
                    shutil.rmtree(path)
            last = 0
            continue
        outcome.read_seconds.append(time.perf_counter() - started)
        if len(list(folder.glob("broken-*"))) > broken:
            outcome.failures.append(f"a torn checkpoint was passed over for {found.name}")
        elif not last <= state.update <= max(last, begun):
            outcome.failures.append(
                f"update {state.update} is there; {last} was done, {begun} begun"
            )
        elif not same(state, snapshot(state.life, state.update)):
            outcome.failures.append(f"{found.name}: not the values of its update")
        last = state.update
    return outcome


def attempt(kills: int, kill: Killer, seed: int = 0, place: Path | None = None) -> Outcome:
    """Kill `kills` writers in a new folder, and let one that lives clear up after them."""
    torch.set_num_threads(1)  # a fork copies only the thread that calls it
    random.seed(seed)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        started = time.perf_counter()
        outcome = run(folder, kills, kill)
        outcome.seconds = time.perf_counter() - started
        checkpoint.next_life(folder)
        if left := [path.name for path in folder.glob(".partial-*")]:
            outcome.failures.append(f"the next life did not clear away {left}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds until a kill")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--control", action="store_true", help="write in place instead")
    parser.add_argument("--syscalls", action="store_true", help="kill at system calls, in turn")
    parser.add_argument("--step", type=int, default=1, help="kill at every STEP-th of these")
    options = parser.parse_args()
    write = write_in_place if options.control else checkpoint.write
    kill = at_syscalls(options.step) if options.syscalls else at_random(options.longest, write)
    outcome = attempt(options.kills, kill, options.seed, options.dir)
    for failure in outcome.failures[:10]:
        print(f"  {failure}")
    reading = statistics.median(outcome.read_seconds) * 1000 if outcome.read_seconds else 0.0
    print(
        f"{outcome.kills} kills in {outcome.seconds:.0f} s, {outcome.mid_save} in the middle of a "
        f"save ({outcome.leftovers} left half a folder), {outcome.saves} whole saves between them: "
        f"{len(outcome.failures)} failures; newest + read {reading:.1f} ms (median)"
    )
    if outcome.sweeps:
        print(f"{outcome.sweeps} times at each of a save's system calls")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
