"""kill -9 at random moments of saving: is there always a whole checkpoint, and the right one?

Each round forks a writer that begins as a run does (newest checkpoint, next life), then saves one
update after the other, and is killed at a random moment. The folder must then hold a checkpoint
that verifies, whose every value is the one of its update, and that is not older than the last save
that was reported as done. `--control` writes without the hidden name, to show that kills do hit.

    python benchmarks/torn_writes.py --kills 1000

This is the death of a process; the power of a machine is not cut here.
"""

import argparse
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
from dataclasses import dataclass, field
from pathlib import Path

import torch

from demoreset_api.errors import DemoResetError
from demoreset_trainer import checkpoint
from demoreset_trainer.checkpoint import Snapshot

SIZES = (1_000, 100_000, 425_000)  # parameters; the last is the size of a real run's policy
KEEP = 3
REPORT = 12  # bytes: one letter, eleven digits


@dataclass
class Outcome:
    """What the kills did."""

    kills: int = 0
    mid_save: int = 0  # a save was begun and not reported as done
    leftovers: int = 0  # half a checkpoint, or half a deletion, lay hidden in the folder
    saves: int = 0
    failures: list[str] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)


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


def write_in_place(folder: Path, state: Snapshot) -> Path:
    """The control: as `checkpoint.write`, but under the final name from the first byte."""
    whole = checkpoint.write(Path(tempfile.mkdtemp(dir=folder.parent)), state)
    target = folder / state.name
    target.mkdir()
    for file in (checkpoint.MANIFEST, checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
        (target / file).write_bytes((whole / file).read_bytes())
    shutil.rmtree(whole.parent)
    return target


def save_for_ever(folder: Path, reports: int, control: bool) -> None:
    """The writer's life: as a run that begins, then one save after the other."""
    write = write_in_place if control else checkpoint.write
    found = checkpoint.newest(folder)
    update = checkpoint.read(found).update if found else 0
    life = checkpoint.next_life(folder)
    while True:
        update += 1
        state = snapshot(life, update)
        os.write(reports, b"b%011d" % update)
        path = write(folder, state)
        os.write(reports, b"d%011d" % update)
        if update % 7 == 0:
            checkpoint.mark_best(folder, path)
        checkpoint.prune(folder, KEEP)


def kill_one(folder: Path, delay: float, control: bool) -> tuple[int, int, int]:
    """Let a writer work for `delay` seconds from its first save; (begun, done, saves)."""
    receive, send = os.pipe()
    child = os.fork()  # one thread, torch imported already: 2 ms instead of 2 s
    if child == 0:
        try:
            os.close(receive)
            save_for_ever(folder, send, control)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(send)
    if random.random() < 0.8:  # the others die wherever they are, perhaps before the first save
        select.select([receive], [], [], 10)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    reports = b""
    while part := os.read(receive, 1 << 16):
        reports += part
    os.close(receive)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("the writer ended by itself: its error is above")
    lines = [reports[at : at + REPORT] for at in range(0, len(reports), REPORT)]
    begun = max((int(line[1:]) for line in lines if line[:1] == b"b"), default=0)
    done = [int(line[1:]) for line in lines if line[:1] == b"d"]
    return begun, max(done, default=0), len(done)


def run(folder: Path, kills: int, seed: int, longest: float, control: bool) -> Outcome:
    """Kill `kills` writers; after each, look at what they left."""
    random.seed(seed)
    outcome, last = Outcome(), 0  # the newest update that must be there
    for _ in range(kills):
        begun, done, saves = kill_one(folder, random.uniform(0, longest), control)
        outcome.kills += 1
        outcome.saves += saves
        outcome.mid_save += begun > done
        outcome.leftovers += any(folder.glob(".partial-*"))
        last = max(last, done)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.15, help="seconds until a kill, at most")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--control", action="store_true", help="write in place instead")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork copies only the thread that calls it
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        started = time.perf_counter()
        outcome = run(folder, options.kills, options.seed, options.longest, options.control)
        seconds = time.perf_counter() - started
        checkpoint.next_life(folder)
        left = [path.name for path in folder.glob(".partial-*")]
    if left:
        outcome.failures.append(f"the next life did not clear away {left}")
    for failure in outcome.failures[:10]:
        print(f"  {failure}")
    reading = statistics.median(outcome.read_seconds) * 1000 if outcome.read_seconds else 0.0
    print(
        f"{outcome.kills} kills in {seconds:.0f} s, {outcome.mid_save} in the middle of a save "
        f"({outcome.leftovers} left half a folder), {outcome.saves} whole saves between them: "
        f"{len(outcome.failures)} failures; newest + read {reading:.1f} ms (median)"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
