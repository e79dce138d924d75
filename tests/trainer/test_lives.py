"""Lives: each has one owner, and whoever has an earlier one sees that others train."""

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from demoreset_api.errors import TryAgain
from demoreset_trainer import lives


def test_every_life_is_one_higher_than_all_before(tmp_path: Path) -> None:
    assert [lives.take(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / lives.checkpoint_name(8, 1)).mkdir()
    assert lives.take(tmp_path) == 9
    assert [path.name for path in tmp_path.glob("life*")] == ["life-000009"]


CLAIM = """
import sys
from pathlib import Path
from demoreset_trainer import lives
print("ready", flush=True)
sys.stdin.readline()
print([lives.take(Path(sys.argv[1])) for _ in range(50)])
"""


def test_two_processes_never_get_the_same_life(tmp_path: Path) -> None:
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in claimants:  # they start together
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in claimants:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [life for process in claimants for life in json.loads(process.communicate()[0])]
    assert [process.returncode for process in claimants] == [0, 0]
    assert len(set(taken)) == 100


def test_a_process_that_pauses_while_it_takes_a_life_gets_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, others = lives.latest, list[int]()

    def look_and_pause(folder: Path) -> int:
        seen = look(folder)
        monkeypatch.setattr(lives, "latest", look)
        others.extend(lives.take(folder) for _ in range(2))
        return seen

    monkeypatch.setattr(lives, "latest", look_and_pause)
    assert lives.take(tmp_path) not in others
    assert others == [1, 2]


def test_it_is_seen_from_elsewhere_that_somebody_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "TOUCH", 0.1)
    assert lives.take(tmp_path) == 1
    asked = list[int]()

    def trained(patience: float) -> bool:
        return lives.trained_in(tmp_path, 1, patience, alive=lambda: asked.append(1))

    with lives.shown(tmp_path, lambda: 1):
        assert not trained(60), "there is no later life"
        assert lives.take(tmp_path) == 2
        assert not trained(0.5), "nobody trains in it; that somebody does in the earlier is no sign"
    assert asked, "who watches is not taken for one that hangs"
    with lives.shown(tmp_path, lambda: 0):
        assert not trained(0.5), "its members do not train yet"
    with lives.shown(tmp_path, lambda: 2):
        assert trained(60)
    time.sleep(0.2)
    assert not trained(0.5), "it has ended"


def test_a_disk_that_hangs_keeps_nobody_who_shows_that_he_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "TOUCH", 0.01)
    hung, let_go = threading.Event(), threading.Event()

    def hang(path: Path) -> None:
        hung.set()
        let_go.wait(60)

    monkeypatch.setattr("os.utime", hang)
    with lives.shown(tmp_path, lambda: 1):
        assert hung.wait(60)
        begun = time.monotonic()
    assert time.monotonic() - begun < 30
    let_go.set()


def test_a_life_that_could_not_be_taken_leaves_no_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lives.take(tmp_path) == 1

    def away(folder: Path) -> None:
        raise OSError(errno.EIO, "away")

    with monkeypatch.context() as patched:
        patched.setattr(lives, "flush_folder", away)
        with pytest.raises(TryAgain):
            lives.take(tmp_path)
    assert lives.latest(tmp_path) == 1
    assert lives.take(tmp_path) == 2
