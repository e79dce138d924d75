"""Disks that fail and files that mean harm: training goes on, and nothing is taken at its word."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch

from demoreset_api.errors import NoValidCheckpoint, TryAgain, UserError
from demoreset_trainer import checkpoint, demo, run_folder
from demoreset_trainer.checkpoint import MANIFEST, MODEL, STATE, Snapshot
from demoreset_trainer.checkpoint_writer import CheckpointWriter
from demoreset_trainer.disk import write_all

TORN_WRITES = Path(__file__).parents[2] / "benchmarks" / "torn_writes.py"


def snapshot(update: int) -> Snapshot:
    weights = {"w": torch.full((1000,), float(update))}
    return Snapshot(1, update, update * 1000, 1, weights, {}, {"update": update})


def test_kill_9_at_system_calls_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, str(TORN_WRITES), "--syscalls", "--kills", "60", "--step", "13"]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 kills" in done.stdout
    assert " 0 failures" in done.stdout
    assert "1 times at each" in done.stdout  # the last stops had their turn


def test_a_disk_that_cannot_be_read_for_a_while_stops_nothing(tmp_path: Path) -> None:
    notes: list[str] = []
    with CheckpointWriter(tmp_path, keep=2, interval=0, note=notes.append) as writer:
        unreadable = tmp_path / snapshot(9).name
        unreadable.mkdir()
        (unreadable / MANIFEST).symlink_to(MANIFEST)  # ELOOP: an error that is not "missing"
        writer.save(snapshot(1))
        writer._wait(30)
        assert "cannot be read now" in (writer.error or "")
        shutil.rmtree(unreadable)
        writer.save(snapshot(2))
        assert writer.finish(snapshot(3))
    assert [note.split(" (")[0] for note in notes] == [
        "old checkpoints not deleted",
        "checkpoints are written again",
    ]
    assert "training goes on" in notes[0]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, UserError),
        (errno.ENOENT, UserError),
        (errno.EIO, TryAgain),
        (errno.ESTALE, TryAgain),
        (errno.EHOSTDOWN, TryAgain),  # a share during a failover
        (errno.EREMOTEIO, TryAgain),
        (errno.EAGAIN, TryAgain),
        (errno.EMFILE, TryAgain),
    ],
)
def test_a_volume_that_is_away_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, kind: type[Exception]
) -> None:
    def away(self: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "mine.demo.safetensors"
    monkeypatch.setattr(Path, "stat", away)
    with pytest.raises(kind, match=f"mine.demo.safetensors: cannot be read: {os.strerror(number)}"):
        demo.read_file(path, 100)


def test_a_folder_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="cannot be written now"):
        checkpoint.next_life(tmp_path / "away")


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "make room there"), (errno.EROFS, "put its disk right")]
)
def test_who_runs_out_of_disk_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, says: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder, "write_whole", full)
    with pytest.raises(TryAgain, match=f"run.json: cannot be written now: .*; {says}, or choose a"):
        run_folder.write_json(tmp_path / run_folder.SPEC, {})


def test_of_several_files_none_gets_its_name_before_all_are_written(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.write_bytes(b"before")
    with pytest.raises(FileNotFoundError):
        write_all({one: b"after", tmp_path / "none" / "two": b"after"})
    assert one.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["one"]


FLUSHES = """
import sys
from pathlib import Path
import torch
from demoreset_trainer import checkpoint, demo, run_folder

folder = Path(sys.argv[1])
for update in (1, 2, 3):
    try:
        checkpoint.write(folder, checkpoint.Snapshot(1, update, 0, 1, {"w": torch.ones(9)}, {}, {}))
    except OSError as error:
        print(update, error)
for path in sorted(folder.iterdir()):
    checkpoint.read(path)
    print(path.name[-1], "is whole")
"""


# Six flushes make a save: of four files, and of the folder before and after it gets its name.
@pytest.mark.parametrize(("flush", "whole"), [(7, [1, 3]), (11, [1, 3]), (12, [1, 2, 3])])
def test_a_flush_that_fails_is_told_and_leaves_nothing_half(
    tmp_path: Path, flush: int, whole: list[int]
) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, to let fsync fail")
    fault = ["-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={flush}"]
    done = subprocess.run(
        [strace, "-f", "-o", os.devnull, *fault, sys.executable, "-c", FLUSHES, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE" in done.stderr:
        pytest.skip(f"needs the right to trace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 [Errno 5] Input/output error",
        *(f"{update} is whole" for update in whole),
    ]


@pytest.mark.parametrize("claimed", [10 << 30, 2**70, -2, -(2**70), 1e300, float("inf"), None])
def test_a_size_that_a_manifest_claims_takes_no_memory(tmp_path: Path, claimed: object) -> None:
    path = checkpoint.write(tmp_path, snapshot(1))
    seal(path, {MODEL: {"bytes": claimed, "sha256": "0" * 64}})
    tracemalloc.start()
    try:
        with pytest.raises(NoValidCheckpoint):
            checkpoint.newest(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_weights_of_10_gb_are_not_read(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(1))
    os.truncate(path / MODEL, 10 << 30)
    seal(path, {MODEL: {"bytes": 10 << 30, "sha256": "0" * 64}})
    tracemalloc.start()
    try:
        with pytest.raises(NoValidCheckpoint):
            checkpoint.newest(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_state_that_is_too_deep_is_damage(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(1))
    deep = b"[" * 1_000_000
    (path / STATE).write_bytes(deep)
    seal(path, {STATE: checkpoint._facts(deep)})
    with pytest.raises(NoValidCheckpoint, match="damaged"):
        checkpoint.newest(tmp_path)


def seal(path: Path, files: dict[str, object]) -> None:
    """A manifest that agrees with the files, as a stranger would make it."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] |= files
    sealed = manifest | {"sha256": checkpoint._seal(manifest)}
    (path / MANIFEST).write_text(json.dumps(sealed))


@pytest.mark.parametrize(
    ("begins", "says"),
    [
        (b"", "not a demo"),  # zeros
        ((10 << 30).to_bytes(8, "little") + b"{}", "not a demo"),
        (b"\x80\x03]", "a pickle"),
    ],
)
@pytest.mark.parametrize("size", [100, 10 << 30])
def test_the_command_refuses_a_hostile_demo_in_little_memory(
    tmp_path: Path, begins: bytes, says: str, size: int
) -> None:
    path = tmp_path / "x.demo.safetensors"
    path.write_bytes(begins)
    os.truncate(path, size)  # it takes no space
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 30, 1 << 30))
    done = subprocess.run(
        [sys.executable, "-m", "demoreset_trainer.cli", "demo", "verify", path],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 64, done.stderr
    assert ("too large" if size > 100 else says) in done.stderr
    assert len(done.stderr.splitlines()) == 1
