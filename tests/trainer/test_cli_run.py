"""The real command, to the real end: train, stop, go on, evaluate, film, export, refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from demoreset_trainer import checkpoint, cli, coordinator
from demoreset_trainer.checkpoint_writer import CheckpointWriter
from demoreset_trainer.loop import Loop, Stopped

ROOT = Path(__file__).parents[2]
CROSSING = ROOT / "demos" / "freeway-crossing.yaml"


def demoreset(*arguments: str | Path, expect: int = 0) -> str:
    """Run the command; what it printed, both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "demoreset_trainer.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == expect, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned the crossing, to its end, once interrupted on the way."""
    folder = tmp_path_factory.mktemp("runs") / "crossing"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stop_after_an_update(folder, number, code)
    out = demoreset("run", "-f", CROSSING, "--dir", folder)
    assert "going on from" in out
    assert "Goal met" in out
    return folder


def stop_after_an_update(folder: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "demoreset_trainer.cli", "run", "-f", str(CROSSING)]
    process = subprocess.Popen(
        [*command, "--dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    before = lines(folder)
    deadline = time.monotonic() + 120
    while lines(folder) <= before + 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal, timeout or Slurm does it: to all of them
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    said = out.splitlines()
    (heard,) = [at for at, line in enumerate(said) if line.startswith(f"{name}: this update is")]
    assert heard < next(at for at, line in enumerate(said) if "saved. Go on" in line)
    assert f"--dir {folder}" in out  # it says how to go on
    assert "Traceback" not in out
    assert not children(process.pid)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def test_it_learns_to_cross_from_the_games_own_start(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["goalMet"]
    assert summary["startFrame"] == 0
    assert summary["successRate"] >= 0.9
    assert summary["seed"] == 0


def test_its_updates_are_all_in_the_metrics_once_over_three_lives(trained: Path) -> None:
    told = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(line["checkpoint_update"] for line in told if line["life"] > 1)  # that was read
    updates = [line["update"] for line in told]
    assert updates == list(range(1, len(updates) + 1))
    newest = checkpoint.newest(trained / "checkpoints")
    assert newest is not None
    snapshot = checkpoint.read(newest)
    assert snapshot.update == updates[-1]
    assert snapshot.life == 3


def test_a_run_that_is_done_says_so_and_does_not_train_again(trained: Path) -> None:
    before = lines(trained)
    for members in ("1", "2"):
        again = ("run", "-f", CROSSING, "--dir", trained, "--members", members)
        assert "met already" in demoreset(*again)
        other = demoreset(*again, "--set", "spec.seed=1", expect=64)
        assert "its checkpoints have spec.seed = 0, the run file 1" in other
    assert lines(trained) == before


def test_it_plays_well_without_the_demo(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    text = demoreset(
        *("evaluate", trained, "--noise", "none,sticky", "--act", "sampled,argmax"),
        *("--episodes", "20", "--max-frames", "400", "--profile", "10", "--out", out),
    )
    assert re.search(r"none +. sampled", text)
    result = json.loads(out.read_text())
    cells = {(cell["noise"], cell["act"]): cell for cell in result["cells"]}
    assert cells["none", "sampled"]["ties"] >= 0.8
    assert cells["none", "argmax"]["episodes"] == 1  # all would be the same
    assert cells["sticky", "sampled"]["episodes"] == 20
    assert result["profile"]["0"] >= 0.8
    assert len(result["profile"]) == 5
    assert result["profileEpisodes"] == 20


def test_its_film_shows_the_crossing(trained: Path, tmp_path: Path) -> None:
    import av

    out = tmp_path / "film.mp4"
    assert "ties the demo's 1" in demoreset("video", trained, "--act", "argmax", "--out", out)
    with av.open(str(out)) as film:
        pictures = sum(1 for _ in film.decode(video=0))
    assert 40 < pictures < 200  # at 15 a second
    said = demoreset("video", trained, "--frames", "40", "--out", out, "--force")
    assert "score 0; it does not tie the demo's 1, and ends at --frames)" in said


def test_an_exported_policy_plays_as_the_checkpoint_does(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.policy.safetensors"
    demoreset("export", trained, "--out", file)
    card = json.loads((tmp_path / "x.policy.json").read_text())
    assert card["game"] == "freeway"
    assert card["demo"]["score"] == 1
    results = []
    for policy in (trained, file):
        out = tmp_path / "evaluation.json"
        demoreset(
            *("evaluate", policy, "--noise", "sticky", "--act", "sampled", "--episodes", "8"),
            *("--max-frames", "300", "--out", out),
        )
        results.append(json.loads(out.read_text())["cells"])
    assert results[0] == results[1]
    assert "overwrites" in demoreset("export", trained, "--out", file, expect=64)


def test_the_graph_of_a_run_is_a_picture(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.png"
    demoreset("plot", trained, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_spent_budget_ends_with_its_own_code_and_says_how_far_it_came(tmp_path: Path) -> None:
    out = demoreset(
        *("run", "-f", CROSSING, "--dir", tmp_path / "x", "--set", "spec.budget.frames=1"),
        *("--set", "spec.environment.slots=8"),
        expect=2,
    )
    assert "the start stands at frame" in out
    assert "spec.budget.frames=" in out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["budgetSpent"]
    assert not summary["goalMet"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_run_whose_words_nobody_can_take_goes_on(tmp_path: Path, gone: bool) -> None:
    """Its reader has gone, as that of `| head`; or the disk of `> run.log` is full."""
    folder = tmp_path / "x"
    command = [sys.executable, "-m", "demoreset_trainer.cli", "run", "-f", str(CROSSING)]
    small = ["--set", "spec.environment.slots=8", "--set", "spec.budget.frames=1"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as unread:
        done = subprocess.run(
            [*command, "--dir", str(folder), *small],
            stdout=unread if gone else full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert json.loads((folder / "summary.json").read_text())["budgetSpent"]
    assert checkpoint.newest(folder / "checkpoints") is not None


SHORT = ("--set", "spec.environment.slots=4", "--set", "spec.environment.processes=1")


def test_a_second_ctrl_c_saves_nothing_that_may_be_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(loop: Loop, _: Any) -> None:
        loop.state.counters.update = 5  # and whatever comes with it is not there yet
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "run", interrupted)
    assert cli.main(["run", "-f", str(CROSSING), "--dir", str(tmp_path / "x"), *SHORT]) == 130
    assert checkpoint.newest(tmp_path / "x" / "checkpoints") is None
    assert "demoreset: interrupted" in capsys.readouterr().err


def test_how_it_ended_is_told_where_the_disk_does_not_answer_at_the_end(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def met(loop: Loop, _: Any) -> Stopped:
        loop.state.counters.update = 1000
        return Stopped(goal_met=True)

    folder = tmp_path / "x"
    shutil.copytree(trained, folder)
    monkeypatch.setattr(Loop, "run", met)
    monkeypatch.setattr(CheckpointWriter, "finish", lambda *_, **__: False)
    further = ["--set", "spec.goal.successRate=1"]
    assert cli.main(["run", "-f", str(CROSSING), "--dir", str(folder), *further]) == 75
    says = "how it ended could not be saved: the disk does not answer"
    assert says in capsys.readouterr().err
    told = json.loads((folder / "summary.json").read_text())
    assert (told["exitCode"], told["goalMet"]) == (75, False)
    assert says in told["error"]


def test_what_a_run_told_whose_checkpoints_are_gone_is_not_this_ones(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(trained, folder)
    assert lines(folder)
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setattr(Loop, "run", lambda *_: Stopped(budget_spent=True))
    assert cli.main(["run", "-f", str(CROSSING), "--dir", str(folder)]) == 2
    assert not lines(folder)


@pytest.fixture
def torn(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run whose checkpoints are all torn."""
    folder = tmp_path / "torn"
    shutil.copytree(trained, folder)
    for path in (folder / "checkpoints").glob("ckpt-*/model.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    return folder


def test_checkpoints_that_are_all_torn_need_a_person(torn: Path) -> None:
    out = demoreset("run", "-f", CROSSING, "--dir", torn, expect=65)
    assert "no checkpoint there verifies" in out
    again = demoreset("run", "-f", CROSSING, "--dir", torn, expect=65)  # not: begins anew
    assert "no checkpoint there verifies" in again


def test_fresh_keeps_the_old_folder(torn: Path) -> None:
    out = demoreset(
        *("run", "-f", CROSSING, "--dir", torn, "--fresh", "--set", "spec.budget.frames=1"),
        *("--set", "spec.environment.slots=8", "--log", "json"),
        expect=2,
    )
    told = [json.loads(line) for line in out.splitlines()]  # every line is JSON
    assert f"{torn}.1" in told[0]["text"]
    assert "Budget spent" in told[-1]["text"]
    assert (torn.parent / "torn.1" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "-f", "none.yaml"], "none.yaml: cannot be read"),
        (
            ["run", "-f", CROSSING, "--set", "spec.sed=1"],
            "spec.sed: unknown field; did you mean seed?",
        ),
        (
            ["run", "-f", CROSSING, "--set", "spec.demo.name=nope"],
            "spec.demo.name: no bundled demo 'nope'",
        ),
        (["run", "-f", CROSSING, "--dir", "/proc/x"], "cannot be written"),
        (["run"], "required: -f/--file"),
        (["run", "-f", CROSSING, "--dir", ""], "--dir: received nothing; it is a file or folder"),
        (["run", "-f", CROSSING, "--port", "99999"], "--port: received 99999; at most 65535"),
        (["evaluate", "nowhere"], "nowhere: not there"),
        (["evaluate", "nowhere", "--noise", "loud"], "--noise: received 'loud'; known are none"),
        (["video", "nowhere", "--sticky", "2"], "--sticky: received 2;"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_64(arguments: list[str | Path], says: str) -> None:
    out = demoreset(*arguments, expect=64)
    assert says in out
    assert len(out.strip().splitlines()) == 1


def test_commands_that_nobody_types_are_not_offered() -> None:
    out = demoreset("bogus", expect=64)
    assert "'run'" in out or "run," in out
    assert "member" not in out
    assert "--coordinator" in demoreset("member", "--help")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_words_for_a_full_disk_are_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "demoreset_trainer.cli", "demo", "info", "freeway-crossing"],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert re.fullmatch("demoreset: .*No space left on device\n", done.stderr)


def test_another_demo_in_the_same_folder_is_refused(trained: Path) -> None:
    key = ROOT / "demos" / "montezuma-first-key.yaml"
    out = demoreset("run", "-f", key, "--dir", trained, expect=64)
    assert "belongs to another demo" in out
    assert "--fresh" in out


def test_help_teaches(tmp_path: Path) -> None:
    assert "demoreset run -f demos/freeway-crossing.yaml" in demoreset("--help")
    for command in ("run", "evaluate", "video", "export", "plot", "demo"):
        assert "usage: demoreset" in demoreset(command, "--help")


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may all")
@pytest.mark.parametrize("command", ["evaluate", "video", "export"])
def test_a_place_that_nobody_may_look_into_is_one_line(tmp_path: Path, command: str) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    tmp_path.chmod(0o755)
    words = [sys.executable, "-m", "demoreset_trainer.cli", command]
    drop = ["setpriv", "--reuid=65534", "--bounding-set=-all", "--inh-caps=-all"]
    for path in (locked / "run", Path("x" * 300)):
        done = subprocess.run(
            [*(drop if os.geteuid() == 0 else []), *words, str(path)],
            capture_output=True,
            text=True,
            env=os.environ | {"DEMORESET_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 64, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert path.name in done.stderr or str(path.parent) in done.stderr


def test_a_group_without_torchft_is_told_what_to_install_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coordinator, "find_spec", lambda _: None)
    folder = tmp_path / "run"
    where = ["-f", str(CROSSING), "--dir", str(folder)]
    place = ["--coordinator", "127.0.0.1:1", "--address", "127.0.0.1"]
    for command in (["run", *where, "--members", "2"], ["worker", *where, *place]):
        assert cli.main(command) == 64
        said = capsys.readouterr().err
        assert "install demoreset[elastic]" in said
        assert "--members 1` does without it" in said
    assert not folder.exists()
