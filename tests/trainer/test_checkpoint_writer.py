"""Saving while training goes on: no disk, however bad, stops the training or loses what was."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from demoreset_api.errors import TryAgain
from demoreset_trainer import checkpoint, checkpoint_writer, lives
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.checkpoint_writer import CheckpointWriter
from demoreset_trainer.disk import flush_folder
from demoreset_trainer.progress import Progress


def snapshot(update: int, life: int = 1, floats: int = 1000) -> Snapshot:
    values = torch.full((floats,), float(update))
    return Snapshot(life, update, update * 1000, 1, {"w": values}, {}, {"update": update})


def updates(folder: Path) -> list[int]:
    return sorted(int(path.name[-10:]) for path in folder.glob("ckpt-*"))


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, notes: list[str]) -> Iterator[CheckpointWriter]:
    with CheckpointWriter(tmp_path, keep=2, interval=0.001, note=notes.append) as writer:
        yield writer


class SlowDisk:
    """Holds every write until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        write = checkpoint.write

        def held(folder: Path, snapshot: Snapshot) -> Path:
            self.begun.set()
            assert self.go_on.wait(30)
            return write(folder, snapshot)

        monkeypatch.setattr(checkpoint, "write", held)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.go_on.set()


def test_what_was_offered_is_on_the_disk_in_the_end(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str]
) -> None:
    assert writer.finish(snapshot(7))
    path = checkpoint.newest(tmp_path)
    assert path is not None
    assert checkpoint.read(path).model["w"].eq(7).all()
    assert writer.facts()["checkpoint_update"] == 7
    assert writer.facts()["checkpoint_bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert notes == []


def test_what_could_not_be_marked_as_the_best_is_not_taken_for_kept(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "mark_best", full)
        assert not writer.finish(snapshot(7), candidate=True)
        assert writer.error is not None
    assert writer.finish(snapshot(8), candidate=True)
    assert (tmp_path / checkpoint.BEST).read_text().strip().endswith("8")
    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "prune", full)
        assert writer.finish(snapshot(9))
    assert notes[-1].startswith("old checkpoints not deleted ([Errno 28] No space left")


def test_training_goes_on_while_the_disk_is_slow(
    writer: CheckpointWriter, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    live = snapshot(1)
    writer.save(live)
    assert slow_disk.begun.wait(30)
    live.model["w"].fill_(-1)  # the next update
    assert writer.busy
    slow_disk.go_on.set()
    assert writer.finish(snapshot(2))
    saved = checkpoint.read(tmp_path / snapshot(1).name)
    assert saved.model["w"].eq(1).all()


def test_a_disk_that_does_not_answer_is_told_of_once_and_when_it_does_again(
    writer: CheckpointWriter,
    notes: list[str],
    slow_disk: SlowDisk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_writer, "LATE", 0.05)
    writer.save(snapshot(1))
    assert writer.facts()["checkpoint_error"] is None
    time.sleep(0.1)
    for update in (2, 3):
        writer.save(snapshot(update))
    assert "the disk does not answer" in writer.facts()["checkpoint_error"]
    assert len(notes) == 1
    slow_disk.go_on.set()
    assert writer.finish(snapshot(4))
    assert writer.facts()["checkpoint_error"] is None
    assert notes[1:] == ["checkpoints are written again"]


def test_what_cannot_be_saved_at_the_end_is_not_said_to_be_tried_again(
    tmp_path: Path, notes: list[str]
) -> None:
    with CheckpointWriter(tmp_path, keep=2, interval=0.001, note=notes.append) as writer:
        writer.save(snapshot(1))
        writer.finish(snapshot(2))
        shutil.rmtree(tmp_path)
        tmp_path.write_bytes(b"")
        assert not writer.finish(snapshot(3))
    (note,) = notes
    assert note.startswith("checkpoint not written")
    assert "training goes on" not in note


def test_who_was_overtaken_says_so_at_once(tmp_path: Path, notes: list[str]) -> None:
    with CheckpointWriter(tmp_path, keep=2, interval=3600, note=notes.append) as writer:
        checkpoint.write(tmp_path, snapshot(5, life=2))
        writer.save(snapshot(1))
        writer._wait(30)
        assert writer.overtaken[0] == 1
        assert not writer.finish(snapshot(3))
        assert writer.finish(snapshot(6, life=2)), "it has joined those who live"
        assert writer.error is None


def test_nothing_lands_in_a_run_that_has_begun_in_the_folders_place(
    tmp_path: Path, notes: list[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with CheckpointWriter(folder, keep=2, interval=0, note=notes.append) as writer:
        assert writer.finish(snapshot(1))
        folder.rename(tmp_path / "old")
        folder.mkdir()
        assert not writer.finish(snapshot(5000))
    assert updates(folder) == []
    assert updates(tmp_path / "old") == [1]
    assert "another run has begun in its place" in notes[0]


def test_what_comes_while_one_is_in_flight_is_skipped(
    writer: CheckpointWriter, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    for update in (1, 2, 3):
        writer.save(snapshot(update))
    slow_disk.go_on.set()
    assert writer.finish(snapshot(4))
    assert updates(tmp_path) == [1, 4]


def test_the_last_checkpoint_has_a_deadline(
    writer: CheckpointWriter, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    writer.save(snapshot(1))
    assert not writer.finish(snapshot(2), patience=0.01)
    slow_disk.go_on.set()
    assert writer.finish(snapshot(2))
    assert updates(tmp_path) == [1, 2]


def test_a_last_checkpoint_that_hangs_does_not_count_as_saved(
    writer: CheckpointWriter, slow_disk: SlowDisk
) -> None:
    slow_disk.go_on.set()
    assert writer.finish(snapshot(1))
    slow_disk.go_on.clear()
    assert not writer.finish(snapshot(2), patience=0.01)
    assert writer.facts()["checkpoint_update"] == 1


def test_it_is_due_after_the_interval(tmp_path: Path, notes: list[str]) -> None:
    with CheckpointWriter(tmp_path, keep=2, interval=3600, note=notes.append) as writer:
        assert writer.due(), "the one before it may have been lost just before it was due"
        writer.save(snapshot(1))
        assert not writer.due()
    with CheckpointWriter(tmp_path, keep=2, interval=0, note=notes.append) as writer:
        writer.save(snapshot(2))
        writer._blocked = 0.0
        assert writer.due()


def test_copies_that_take_long_make_checkpoints_rarer(tmp_path: Path, notes: list[str]) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, interval=0, note=notes.append)
    writer.save(snapshot(1))
    writer._blocked = 3600.0  # an hour's copy: at most one percent of the time
    assert not writer.due()


def test_old_ones_go_and_the_best_stays(writer: CheckpointWriter, tmp_path: Path) -> None:
    for update in range(1, 7):
        writer.save(snapshot(update), candidate=update == 2)
        writer._wait(30)
    assert updates(tmp_path) == [2, 5, 6]


def test_a_writer_of_an_earlier_life_stops(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str]
) -> None:
    life = checkpoint.next_life(tmp_path)
    checkpoint.next_life(tmp_path)
    assert writer.overtaken == lives.NOBODY
    writer.save(snapshot(1, life))
    writer._wait(30)
    refused, why = writer.overtaken
    assert refused == life
    assert "taken this run over" in why
    assert not writer.finish(snapshot(3, life))
    assert len(notes) == 1
    assert "training goes on" not in notes[0]


def taken(writer: CheckpointWriter) -> int:
    """The next life, once it is taken."""
    deadline = time.monotonic() + 60
    while (life := writer.take_life()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return life


def test_a_life_is_taken_without_holding_up_the_training(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    assert checkpoint.next_life(tmp_path) == 1
    (tmp_path / ".partial-another").mkdir()
    let_go, take = threading.Event(), lives.take

    def hang(folder: Path) -> int:
        assert let_go.wait(60)
        return take(folder)

    monkeypatch.setattr(lives, "take", hang)
    assert writer.take_life() is None
    assert writer.take_life() is None
    writer.save(snapshot(1, life=1))  # it may be refused a moment later
    assert not writer.busy
    let_go.set()
    assert taken(writer) == 2
    assert (tmp_path / ".partial-another").exists(), "others may be writing it"
    assert writer.finish(snapshot(1, life=1)), "its own life refuses nothing"
    assert checkpoint.newest(tmp_path) == tmp_path / snapshot(1, life=2).name
    assert not notes
    assert writer.overtaken == lives.NOBODY


def test_the_last_save_waits_for_the_life_that_is_being_taken(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint.next_life(tmp_path) == 1
    take = lives.take

    def slow(folder: Path) -> int:
        time.sleep(0.5)
        return take(folder)

    monkeypatch.setattr(lives, "take", slow)
    assert writer.take_life() is None
    assert writer.finish(snapshot(1, life=1))
    assert checkpoint.newest(tmp_path) == tmp_path / snapshot(1, life=2).name


def test_a_save_that_was_in_flight_while_a_life_was_taken_is_no_loss(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    assert checkpoint.next_life(tmp_path) == 1
    monkeypatch.setattr(checkpoint_writer, "LAST_SAVE", 0.1)
    slow = SlowDisk(monkeypatch)
    writer.save(snapshot(1, life=1))
    assert slow.begun.wait(30)
    assert taken(writer) == 2
    slow.go_on.set()
    writer._wait(30)
    assert writer.overtaken == lives.NOBODY
    assert not notes
    assert writer.finish(snapshot(2, life=1))
    assert checkpoint.newest(tmp_path) == tmp_path / snapshot(2, life=2).name


def test_a_life_that_cannot_be_taken_is_tried_again(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> int:
        raise TryAgain("full")

    with monkeypatch.context() as patched:
        patched.setattr(lives, "take", full)
        with pytest.raises(TryAgain, match="full"):
            taken(writer)
    assert taken(writer) == 1


@pytest.mark.parametrize(
    ("moment", "candidate"), [("written", True), ("written", False), ("compared", True)]
)
def test_who_was_frozen_in_a_save_while_a_later_life_began_marks_and_deletes_nothing(
    tmp_path: Path,
    notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    candidate: bool,
) -> None:
    mine = checkpoint.next_life(tmp_path)
    before = checkpoint.write(tmp_path, snapshot(1, mine))
    checkpoint.mark_best(tmp_path, before)
    to_come = [moment]

    def freeze(now: str) -> None:
        """At the moment; meanwhile another life begins."""
        if now in to_come:
            to_come.remove(now)
            life = checkpoint.next_life(tmp_path)
            for update in (2, 3):
                checkpoint.write(tmp_path, snapshot(update, life))
            checkpoint.mark_best(tmp_path, tmp_path / snapshot(2, life).name)

    def flushed(folder: Path) -> None:
        flush_folder(folder)
        if folder == tmp_path:
            freeze("written")

    def compared(now: dict[str, Any], before: dict[str, Any]) -> bool:
        freeze("compared")
        return True

    monkeypatch.setattr(checkpoint, "flush_folder", flushed)
    with CheckpointWriter(
        tmp_path, keep=1, interval=0, note=notes.append, better=compared
    ) as writer:
        writer.save(snapshot(2, mine), candidate=candidate)
        writer._wait(30)
        assert writer.overtaken[0] == mine
    assert checkpoint.best(tmp_path) == tmp_path / snapshot(2, life=2).name
    assert checkpoint.newest(tmp_path) == tmp_path / snapshot(3, life=2).name
    assert updates(tmp_path) == [1, 2, 2, 3]
    assert "taken this run over" in notes[0]


def test_a_state_that_is_not_finite_is_told_and_pushes_nothing_out(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str]
) -> None:
    assert writer.finish(snapshot(1))
    bad = snapshot(2)
    bad.model["w"][0] = torch.nan
    assert not writer.finish(bad)
    assert updates(tmp_path) == [1]
    assert "not finite" in (writer.error or "")


def test_an_error_that_nobody_thought_of_is_told(
    writer: CheckpointWriter, notes: list[str]
) -> None:
    bad = snapshot(1)
    bad.state["update"] = object()
    assert not writer.finish(bad)
    assert "not JSON serializable" in (writer.error or "")
    assert writer.finish(snapshot(2))
    assert writer.error is None


def test_a_folder_that_is_gone_and_comes_back(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str]
) -> None:
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    for update in (1, 2, 3):
        assert not writer.finish(snapshot(update))
    assert "No such file" in (writer.error or "")
    away.rename(tmp_path)
    assert writer.finish(snapshot(4))
    assert writer.facts()["checkpoint_error"] is None
    assert [note.split(" (")[0] for note in notes] == [
        "checkpoint not written",
        "checkpoints are written again",
    ]


def mount(path: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a disk of 1 MiB")
    mount(path, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_stops_nothing_and_loses_nothing(small_disk: Path, notes: list[str]) -> None:
    with CheckpointWriter(small_disk, keep=2, interval=0, note=notes.append) as writer:
        assert writer.finish(snapshot(1, floats=50_000))
        (small_disk / "filler").write_bytes(bytes(750_000))
        for update in (2, 3):
            assert not writer.finish(snapshot(update, floats=50_000))
        assert "No space left" in (writer.error or "")
        assert updates(small_disk) == [1]
        assert list(small_disk.glob(".partial-*")) == []
        (small_disk / "filler").unlink()
        assert writer.finish(snapshot(4, floats=50_000))
    found = checkpoint.newest(small_disk)
    assert found is not None
    assert checkpoint.read(found).update == 4
    assert len(notes) == 2


def test_the_last_checkpoint_has_room_on_a_full_disk(small_disk: Path, notes: list[str]) -> None:
    with CheckpointWriter(small_disk, keep=3, interval=0, note=notes.append) as writer:
        writer.save(snapshot(1, floats=25_000))
        writer._wait(60)
        fill(small_disk)
        writer.save(snapshot(2, floats=25_000))
        writer._wait(60)
        assert "No space left" in (writer.error or ""), "while it trains the reserve is kept"
        assert updates(small_disk) == [1]
        assert writer.finish(snapshot(3, floats=25_000))
    assert updates(small_disk) == [1, 3]
    assert not (small_disk / ".reserve").exists(), "nobody needs it any more"


def test_a_disk_without_room_for_a_reserve_is_no_error(small_disk: Path, notes: list[str]) -> None:
    with CheckpointWriter(small_disk, keep=3, interval=0, note=notes.append) as writer:
        writer.save(snapshot(1, floats=100_000))  # its double does not fit beside it
        writer._wait(60)
    assert writer.error is None
    assert not (small_disk / ".reserve").exists()


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_turns_read_only_stops_nothing(small_disk: Path, notes: list[str]) -> None:
    with CheckpointWriter(small_disk, keep=2, interval=0, note=notes.append) as writer:
        assert writer.finish(snapshot(1))
        mount(small_disk, "-o", "remount,ro")
        assert not writer.finish(snapshot(2))
        assert "Read-only" in (writer.error or "")
        found = checkpoint.newest(small_disk)
        assert found is not None
        assert checkpoint.read(found).update == 1
        mount(small_disk, "-o", "remount,rw")
        assert writer.finish(snapshot(3))


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from demoreset_trainer import checkpoint
from demoreset_trainer.checkpoint_writer import CheckpointWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])

def snapshot(update, floats):
    model = {"w": torch.full((floats,), float(update))}
    return checkpoint.Snapshot(1, update, 0, 1, model, {}, {})

with CheckpointWriter(folder, keep=2, interval=0, note=print) as writer:
    assert writer.finish(snapshot(1, 1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert not writer.finish(snapshot(2, 100_000))
    assert "File too large" in writer.error, writer.error
    assert writer.finish(snapshot(3, 1000))
print(checkpoint.newest(folder).name, len(list(folder.iterdir())))
"""


def test_a_quota_stops_nothing(tmp_path: Path) -> None:  # needs no root
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ckpt-l000001-u0000000003 2"


def test_its_facts_are_fields_of_progress(writer: CheckpointWriter) -> None:
    known = {name for name in Progress.__dataclass_fields__ if name.startswith("checkpoint_")}
    assert writer.facts().keys() == known
    assert set(writer.facts().values()) == {None}
    assert writer.finish(snapshot(1))
    facts = writer.facts()
    assert facts["checkpoint_update"] == 1
    assert facts["checkpoint_age_seconds"] >= 0
    assert facts["checkpoint_seconds"] > 0


def test_after_a_resume_it_tells_of_what_was_read_until_it_has_saved(
    writer: CheckpointWriter, tmp_path: Path, notes: list[str]
) -> None:
    assert writer.finish(snapshot(1))
    again = CheckpointWriter(tmp_path, keep=2, interval=0, note=notes.append)
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / snapshot(1).name, (an_hour_ago, an_hour_ago))
    again.resume(snapshot(1))
    told, before = again.facts(), writer.facts()
    assert told["checkpoint_update"] == 1
    assert told["checkpoint_bytes"] == before["checkpoint_bytes"]
    assert told["checkpoint_age_seconds"] == pytest.approx(3600, abs=60)
    assert again.finish(snapshot(2))
    assert again.facts()["checkpoint_update"] == 2
    again.resume(snapshot(9))  # it is gone by now, or the disk is away
    assert again.facts()["checkpoint_update"] == 2


def test_the_best_is_the_best_of_those_that_were_saved(tmp_path: Path, notes: list[str]) -> None:
    def better(now: dict[str, Any], kept: dict[str, Any]) -> bool:
        return bool(now["update"] >= kept["update"])

    with CheckpointWriter(tmp_path, keep=9, interval=0, note=notes.append, better=better) as writer:
        for update, best in ((5, 5), (3, 5), (6, 6)):
            assert writer.finish(snapshot(update), candidate=True)
            assert checkpoint.best_state(tmp_path) == {"update": best}
        (tmp_path / snapshot(6).name / checkpoint.STATE).write_text("torn")
        assert writer.finish(snapshot(4), candidate=True)
        assert checkpoint.best_state(tmp_path) == {"update": 4}, "one that is torn is no best"
    assert notes == []
