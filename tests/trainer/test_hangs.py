"""Where members stood is kept in the run's folder: the latest of them, at nobody's cost."""

from pathlib import Path

from demoreset_trainer import hangs


def test_where_a_member_stood_is_kept(tmp_path: Path) -> None:
    name = hangs.keep(tmp_path, "w-0-1", ["Thread 1:", "  File x"])
    assert (tmp_path / name).read_text() == "Thread 1:\n  File x\n"


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    (tmp_path / hangs.FOLDER).mkdir()
    for number in range(hangs.KEPT):
        (tmp_path / hangs.FOLDER / f"20200101T0000{number:02}Z-w.txt").touch()
    name = hangs.keep(tmp_path, "w-0-1", ["now"])
    left = sorted(path.name for path in (tmp_path / hangs.FOLDER).iterdir())
    assert len(left) == hangs.KEPT
    assert f"hangs/{left[-1]}" == name
    assert left[0].startswith("20200101T000001Z")


def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / hangs.FOLDER).touch()
    hangs.keep(tmp_path, "w-0-1", ["now"])
