"""Exploration: the same archive however it is spread or interrupted, and a demo at its end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from demoreset_api.errors import ExitCode
from demoreset_trainer import cli, demo, explore_file
from demoreset_trainer.emulator import Emulator
from demoreset_trainer.explore import FRAME_SKIP, Archive, Grid, damage, explore
from demoreset_trainer.shorten import Course

ROOT = Path(__file__).parents[2]
FINE = Grid(20, 26, 16)
CROSSING = ("freeway", "--score", "1", "--decisions", "3000", "--grid", "20x26x16")


@pytest.mark.parametrize("levels", [2, 3, 8, 100, 256])
def test_a_cell_has_as_many_levels_of_grey_as_are_wanted(levels: int) -> None:
    screen = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert set(Grid(16, 16, levels).key(screen)) == set(range(levels))


def explored(archive: Archive, decisions: int, processes: int = 1) -> Archive:
    for _ in explore(archive, decisions=decisions, processes=processes):
        pass
    return archive


def content(archive: Archive, folder: Path) -> bytes:
    path = folder / "content.archive"
    explore_file.write(archive, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of Freeway that holds a crossing."""
    path = tmp_path_factory.mktemp("explored") / "crossing.archive"
    explore_file.write(explored(Archive("freeway", 0, 1, FINE), 3000), path)
    return path


def test_the_number_of_processes_changes_nothing(crossing: Path, tmp_path: Path) -> None:
    archive = explored(Archive("freeway", 0, 1, FINE), 3000, processes=3)
    assert content(archive, tmp_path) == crossing.read_bytes()


def test_another_seed_finds_another_archive(crossing: Path) -> None:
    archive = explored(Archive("freeway", 1, 1, FINE), 1000)
    assert archive.ways != explore_file.read(crossing).ways[: len(archive.ways)]


def test_an_archive_from_a_file_goes_on_as_in_one_go(crossing: Path, tmp_path: Path) -> None:
    more = explored(explore_file.read(crossing), 5000)
    once = explored(Archive("freeway", 0, 1, FINE), 5000)
    assert more.rounds > 2
    assert content(more, tmp_path) == content(once, tmp_path)


def test_an_archive_that_found_nothing_yet_is_read_again(tmp_path: Path) -> None:
    archive = explored(Archive("freeway", 0, 99), 500)
    written = content(archive, tmp_path)
    assert content(explore_file.read(tmp_path / "content.archive"), tmp_path) == written


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.DRAINED)],
)
def test_who_is_stopped_keeps_what_was_found_so_far(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "key.demo.safetensors"
    command = [sys.executable, "-m", "demoreset_trainer.cli", "demo", "explore"]
    process = subprocess.Popen(
        [*command, "montezuma_revenge", "--processes", "1", "--score", "9000", "--out", out],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert "way to 9000: not yet" in process.stderr.readline()
    os.killpg(process.pid, number)  # to all of its processes, as a terminal does it
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.splitlines()[-1] == f"stopped; the same command goes on with {out}.archive"
    kept = explore_file.read(tmp_path / f"{out.name}.archive")
    assert kept.decisions > 0
    assert not out.exists()
    once = explored(Archive("montezuma_revenge", 0, 9000), kept.decisions)
    assert content(once, tmp_path) == content(kept, tmp_path)


def test_the_command_finds_a_crossing_and_writes_its_demo(
    crossing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "crossing.demo.safetensors"
    arguments = ["demo", "explore", *CROSSING, "--out", str(out)]
    place = tmp_path / "kept.archive"
    place.write_bytes(crossing.read_bytes())
    assert cli.main([*arguments, "--archive", str(place)]) == ExitCode.DONE
    found = demo.load(out)
    assert demo.verify(found) is None
    assert found.scores[-1] == 1
    assert found.lives.min() == found.lives.max()
    assert len(found) <= 192  # 48 decisions lay in the archive
    assert len(found) - np.flatnonzero(found.rewards)[-1] <= found.frame_skip
    command = ["demoreset demo explore", *CROSSING[:5], "--seed 0", *CROSSING[5:]]
    assert found.origin["command"] == " ".join(command)
    assert cli.main(arguments) == ExitCode.USER_ERROR
    assert "is there already; --force overwrites it" in capsys.readouterr().err


@pytest.mark.parametrize("game", ["demon_attack", "turmoil"])
def test_a_way_that_loses_a_life_is_none(game: str) -> None:
    """At power-on these tell fewer lives than their first frame gives."""
    emulator = Emulator(game)
    random, codes = np.random.default_rng(0), emulator.minimal_actions
    emulator.reset()
    emulator.act(0)
    lives, score, way = emulator.lives(), 0, []
    emulator.reset()
    while True:
        way.append(int(random.integers(len(codes))))
        gain = sum(emulator.act(codes[way[-1]]) for _ in range(FRAME_SKIP))
        score += gain
        if gain > 0 and emulator.lives() < lives:
            break
        assert not emulator.game_over()
    assert Course(game, score).walk(way) is None


def test_a_score_out_of_reach_says_what_was_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "far.demo.safetensors"
    arguments = ["freeway", "--score", "99", "--decisions", "500", "--out", str(out)]
    assert cli.main(["demo", "explore", *arguments]) == ExitCode.BUDGET_SPENT
    assert "no score of 99 within" in capsys.readouterr().err
    assert not out.exists()


def test_below_zero_is_explored_too() -> None:
    archive = explored(Archive("freeway", 0, 1), 1)
    known = len(archive.cells)
    for cell in archive.cells.values():
        cell.score = -5
    explored(archive, archive.decisions + 1)
    assert {cell.score for cell in archive.cells.values()} == {-5}
    assert len(archive.cells) > known


def test_a_cell_reached_with_more_score_is_explored_as_if_new() -> None:
    archive = explored(Archive("montezuma_revenge", 0, 2500), 2000)
    start, *others = archive.cells.values()
    start.chosen = 0
    for cell in others:
        cell.score, cell.chosen = -100, 50
    before = dict(archive.cells)
    explored(archive, archive.decisions + 1)
    better = [cell for key, cell in archive.cells.items() if key in before and cell.score == 0]
    assert len(better) > 1
    assert all(cell is start or cell.chosen == 0 for cell in better)


# Files that are no archives, or not ours.


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged"),
        (lambda _: b"", "damaged"),
        (lambda _: b"\x80\x04.", "not an archive"),
        (lambda _: (10**15).to_bytes(8, "little") + b"{}", "not an archive"),
        (lambda whole: whole.replace(b"demoreset-archive/1", b"demoreset-archive/9"), "archive/9"),
        (lambda whole: whole.replace(b"freeway", b"tennis1"), "made with GAME tennis1"),
    ],
)
def test_a_damaged_archive_is_one_line(
    crossing: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[bytes], bytes],
    says: str,
) -> None:
    place = tmp_path / "harmed.archive"
    place.write_bytes(harm(crossing.read_bytes()))
    out = tmp_path / "out.demo.safetensors"
    arguments = ["demo", "explore", *CROSSING, "--out", str(out), "--archive", str(place)]
    assert cli.main(arguments) == ExitCode.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert str(place) in line
    assert says in line
    assert not out.exists()


def loop(archive: Archive) -> None:
    archive.ways[3] = (7, archive.ways[3][1])


def unknown_action(archive: Archive) -> None:
    archive.candidates[0] = b"\xc8" * 40


def foreign_state(archive: Archive) -> None:
    next(iter(archive.cells.values())).state = b"\xff" * 7717


def chosen_less_than_never(archive: Archive) -> None:
    next(iter(archive.cells.values())).chosen = -1


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (loop, "way 3 begins at way 7"),
        (unknown_action, "action 200; the game has 3"),
        (foreign_state, "a state that is not the emulator's"),
        (chosen_less_than_never, "chosen -1 times"),
    ],
)
def test_an_impossible_archive_is_refused(
    crossing: Path, tmp_path: Path, harm: Callable[[Archive], None], says: str
) -> None:
    archive = explore_file.read(crossing)
    assert damage(archive) is None
    harm(archive)
    assert says in str(damage(archive))


def test_an_archive_whose_ways_lead_elsewhere_makes_no_demo(
    crossing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = explore_file.read(crossing)
    archive.candidates = [bytes(len(way)) for way in archive.candidates]  # stand still
    place, out = tmp_path / "still.archive", tmp_path / "still.demo.safetensors"
    explore_file.write(archive, place)
    arguments = ["demo", "explore", *CROSSING, "--out", str(out), "--archive", str(place)]
    assert cli.main(arguments) == ExitCode.USER_ERROR
    assert "none of its ways reaches the score" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_game"], "has no game 'no_such_game'"),
        (["combat"], "'combat' is a game for two players"),
        (["freeway", "--score", "0"], "--score: received 0"),
        (["freeway", "--seed", "-1"], "--seed: received -1"),
        (["freeway", "--decisions", "0"], "--decisions: received 0"),
        (["freeway", "--processes", "0"], "--processes: received 0"),
        (["freeway", "--grid", "11x8"], "--grid: received '11x8'"),
        (["freeway", "--grid", "11x8x1"], "--grid: received '11x8x1'"),
        (["freeway", "--archive", "no/such/folder/a"], "there is no folder"),
        (["freeway", "--archive", "/proc/x"], "/proc/x: cannot be written: "),
    ],
)
def test_a_wrong_flag_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    out = tmp_path / "out.demo.safetensors"
    with pytest.raises(SystemExit, match="64"):
        sys.exit(cli.main(["demo", "explore", *arguments, "--out", str(out)]))
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# What it made, and is bundled.


@pytest.mark.parametrize("name", demo.bundled())
def test_a_bundled_demo_is_exact_safe_and_ends_with_its_last_reward(name: str) -> None:
    bundled = demo.load(demo.find(name))
    assert demo.verify(bundled) is None
    assert bundled.lives.min() == bundled.lives.max()
    assert len(bundled) - np.flatnonzero(bundled.rewards)[-1] <= bundled.frame_skip


@pytest.mark.parametrize("name", demo.bundled())
def test_the_table_of_bundled_demos_is_current(name: str) -> None:
    bundled = demo.load(demo.find(name))
    (row,) = [
        line
        for line in (ROOT / "demos" / "README.md").read_text().splitlines()
        if line.startswith(f"| `{name}` |")
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == [bundled.game, f"{len(bundled):,}", f"{bundled.scores[-1]:,}"]
    assert cells[4].startswith(f"`{bundled.origin['command']}")
