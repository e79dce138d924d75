"""Policies as files: whole, self-describing, and nothing but numbers."""

import io
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from demoreset_api.errors import UserError
from demoreset_api.spec import RunSpec
from demoreset_trainer import (
    checkpoint,
    cli,
    disk,
    evaluate,
    evaluation_table,
    policy_file,
    run_folder,
)
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.evaluate import Cell, demo_or_blank, interval, iqm, summarise
from demoreset_trainer.play import Act, Played
from demoreset_trainer.policy import Policy, architecture

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "demos" / "montezuma-first-key.policy.safetensors"


def test_the_bundled_policy_takes_the_key_from_the_games_own_start() -> None:
    torch.set_num_threads(1)
    trained = policy_file.load("montezuma-first-key")
    env = DemoResetEnv(demo_or_blank(trained), view=trained.policy.shape.view)
    env.begin(0, limits=False)
    state = trained.policy.initial_state(1)
    while env.score < trained.demo_score and env.frame < 1000 and not env.end:
        images = torch.from_numpy(env.observation[None])
        with torch.no_grad():
            logits, _, state = trained.policy.step(images, state)
        env.play(int(logits.argmax()))
    assert env.score == 100
    assert BUNDLED.stat().st_size <= 3 << 20


def test_the_ten_lines_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "policy.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert int(capsys.readouterr().out) == 100


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    trained = policy_file.load("montezuma-first-key")
    path, beside = policy_file.save(trained, tmp_path / "x.policy.safetensors", {"cells": []})
    again = policy_file.load(str(path))
    for name, tensor in trained.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name])
    assert again.codes == trained.codes
    assert again.demo is not None
    assert json.loads(beside.read_text())["results"] == {"cells": []}
    assert {file.name for file in tmp_path.iterdir()} == {path.name, beside.name}


def test_a_policy_that_cannot_be_written_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = policy_file.load("montezuma-first-key")
    with pytest.raises(UserError, match=r"^/proc/x.policy.safetensors: cannot be written: "):
        policy_file.save(trained, Path("/proc/x.policy.safetensors"))
    monkeypatch.setattr(disk, "uuid4", lambda: SimpleNamespace(hex="1"))
    (tmp_path / ".x.policy.json.1.partial").mkdir()  # the card is the second of both
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        policy_file.save(trained, tmp_path / "x.policy.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [".x.policy.json.1.partial"]


def card() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        BUNDLED.with_name("montezuma-first-key.policy.json").read_text()
    )
    return content


STRIDE_0 = {"convolutions": [[16, 6, 0], [32, 3, 2], [32, 3, 1]]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "x"}, "this version reads"),
        ({"rom": "0" * 32}, "another ROM"),
        ({"game": "pinball"}, "no game 'pinball'"),
        ({"actions": [0, 1]}, "not a policy"),
        ({"view": {"height": 9}}, "not a policy"),
        ({"architecture": {}}, "not a policy"),
        ({"spec": {}}, "not a policy"),
        ({"rom": ...}, "not a policy"),
        ({"name": ...}, "not a policy"),
        ({"frameSkip": "x"}, "not a policy"),
        ({"demo": {"sha256": "x"}}, "not a policy"),
        ({"name": "/tmp/elsewhere"}, "its name '/tmp/elsewhere' is not that of a file"),
        ({"name": ".."}, "not that of a file"),
        ({"name": "a\x1b[2J"}, "not that of a file"),
        ({"actions": [*card()["actions"][::-1]]}, "its actions are the joystick codes"),
        ({"architecture": card()["architecture"] | STRIDE_0}, "not a policy"),
    ],
)
def test_a_card_that_does_not_fit_is_one_line(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = tmp_path / "x.policy.safetensors"
    changed = {name: value for name, value in (card() | changes).items() if value is not ...}
    save_file(load_file(BUNDLED), path, metadata={"card": json.dumps(changed)})
    with pytest.raises(UserError, match=says) as error:
        policy_file.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04" * 100, b"\xff" * 64])
def test_what_is_no_policy_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.policy.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a policy that `demoreset export` wrote"):
        policy_file.load(str(path))


def test_a_policy_with_a_weight_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.policy.safetensors"
    weights = load_file(BUNDLED)
    weights["actor.bias"][0] = torch.nan
    save_file(weights, path, metadata={"card": json.dumps(card())})
    with pytest.raises(UserError, match=r"damaged \(actor.bias has values that are not finite\)$"):
        policy_file.load(str(path))


def test_a_torn_policy_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.policy.safetensors"
    path.write_bytes(BUNDLED.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged"):
        policy_file.load(str(path))


SCORES = (0, 0, 100, 100, 100, 100, 100, 400)


def played(score: int, highest: int | None = None) -> Played:
    return Played(score, score if highest is None else highest, frames=77, success=True, end=1)


def test_a_score_that_was_lost_again_ties_all_the_same() -> None:
    cell = summarise("none", "sampled", [played(-50, highest=2), played(-50, highest=1)], 2)
    assert (cell.ties, cell.mean, cell.max) == (0.5, -50, -50)


@pytest.mark.parametrize(
    ("width", "scores", "left_out"),
    [
        (120, (2450, 2500), []),
        (80, (2450, 2500), []),
        (80, (24_500, 25_000), []),
        (60, (0, 100), []),
        (60, (2450, 2500), ["frames", "median"]),
        (40, (2450, 2500), ["frames", "median", "IQM (95 %)"]),
    ],
)
def test_a_table_leaves_out_what_a_terminal_has_no_room_for(
    width: int, scores: tuple[int, int], left_out: list[str]
) -> None:
    results = [played(score) for score in scores for _ in range(50)]
    cells = [summarise(noise, act, results, 1) for noise in evaluate.NOISES for act in Act]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(evaluation_table.fitting(cells, console))
    text = console.export_text()
    assert "…" not in text
    assert text.count("sharpened") == 5
    assert "sticky+no-ops" in text
    (header,) = (line for line in text.splitlines() if "ties" in line)
    assert [name for name in evaluation_table.LEAST if name not in header] == left_out
    assert ", ".join(left_out) in " ".join(text.split())


def test_statistics_are_those_of_the_field() -> None:
    cell = summarise("none", "sampled", [played(score) for score in SCORES], 100)
    assert cell.ties == 0.75
    assert cell.mean == 112.5
    assert cell.median == 100
    assert cell.iqm == 100
    assert cell.max == 400


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    """Against the definition: the mean of what is left when a quarter is cut at each end."""
    for size in (1, 3, 4, 5, 8, 101):
        values = np.random.default_rng(size).normal(size=size)
        cut = int(0.25 * size)
        middle = sorted(values.tolist())[cut : size - cut]
        assert iqm(values) == pytest.approx(sum(middle) / len(middle))


def test_the_interval_narrows_with_more_episodes_and_holds_the_mean() -> None:
    random = np.random.default_rng(0)
    few, many = random.normal(10, 3, 20), random.normal(10, 3, 2000)
    for values in (few, many):
        low, high = interval(values)
        assert low <= iqm(values) <= high
    assert np.diff(interval(many))[0] < np.diff(interval(few))[0] / 3


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_network_as_onnx_says_what_ours_says(tmp_path: Path) -> None:
    reference = pytest.importorskip("onnx.reference")
    trained = policy_file.load("montezuma-first-key")
    path = tmp_path / "key.onnx"
    policy_file.export_onnx(trained, path)
    images = np.random.default_rng(0).integers(
        0, 256, (3, *trained.policy.shape.view.shape), np.uint8
    )
    state = trained.policy.initial_state(3)
    logits, values, _ = reference.ReferenceEvaluator(str(path)).run(
        None, {"images": images, "state": state.numpy()}
    )
    with torch.no_grad():
        ours = trained.policy.step(torch.from_numpy(images), state)
    np.testing.assert_allclose(logits, ours[0].numpy(), atol=1e-3)
    np.testing.assert_allclose(values, ours[1].numpy(), atol=1e-3)


def demoreset(capsys: pytest.CaptureFixture[str], *arguments: object, expect: int = 0) -> str:
    """Run the command; what it printed, both streams."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # a wrong flag
        code = int(str(ended.code))
    out, err = capsys.readouterr()
    assert code == expect, err
    return out + err


@pytest.fixture
def run(freeway: Demo, tmp_path: Path) -> Path:
    """The folder of a run without the guide: two checkpoints, of which the first is the best."""
    wanted = {"demo": {"name": "freeway-crossing"}, "curriculum": {"guide": 0}}
    spec = RunSpec.model_validate(wanted)
    state = {
        "spec": spec.model_dump(mode="json", by_alias=True),
        "demo": {"game": freeway.game, "sha256": freeway.sha256},
        "counters": {"seconds": 1.0},
        "goal": {"met": False},
    }
    weights = Policy(architecture(spec.policy), 3).state_dict()
    checkpoints = tmp_path / "crossing" / "checkpoints"
    checkpoints.mkdir(parents=True)
    freeway.save(checkpoints.parent / run_folder.DEMO)
    for update in (1, 2):
        checkpoint.write(checkpoints, Snapshot(1, update, 2048 * update, 1, weights, {}, state))
    checkpoint.mark_best(checkpoints, checkpoints / FIRST)
    return checkpoints.parent


FIRST, SECOND = "ckpt-l000001-u0000000001", "ckpt-l000001-u0000000002"
QUICK = ("--noise", "none", "--act", "argmax", "--max-frames", 40, "--processes", 1)


def test_the_best_checkpoint_has_a_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "checkpoints" / checkpoint.BEST
    for policy, update in ((run, 2), (run / "checkpoints" / SECOND, 2), (best, 1)):
        assert policy_file.load(str(policy)).card["training"]["updates"] == update
    shutil.rmtree(run / "checkpoints" / FIRST)
    assert f"{best}: the checkpoint that it names is not there" in demoreset(
        capsys, "evaluate", best, expect=64
    )


def test_a_folder_may_be_elsewhere(run: Path, tmp_path: Path) -> None:
    """A run's checkpoints on another disk, a run by another name, a link to a checkpoint."""
    (run / "checkpoints").rename(tmp_path / "large disk")
    (run / "checkpoints").symlink_to(tmp_path / "large disk")
    (tmp_path / "seed-1").symlink_to(run)
    (tmp_path / "first").symlink_to(run / "checkpoints" / FIRST)
    for policy, name in ((run, "crossing"), (tmp_path / "seed-1", "seed-1")):
        trained = policy_file.load(str(policy))
        assert (trained.name, trained.card["training"]["updates"]) == (name, 2)
    (run / "checkpoints").unlink()
    (tmp_path / "large disk").rename(run / "checkpoints")
    assert policy_file.load(str(tmp_path / "first")).folder == run.resolve()


def test_what_onnx_needs_is_asked_for_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_file, "find_spec", lambda name: None)
    out = run / "x.policy.safetensors"
    told = demoreset(capsys, "export", run, "--out", out, "--onnx", run / "x.onnx", expect=64)
    assert "--onnx needs two more packages" in told
    assert not out.exists()


def change(path: Path, make: Callable[[Snapshot], object]) -> None:
    """Make a checkpoint another one, which verifies."""
    snapshot = checkpoint.read(path)
    make(snapshot)
    shutil.rmtree(path)
    checkpoint.write(path.parent, snapshot)


def test_a_checkpoint_of_another_demo_is_one_line(run: Path) -> None:
    path = run / "checkpoints" / SECOND
    change(path, lambda it: it.state["demo"].update(game="pong", sha256="0" * 64))
    for policy in (run, path):
        with pytest.raises(
            UserError, match=rf"^{path} belongs to another demo: .* pong \(0{{12}}\), .* freeway "
        ):
            policy_file.load(str(policy))


def test_a_checkpoint_with_a_network_of_another_version_is_one_line(run: Path) -> None:
    change(run / "checkpoints" / SECOND, lambda it: it.model.pop("actor.bias"))
    with pytest.raises(
        UserError, match=rf"{SECOND}: its network is not one of this version[^\n]*$"
    ):
        policy_file.load(str(run))


def test_a_checkpoint_with_a_spec_of_another_version_is_one_line(run: Path) -> None:
    change(run / "checkpoints" / SECOND, lambda it: it.state["spec"]["ppo"].update(clop=1))
    with pytest.raises(
        UserError, match=rf"{SECOND}: its spec .*ppo.clop: .* mean clip\?.* use the"
    ):
        policy_file.load(str(run))


def test_results_say_of_what_they_are_and_are_exported_with_that_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pure reinforcement learning" in demoreset(capsys, "evaluate", run, *QUICK)
    results = json.loads((run / "evaluation.json").read_text())
    assert (results["checkpoint"], results["update"], results["guide"]) == (SECOND, 2, 0)
    assert results["maxFrames"] == 40
    out = run / "x.policy.safetensors"
    assert "without results" not in demoreset(capsys, "export", run, "--out", out)
    card = run / "x.policy.json"
    assert json.loads(card.read_text())["results"] == results
    again = run / "again.policy.safetensors"
    demoreset(capsys, "export", out, "--out", again)
    assert policy_file.load(str(again)).card["results"] == results
    out.unlink()  # the card alone is worth as much: somebody may have written into it
    told = demoreset(capsys, "export", run, "--out", out, expect=64)
    assert f"--out: {card} is there already; --force overwrites it" in told
    best = run / "checkpoints" / checkpoint.BEST
    told = demoreset(capsys, "export", best, "--out", out, "--force")
    assert f"is of {SECOND}, the policy is of {FIRST}; `demoreset evaluate {best}` first" in told
    assert json.loads(card.read_text())["results"] is None


@pytest.mark.parametrize("content", ['{"checkpoint": "ckpt', "[]", "\xff", "[" * 100_000])
def test_torn_results_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (run / "evaluation.json").write_text(content, encoding="latin-1")
    out = run / "x.policy.safetensors"
    told = demoreset(capsys, "export", run, "--out", out, expect=64)
    assert f"{run}/evaluation.json: cannot be read, or damaged" in told
    assert len(told.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("none/x.json", "--out: none/x.json: there is no folder"),
        (".", "--out: . is a folder"),
        ("/proc/x.json", "/proc/x.json: cannot be written: "),
    ],
)
def test_a_place_for_results_is_checked_before_the_play(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str, says: str
) -> None:
    monkeypatch.delattr(evaluate, "evaluate")
    assert says in demoreset(capsys, "evaluate", "montezuma-first-key", "--out", out, expect=64)


def test_a_place_that_has_room_for_a_name_alone_is_refused_before_the_play(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(evaluate, "evaluate")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        told = demoreset(
            capsys, "evaluate", "montezuma-first-key", "--out", tmp_path / "x.json", expect=64
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "x.json: cannot be written: File too large; choose another place with --out" in told
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_ctrl_c_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.json"

    def play(*_: object, **__: object) -> Iterator[Cell]:
        yield summarise("none", "sampled", [played(100)], 100)
        assert len(json.loads(out.read_text())["cells"]) == 1  # whatever ends it now
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", play)
    told = demoreset(
        capsys, "evaluate", "montezuma-first-key", "--noise", "none", "--out", out, expect=130
    )
    assert re.search("none .* 77 ", told)
    assert f"written: {out} (1 of 3 cells)" in told
    assert len(json.loads(out.read_text())["cells"]) == 1


def test_an_earlier_evaluation_gets_another_name(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "evaluation.json"
    out.with_name("evaluation.json.1").write_text("older")
    demoreset(capsys, "evaluate", run, *QUICK, "--noise", "none")
    before = out.read_text()
    demoreset(capsys, "evaluate", run, *QUICK, "--noise", "x", expect=64)
    assert out.read_text() == before, "nothing was measured"
    told = demoreset(capsys, "evaluate", run, *QUICK, "--noise", "sticky", "--act", "argmax")
    assert f"the evaluation that was there is now {out}.2" in told
    assert out.with_name("evaluation.json.1").read_text() == "older"
    assert out.with_name("evaluation.json.2").read_text() == before
    assert len(json.loads(out.read_text())["cells"]) == 1


def test_a_profile_says_how_it_was_played(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = demoreset(capsys, "evaluate", run, *QUICK, "--profile", 20, "--episodes", 1)
    assert "every 20 decisions of 4 frames, played as in the training: sampled," in told
    assert re.findall(r"^ +(\d+) +\d+%", told, re.MULTILINE) == ["0", "80", "160"]


def test_a_cell_that_is_asked_for_twice_is_played_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    command = ("evaluate", "montezuma-first-key", *QUICK, "--out", out)
    demoreset(capsys, *command, "--noise", "none,none", "--act", "argmax, argmax")
    assert len(json.loads(out.read_text())["cells"]) == 1


@pytest.mark.parametrize("onnx", ["x.policy.safetensors", "x.policy.json"])
def test_a_network_is_not_written_over_what_the_command_has_just_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, onnx: str
) -> None:
    monkeypatch.setattr(policy_file, "check_onnx", lambda: None)
    flags = ("--out", run / "x.policy.safetensors", "--onnx", run / onnx, "--force")
    assert "it must end in .onnx" in demoreset(capsys, "export", run, *flags, expect=64)
    assert not (run / onnx).exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--from", "3"], "--from: received 3; it must be a multiple of 4 from 0 to "),
        (["--from", "-4"], "--from: received -4; "),
        (["--out", "b.avi"], "--out: received b.avi; it must end in .mp4 or .gif"),
        (["--out", "none/b.mp4"], "--out: none/b.mp4: there is no folder"),
        (["--out", "/proc/b.mp4"], "/proc/b.mp4: cannot be written: "),
        (["--out", "film.mp4"], "--out: film.mp4 is there already; --force overwrites it"),
    ],
)
def test_a_film_that_cannot_be_is_told_by_its_flag(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.mp4").touch()
    assert says in demoreset(capsys, "video", "montezuma-first-key", *flags, expect=64)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("command", ["evaluate", "video"])
def test_a_seed_below_0_is_refused(capsys: pytest.CaptureFixture[str], command: str) -> None:
    told = demoreset(capsys, command, "montezuma-first-key", "--seed", -1, expect=64)
    assert "--seed: received -1; at least 0 is needed" in told


def test_results_that_cannot_be_written_are_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gone" / "x.json"
    out.parent.mkdir()

    def play(*_: object, **__: object) -> list[Cell]:
        out.parent.rmdir()
        return [summarise("sticky", "sampled", [played(100)], 100)]

    monkeypatch.setattr(evaluate, "evaluate", play)
    told = demoreset(capsys, "evaluate", "montezuma-first-key", "--out", out, expect=75)
    assert "(guide 0.1)" in told
    assert re.search("sticky .* 77 ", told)
    assert told.splitlines()[-1].startswith(f"demoreset: {out}: cannot be written now: ")
