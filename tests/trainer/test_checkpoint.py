"""Checkpoints: what is torn is found, what is whole is kept, and every bit comes back."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demoreset_api.errors import NoValidCheckpoint, TryAgain, UserError
from demoreset_trainer import checkpoint
from demoreset_trainer.checkpoint import BEST, MANIFEST, MODEL, OPTIMIZER, STATE, Snapshot

FILES = [MODEL, OPTIMIZER, STATE, MANIFEST]
TORN_WRITES = Path(__file__).parents[2] / "benchmarks" / "torn_writes.py"


def snapshot(update: int, life: int = 1) -> Snapshot:
    return Snapshot(
        life=life,
        update=update,
        frames=update * 1000,
        members=2,
        model={"weight": torch.full((4, 8), float(update)), "bias": torch.zeros(8)},
        optimizer={"0.exp_avg": torch.full((4, 8), update + 0.5), "0.step": torch.tensor(3.0)},
        state={"curriculum": {"frontier": 7 * update}, "random": [2**100 + update]},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


TEARS: list[Callable[[Path], None]] = [
    truncate,
    empty,
    zero,
    lengthen,
    Path.unlink,
    put_a_folder_there,
]


def test_every_bit_comes_back(tmp_path: Path) -> None:
    tensors = {
        "float32": torch.randn(5, 7),
        "bfloat16": torch.randn(33).to(torch.bfloat16),
        "float16": torch.randn(3).half(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1e-42),  # denormal
        "nothing": torch.zeros(0, 3),
    }
    state = {"random": [2**127, -1], "rate": 0.1, "name": "é\n", "none": None}
    path = checkpoint.write(tmp_path, replace(snapshot(3), model=tensors, state=state))
    read = checkpoint.read(path)
    assert (read.life, read.update, read.frames, read.members) == (1, 3, 3000, 2)
    assert read.state == state
    assert read.model.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read.model[name].dtype == tensor.dtype
        assert read.model[name].shape == tensor.shape
        bits, expected = read.model[name].view(-1), tensor.view(-1)
        assert bits.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist(), name


def test_an_optimizer_that_has_done_nothing_has_no_moments(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, replace(snapshot(0), optimizer={}))
    assert checkpoint.read(path).optimizer == {}


def test_a_copy_stays_as_it_was_when_training_goes_on() -> None:
    live = snapshot(1)
    copy = live.copy()
    live.model["weight"].add_(1)
    live.state["curriculum"]["frontier"] = -1
    assert copy.model["weight"].eq(1).all()
    assert copy.state["curriculum"]["frontier"] == 7


def test_tensors_of_any_layout_can_be_saved_from_a_copy(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 4)
    model = {
        "channels last": image.to(memory_format=torch.channels_last),
        "transposed": image[0, 0].T,
        "tied": image,
        "part": image[:, 1],
    }
    read = checkpoint.read(checkpoint.write(tmp_path, replace(snapshot(1), model=model).copy()))
    for name, tensor in model.items():
        assert torch.equal(read.model[name], tensor), name


def test_the_folder_holds_four_files_and_nothing_hidden(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(12, life=3))
    assert names(tmp_path) == ["ckpt-l000003-u0000000012"]
    assert names(path) == sorted(FILES)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["schema"] == checkpoint.SCHEMA
    assert manifest["files"][MODEL]["bytes"] == (path / MODEL).stat().st_size


def test_others_may_read_a_checkpoint_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    path = checkpoint.write(tmp_path, snapshot(1))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_writing_the_same_update_again_changes_nothing(tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path, snapshot(1))
    before = (first / MODEL).stat().st_ino
    assert checkpoint.write(tmp_path, snapshot(1)) == first
    assert (first / MODEL).stat().st_ino == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path, value: float, part: str) -> None:
    bad = snapshot(1)
    getattr(bad, part)["0.bad"] = torch.tensor([1.0, value])
    with pytest.raises(ValueError, match=r"0\.bad has values that are not finite"):
        checkpoint.write(tmp_path, bad)
    assert names(tmp_path) == []


def test_a_whole_checkpoint_of_values_that_are_not_finite_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = snapshot(2)
    bad.model["bias"][0] = torch.nan
    with monkeypatch.context() as careless:
        careless.setattr(checkpoint, "check_finite", lambda tensors: None)
        path = checkpoint.write(tmp_path, bad)
    with pytest.raises(UserError, match=r"damaged checkpoint \(bias has values that are not fin"):
        checkpoint.read(path)


@pytest.mark.parametrize("tear", TEARS, ids=lambda tear: tear.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_torn_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, file: str, tear: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpoint.write(tmp_path, snapshot(1))
    torn = checkpoint.write(tmp_path, snapshot(2))
    tear(torn / file)
    with pytest.raises(UserError, match=r"torn|missing|damaged"):
        checkpoint.read(torn)
    assert checkpoint.newest(tmp_path) == good
    assert names(tmp_path) == [f"broken-{torn.name}", good.name]
    assert torn.name in caplog.text


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_found(tmp_path: Path, file: str) -> None:
    good = checkpoint.write(tmp_path, snapshot(1))
    path = checkpoint.write(tmp_path, snapshot(2)) / file
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        for bit in (0, 3, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            try:
                found = checkpoint.find(tmp_path)
            except UserError as error:
                pytest.fail(f"byte {at}, bit {bit}: {error}")
            if found != good:  # JSON has more than one spelling of the same manifest
                assert file == MANIFEST
                assert checkpoint.read(found).frames == 2000


def test_a_manifest_with_other_counters_does_not_verify(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(1)) / MANIFEST
    path.write_text(path.read_text().replace('"frames": 1000', '"frames": 9000'))
    with pytest.raises(UserError, match="its hash is another"):
        checkpoint.read(path.parent)


@pytest.mark.parametrize(
    "content", ["[" * 50_000, "[]", "7", "null", '{"sha256": 1}', "é" * 90_000]
)
def test_a_manifest_of_rubbish_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    path = checkpoint.write(tmp_path, snapshot(1)) / MANIFEST
    path.write_text(content)
    with pytest.raises(UserError, match=MANIFEST) as caught:
        checkpoint.read(path.parent)
    assert "\n" not in str(caught.value)


def reseal(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    sealed = manifest | {"sha256": checkpoint._seal(manifest)}
    (path / MANIFEST).write_text(json.dumps(sealed))


def test_a_checkpoint_of_another_version_is_left_alone(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(1))
    later = checkpoint.write(tmp_path, snapshot(2))
    reseal(later, schema=2)
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"schema 2; this version reads 1"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match=r"schema 2; this version reads 1"):
        checkpoint.read(later)
    assert names(tmp_path) == before


def test_a_copy_under_another_name_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    good = checkpoint.write(tmp_path, snapshot(1))
    shutil.copytree(good, tmp_path / snapshot(9).name)
    assert checkpoint.newest(tmp_path) == good


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing") is None
    assert checkpoint.newest(tmp_path) is None
    checkpoint.next_life(tmp_path)  # a life that ended before its first checkpoint
    assert checkpoint.newest(tmp_path) is None


def test_a_later_life_is_newer_than_any_update_of_an_earlier_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(100, life=1))
    later = checkpoint.write(tmp_path, snapshot(5, life=2))
    assert checkpoint.newest(tmp_path) == later


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    for update in (1, 2):
        truncate(checkpoint.write(tmp_path, snapshot(update)) / MODEL)
    before = names(tmp_path)
    for _ in range(2):  # starting once more changes nothing
        with pytest.raises(NoValidCheckpoint, match="torn") as caught:
            checkpoint.newest(tmp_path)
        assert caught.value.exit_code == 65
    assert names(tmp_path) == before


def test_checkpoints_that_were_set_aside_are_still_on_record(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(1))
    path.rename(tmp_path / f"broken-{path.name}")
    with pytest.raises(NoValidCheckpoint, match="broken-"):
        checkpoint.newest(tmp_path)


def test_a_disk_that_does_not_answer_breaks_nothing(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(1))
    path = checkpoint.write(tmp_path, snapshot(2))
    (path / MODEL).unlink()
    (path / MODEL).symlink_to(path / MODEL)  # ELOOP: an error that is not "missing"
    before = names(tmp_path)
    with pytest.raises(TryAgain, match="cannot be read now"):
        checkpoint.newest(tmp_path)
    assert names(tmp_path) == before


def test_find_takes_a_checkpoint_a_folder_of_them_or_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    old, new = (checkpoint.write(folder, snapshot(update)) for update in (1, 2))
    elsewhere = shutil.copytree(old, tmp_path / "my backup")
    given = [old, new, folder, tmp_path, elsewhere]
    assert [checkpoint.find(path) for path in given] == [old, new, new, new, elsewhere]


def test_find_only_looks(tmp_path: Path) -> None:
    good = checkpoint.write(tmp_path, snapshot(1))
    truncate(checkpoint.write(tmp_path, snapshot(2)) / MODEL)
    before = names(tmp_path)
    assert checkpoint.find(tmp_path) == good
    assert names(tmp_path) == before


def test_find_says_what_to_give(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="give a run's folder"):
            checkpoint.find(path)


def test_a_writer_of_an_earlier_life_is_fenced(tmp_path: Path) -> None:
    mine = checkpoint.next_life(tmp_path)
    checkpoint.write(tmp_path, snapshot(1, mine))
    checkpoint.next_life(tmp_path)
    before = names(tmp_path)
    with pytest.raises(TryAgain, match="life 2, this is life 1") as caught:
        checkpoint.write(tmp_path, snapshot(2, mine))
    assert caught.value.exit_code == 75
    assert names(tmp_path) == before


def test_a_checkpoint_of_a_later_life_fences_without_its_marker(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(1, life=2))
    with pytest.raises(TryAgain):
        checkpoint.write(tmp_path, snapshot(5, life=1))


def test_the_next_life_clears_away_what_dead_writers_left(tmp_path: Path) -> None:
    (tmp_path / ".partial-dead").mkdir()
    (tmp_path / ".partial-dead" / MODEL).write_bytes(b"half")
    checkpoint.next_life(tmp_path)
    assert names(tmp_path) == ["life-000001"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (9, 1, [1, 2, 3, 4, 5]),
        (1, None, [5]),
        (0, None, [5]),  # never none
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    paths = {update: checkpoint.write(tmp_path, snapshot(update)) for update in range(1, 6)}
    if best is not None:
        checkpoint.mark_best(tmp_path, paths[best])
    checkpoint.prune(tmp_path, keep)
    expected = [paths[update].name for update in left] + ([BEST] if best else [])
    assert names(tmp_path) == sorted(expected)


@pytest.mark.parametrize(
    ("every", "updates", "left"),
    [
        (10, [3, 8, 12, 19, 20, 25, 31, 32], [3, 12, 20, 31, 32]),
        (1, [3, 8, 12], [3, 8, 12]),
        (1000, [3, 8, 12], [3, 12]),
    ],
)
def test_the_first_of_every_so_many_updates_is_kept(
    tmp_path: Path, every: int, updates: list[int], left: list[int]
) -> None:
    for update in updates:
        checkpoint.write(tmp_path, snapshot(update))
        checkpoint.prune(tmp_path, 1, every)
    assert names(tmp_path) == [snapshot(update).name for update in left]


def test_nothing_is_pruned_while_it_cannot_be_told_which_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {update: checkpoint.write(tmp_path, snapshot(update)) for update in (1, 2, 3)}
    checkpoint.mark_best(tmp_path, paths[1])
    before, read = names(tmp_path), Path.read_text

    def stale(path: Path, **how: Any) -> str:
        if path.name == BEST:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale"):
        checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == before


def test_one_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    partial = tmp_path / ".partial-slow"
    partial.mkdir()

    def write() -> None:
        for _ in range(10):  # longer in all than a writer that died is waited for here
            with (partial / MODEL).open("ab") as file:
                file.write(b"more")
            time.sleep(0.2)
        partial.rename(tmp_path / snapshot(1).name)
        time.sleep(0.5)  # then who was told to leave begins its last one
        partial.mkdir()
        time.sleep(0.5)
        partial.rename(tmp_path / snapshot(2).name)

    writer = threading.Thread(target=write)
    writer.start()
    checkpoint.settle(tmp_path, 60, dead=1.0)
    assert names(tmp_path) == [snapshot(1).name, snapshot(2).name]
    writer.join()


def test_one_whose_writer_died_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".partial-dead").mkdir()
    begun = time.monotonic()
    checkpoint.settle(tmp_path, 60, dead=0.2)
    assert time.monotonic() - begun < 60


def test_nothing_is_pruned_in_favour_of_a_damaged_one(tmp_path: Path) -> None:
    for update in (1, 2, 3):
        path = checkpoint.write(tmp_path, snapshot(update))
    truncate(path / OPTIMIZER)
    before = names(tmp_path)
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == before


@pytest.mark.parametrize("content", ["", "\n", "../..", "ckpt-l000001-u0000000099", "\x00\xff"])
def test_a_mark_that_names_no_checkpoint_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    checkpoint.write(tmp_path, snapshot(1))
    (tmp_path / BEST).write_text(content)
    assert checkpoint.best(tmp_path) is None
    checkpoint.prune(tmp_path, 1)


def test_pruning_removes_abandoned_halves_but_not_what_is_being_written(tmp_path: Path) -> None:
    (tmp_path / ".partial-old").mkdir()
    (tmp_path / ".partial-young").mkdir()
    path = checkpoint.write(tmp_path, snapshot(1))
    written = path.stat().st_mtime
    os.utime(tmp_path / ".partial-old", (written - 7200, written - 7200))
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == [".partial-young", path.name]


def torn_writes(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TORN_WRITES), "--dir", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_kill_9_at_any_moment_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    result = torn_writes(tmp_path, "--kills", "25")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "25 kills" in result.stdout
    assert " 0 failures" in result.stdout
