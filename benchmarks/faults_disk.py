"""Disks that are full, slow, lost or lying; files that are torn, and files that mean harm."""

import gzip
import importlib
import io
import json
import lzma
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np

import torn_writes
from demoreset_api.errors import DemoResetError
from demoreset_trainer import checkpoint, cli
from demoreset_trainer import demo as demos
from demoreset_trainer.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE
from demoreset_trainer.emulator import Emulator
from injured import CLI, QUICK, Injured, Outcome, Row, check

# Row 14: kill -9 while saving


def killed_while_saving(trials: int) -> Outcome:
    """Half of the kills at random moments, half at system calls; a process on every core."""
    jobs = [
        (trials // 4 + (number < trials % 4), at_syscalls, number)
        for number, at_syscalls in enumerate((False, True, False, True))
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        parts = pool.starmap(_kills, jobs)
    counts = [asdict(part) for part in parts]
    outcome = Outcome(n=sum(part.kills for part in parts))
    outcome.failures = [failure for part in parts for failure in part.failures]
    outcome.facts = {
        "atSystemCalls": parts[1].kills + parts[3].kills,
        "midSave": sum(count["mid_save"] for count in counts),
        "halfFolders": sum(count["leftovers"] for count in counts),
        "timesAtEachSystemCall": sum(count["sweeps"] for count in counts),
    }
    return outcome


def _kills(kills: int, at_syscalls: bool, seed: int) -> torn_writes.Outcome:
    killer = torn_writes.at_syscalls(1) if at_syscalls else torn_writes.at_random(0.15)
    return torn_writes.attempt(kills, killer, seed)


# Row 15: files that are not as they were written

FILES = (MODEL, OPTIMIZER, STATE, MANIFEST)


def flipped(content: bytes) -> bytes:
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def cut(content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


def lengthened(content: bytes) -> bytes:
    return content + random.randbytes(random.randint(1, 4096))


def zeroed(content: bytes) -> bytes:
    """A page of zeros, as of a disk that lost a block."""
    at = random.randrange(0, len(content), 4096)
    return content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :]


def resized(content: bytes) -> bytes:
    """A manifest of our own making with another size: not even its seal is wrong."""
    manifest = json.loads(content)
    del manifest["sha256"]
    facts = manifest["files"][random.choice(FILES[:3])]
    facts["bytes"] = random.choice([0, -1, facts["bytes"] + 1, facts["bytes"] - 1, 10**12, 2**70])
    return json.dumps(manifest | {"sha256": checkpoint._seal(manifest)}).encode()


def damage(path: Path, other: Path) -> str:
    """Damage one file of a checkpoint, somehow; what was done."""
    file = random.choice(FILES)
    content = (path / file).read_bytes()
    kinds: list[Callable[[bytes], bytes] | str] = [flipped, flipped, cut, lengthened, zeroed]
    kinds += ["missing", "another's", resized]
    kind = random.choice(kinds)
    if kind == "missing":
        (path / file).unlink()
    elif kind == "another's":
        shutil.copy(other / file, path / file)
    elif kind is resized:
        file = MANIFEST
        (path / file).write_bytes(resized((path / file).read_bytes()))
    else:
        assert callable(kind)
        while (changed := kind(content)) == content:
            pass
        (path / file).write_bytes(changed)
    return f"{file} {kind if isinstance(kind, str) else kind.__name__}"


def damaged(trials: int) -> Outcome:
    """A folder with three checkpoints, of which the newest one or two are damaged."""
    outcome, kinds = Outcome(), dict[str, int]()
    random.seed(15)
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name, "whole"), Path(name, "checkpoints")
        whole.mkdir()
        states = {update: torn_writes.snapshot(1, update) for update in (3, 6, 9)}
        paths = [checkpoint.write(whole, states[update]) for update in states]
        for _ in range(trials):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            victims = [folder / path.name for path in paths[random.choice((1, 2)) :]]
            done = [damage(victim, paths[0]) for victim in victims]
            kept = {path: (folder / path.name).stat().st_ino for path in victims}
            outcome.n += 1
            for kind in done:
                kinds[kind] = kinds.get(kind, 0) + 1
            expected = paths[-1 - len(victims)].name
            try:
                found = checkpoint.newest(folder)
                assert found == folder / expected, f"{found} was taken"
                state = checkpoint.read(found)
                assert torn_writes.same(state, states[state.update]), "other values"
                for path, inode in kept.items():
                    aside = folder / f"broken-{path.name}"
                    assert aside.stat().st_ino == inode, f"{path.name} is not set aside"
            except Exception as error:
                outcome.failures.append(f"{', '.join(done)}: {type(error).__name__}: {error}")
    outcome.facts["kinds"] = len(kinds)
    return outcome


# Row 16: disks that fail under a run, and come back


@contextmanager
def full(disk: Path, pid: int) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(disk: Path, pid: int) -> Iterator[None]:
    while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
        time.sleep(0.005)  # it is busy as long as a file is open for writing
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@contextmanager
def small_files(disk: Path, pid: int) -> Iterator[None]:
    """No file may be larger than a part of a checkpoint."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def injected(calls: str, what: str) -> "Strike":
    """System calls of the process that fail, or take their time."""

    @contextmanager
    def strike(disk: Path, pid: int) -> Iterator[None]:
        command = ["strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid), "-e", f"trace={calls}"]
        tracer = subprocess.Popen([*command, "-e", f"inject={calls}:{what}"])
        while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                raise RuntimeError(f"strace ended with {tracer.returncode}")
            time.sleep(0.01)
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(60)

    return strike


Strike = Callable[[Path, int], AbstractContextManager[None]]
FOLDERS = "mkdir,rename,unlinkat,getdents64"  # and nobody else's calls while a run trains
ONGOING = 10  # updates that must be done while the fault lasts


@contextmanager
def on_disk() -> Iterator[tuple[Injured, Path]]:
    """A group of two that saves once a second, on a small disk of its own."""
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name, "run", "checkpoints")
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
        try:
            changes = (*QUICK, "--set", "spec.checkpoint.intervalSeconds=1")
            injured = Injured(Path(name), 2, changes)
            try:
                yield injured, disk
            finally:
                injured.close()
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def failing(strike: Strike, says: str | None) -> Callable[[int], Outcome]:
    """The disk fails again and again under one run; seconds: from its return to a checkpoint."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        with on_disk() as (injured, disk):
            for _ in range(trials):
                try:
                    outcome.seconds.append(_fail(injured, disk, strike, says))
                except Exception as error:
                    outcome.failures.append(f"{type(error).__name__}: {error}")
                outcome.n += 1
                print(f"  {outcome.n}/{trials}: {outcome.seconds[-1:]} s", flush=True)
                if injured.process.poll() is not None:
                    break
            code = injured.close()
            if code != 130 or "Traceback" in injured.said():
                outcome.failures.append(f"the run ended with {code}: {injured.said()[-300:]}")
        outcome.facts, outcome.events = dict(check(injured.events)), injured.events
        return outcome

    return measure


def _fail(injured: Injured, disk: Path, strike: Strike, says: str | None) -> float:
    members = injured.whole()
    before = _newest(disk)
    injured.wait(lambda: _newest(disk) > before, "a checkpoint before the fault")
    told = len(injured.said())

    def update() -> int:
        return int(max(e["update"] for e in injured.look() if e["event"] == "commit"))

    with strike(disk, next(iter(members.values()))):
        if says is not None:
            injured.wait(lambda: says in injured.said()[told:], f"the message {says!r}")
        reached = update()
        old = sorted(path.name for path in disk.glob("ckpt-*"))
        injured.wait(lambda: update() > reached + ONGOING, "training goes on")
        if says is not None:  # else saving goes on, if slowly
            assert sorted(path.name for path in disk.glob("ckpt-*")) == old, "one went or came"
            for name in old:
                checkpoint.read(disk / name)
        held = _newest(disk)
    since = time.monotonic()
    injured.wait(lambda: _newest(disk) > held, "a checkpoint after the fault")
    seconds = time.monotonic() - since
    if says is not None:
        again = "checkpoints are written again"
        injured.wait(lambda: again in injured.said()[told:], f"the message {again!r}")
    assert injured.whole() == members, "a member was lost"
    return seconds


def _newest(disk: Path) -> int:
    """Update of the newest checkpoint that verifies; others may be deleted meanwhile."""
    for _ in range(10):
        with suppress(DemoResetError):
            return checkpoint.read(checkpoint.find(disk)).update
    return 0


# Row 18: files that mean harm

DEMO_MEMORY, RUN_MEMORY = 1 << 30, 8 << 30  # address space; a run imports torch
HUGE = 10 << 30
CROSSING = demos.find("freeway-crossing").read_bytes()
REFUSED, NONE_VALID, DIFFERS = 64, 65, 1  # exit codes


class Runs:
    """What a pickle would run: it leaves a trace."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self._canary}",)


@cache
def crossing() -> dict[str, object]:
    """The bundled crossing as OpenAI published demonstrations."""
    demo = demos.from_bytes(CROSSING, "freeway-crossing")
    places = Emulator(demo.game).minimal_actions
    return {
        "actions": [places.index(code) for code in demo.actions.tolist()],
        "rewards": [np.float64(reward) for reward in demo.rewards],
        "lives": demo.lives.tolist(),
    }


def headed(size: int, header: bytes) -> bytes:
    """The beginning of a safetensors file that claims a header of `size` bytes."""
    return size.to_bytes(8, "little") + header


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("demo", content)
    return file.getvalue()


def deep(levels: int) -> bytes:
    """A good demo's header with JSON so deep that a parser's stack would not do."""
    card = json.dumps({"__metadata__": {"demo": "[" * levels}}).encode()
    return headed(len(card), card)


def hostile(canary: Path) -> dict[str, bytes]:
    """Files that a demonstration may turn out to be, by what they are."""
    runs = Runs(canary)
    tensor = {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}
    claim = json.dumps({"actions": tensor}).encode()
    bomb = bytes(200 << 20)
    return {
        **{f"pickle {number}": pickle.dumps(runs, number) for number in range(6)},
        **{f"within {n}": pickle.dumps(crossing() | {"lives": [runs]}, n) for n in (2, 4, 5)},
        "a table of 64 GB": b"\x80\x03]r\xff\xff\xff\xff.",
        "bytes that are not there": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        "lists in lists": b"\x80\x03" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "gzip bomb": gzip.compress(bomb),
        "zip bomb": zipped(bomb),
        "xz bomb": lzma.compress(bomb, preset=0),
        "header of 10 GB": headed(HUGE, b'{"__metadata__":{}}'),
        "header without end": headed(2**64 - 1, b"{}"),
        "tensor of 10 GB": headed(len(claim), claim),
        "deep header": deep(10_000_000),
        "cut": CROSSING[: len(CROSSING) // 2],
        "empty": b"",
        "zeros": bytes(len(CROSSING)),
    }


def hostile_states(canary: Path) -> dict[str, dict[str, bytes]]:
    """Files that a checkpoint may hold, with a manifest that agrees with them."""
    buffer = io.BytesIO()
    pickle.dump(Runs(canary), buffer)
    return {
        "pickle for weights": {MODEL: buffer.getvalue()},
        "weights with a header of 10 GB": {MODEL: headed(HUGE, b"{}")},
        "deep state": {STATE: b"[" * 1_000_000},
        "pickle for a state": {STATE: buffer.getvalue()},
    }


def checkpoint_of(folder: Path, files: dict[str, bytes]) -> Path:
    """A checkpoint with these files instead of its own, and sealed."""
    path = checkpoint.write(folder, torn_writes.snapshot(1, 3))
    for file, content in files.items():
        (path / file).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] |= {file: checkpoint._facts(content) for file, content in files.items()}
    sealed = manifest | {"sha256": checkpoint._seal(manifest)}
    (path / MANIFEST).write_text(json.dumps(sealed))
    return path


def huge(path: Path) -> Path:
    """A file of 10 GB that takes no space."""
    path.touch()
    os.truncate(path, HUGE)
    return path


class Fed:
    """Feeds files to the command, and looks at what it did with them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.outcome = Outcome(facts={"refused": 0, "differs": 0, "exact": 0})

    def command(self, what: str, words: list[str], *, memory: int, expect: int) -> None:
        """The command as a process of its own."""
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (memory, memory))
        try:
            done = subprocess.run(
                [*CLI, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                preexec_fn=limit,
            )
        except subprocess.TimeoutExpired:
            self.judge(f"{what}: {words[:2]}", -1, "it does not end", (expect,))
            return
        self.judge(f"{what}: {words[:2]}", done.returncode, done.stdout, (expect,))

    def fork(self, what: str, words: list[str]) -> None:
        """The command in a fork of this process, which has imported it."""
        out = self.folder / "out"
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (DEMO_MEMORY, DEMO_MEMORY))
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = 70
            try:
                code = cli.main(words)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        self.judge(what, code, out.read_text(errors="replace"), (REFUSED, DIFFERS, 0))

    def judge(self, what: str, code: int, said: str, expect: tuple[int, ...]) -> None:
        self.outcome.n += 1
        if code not in expect or "Traceback" in said or self.canary.exists():
            ran = "IT RAN; " if self.canary.exists() else ""
            self.outcome.failures.append(f"{what}: {ran}code {code}: {said[-300:]}")
            self.canary.unlink(missing_ok=True)
        kind = {0: "exact", DIFFERS: "differs"}.get(code, "refused")
        self.outcome.facts[kind] += 1


def harmful(trials: int) -> Outcome:
    """Each kind of file to each command that reads it; then good files with damage, `trials`."""
    random.seed(18)
    with tempfile.TemporaryDirectory() as name:
        fed = Fed(Path(name))
        _feed_demos(fed)
        _feed_states(fed)
        for module in (*cli.COMMANDS, "demo_import"):  # once, not in every fork
            importlib.import_module(f"demoreset_trainer.{module}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        for number in range(trials):
            _feed_damaged(fed, number)
        fed.outcome.facts["peakMiB"] = round(peak / 1024)
        return fed.outcome


def _feed_demos(fed: Fed) -> None:
    path, out = fed.folder / "Freeway.demo", fed.folder / "out.demo.safetensors"
    file = fed.folder / "run.yaml"
    run = {
        "apiVersion": "demoreset.dev/v1alpha1",
        "kind": "DemoResetRun",
        "metadata": {"name": "harm"},
        "spec": {"demo": {"path": path.name}},
    }
    file.write_text(json.dumps(run))
    folder = str(fed.folder / "never")
    commands = (
        (["demo", "verify", str(path)], DEMO_MEMORY),
        (["demo", "import", str(path), "--out", str(out)], DEMO_MEMORY),
        (["run", "-f", str(file), "--dir", folder, "--members", "1"], RUN_MEMORY),
    )
    for what, content in hostile(fed.canary).items():
        path.write_bytes(content)
        for words, memory in commands:
            fed.command(what, words, memory=memory, expect=REFUSED)
    path.unlink()
    huge(path)
    for words, memory in commands:
        fed.command("a file of 10 GB", words, memory=memory, expect=REFUSED)


def _feed_states(fed: Fed) -> None:
    run = str(Path(__file__).parents[1] / "demos/freeway-crossing.yaml")

    def feed(what: str, folder: Path) -> None:
        words = ["run", "-f", run, "--dir", str(folder), "--members", "1"]
        fed.command(what, words, memory=RUN_MEMORY, expect=NONE_VALID)
        shutil.rmtree(folder)

    folder = fed.folder / "run"
    for what, files in hostile_states(fed.canary).items():
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint_of(folder / "checkpoints", files)
        feed(what, folder)
    (folder / "checkpoints").mkdir(parents=True)
    path = checkpoint_of(folder / "checkpoints", {})
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"][MODEL]["bytes"] = HUGE
    sealed = manifest | {"sha256": checkpoint._seal(manifest)}
    (path / MANIFEST).write_text(json.dumps(sealed))
    huge(path / MODEL)
    feed("weights of 10 GB", folder)


def _feed_damaged(fed: Fed, number: int) -> None:
    """A bundled demo, or a recording as published, with a bit flipped, a page zeroed, or cut."""
    damage = random.choice((flipped, flipped, flipped, cut, zeroed))
    if number % 2:
        path = fed.folder / "Freeway.demo"
        path.write_bytes(damage(pickle.dumps(crossing(), 2 + number % 4)))
        words = ["demo", "import", str(path), "--force", "--out"]
        words.append(str(fed.folder / "out.demo.safetensors"))
    else:
        path = fed.folder / "x.demo.safetensors"
        path.write_bytes(damage(CROSSING))
        words = ["demo", "verify", str(path)]
    fed.fork(f"{damage.__name__} {path.name}", words)


ROWS: dict[str, Row] = {
    "torn": Row(14, "kill -9 at every point of a save", 10_000, killed_while_saving),
    "damaged": Row(15, "files of a checkpoint cut, flipped, zeroed, gone", 2_000, damaged),
    "full": Row(16, "the disk is full (ENOSPC)", 20, failing(full, "No space left")),
    "file-limit": Row(
        16, "files may not grow (RLIMIT_FSIZE)", 20, failing(small_files, "File too large")
    ),
    "read-only": Row(16, "the disk turns read-only (EROFS)", 20, failing(read_only, "Read-only")),
    "quota": Row(
        16, "over quota (EDQUOT)", 20, failing(injected("fsync", "error=EDQUOT"), "quota exceeded")
    ),
    "flush": Row(
        16, "fsync fails (EIO)", 20, failing(injected("fsync", "error=EIO"), "Input/output error")
    ),
    "stale": Row(
        16, "the folder is stale (ESTALE)", 20, failing(injected(FOLDERS, "error=ESTALE"), "Stale")
    ),
    "slow": Row(
        16,
        "each fsync takes 2 s",
        20,
        failing(injected("fsync", "delay_enter=2000000"), None),
    ),
    "harmful": Row(18, "damaged demos, malicious pickles, bombs", 1_000, harmful),
}
