"""A run's folder belongs to one command at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demoreset_api.errors import UserError
from demoreset_trainer.claim import claimed


def test_a_folder_is_held_until_its_owner_is_done(tmp_path: Path) -> None:
    taken = pytest.raises(UserError, match=f"process {os.getpid()} trains there")
    with claimed(tmp_path), taken, claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_who_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from demoreset_trainer.claim import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    with claimed(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot be written: No such file.*another --dir"),
        claimed(tmp_path / "x"),
    ):
        pass
