"""Policies as files: whole, self-describing, and nothing but numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demoreset_api.errors import UserError
from demoreset_trainer import policy_file
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.evaluate import demo_or_blank, interval, iqm, summarise

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
    torch.manual_seed(0)
    page = (ROOT / "docs" / "policy.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert int(capsys.readouterr().out) in (0, 100)


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


def card() -> dict[str, object]:
    content: dict[str, object] = json.loads(
        BUNDLED.with_name("montezuma-first-key.policy.json").read_text()
    )
    return content


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
    ],
)
def test_a_card_that_does_not_fit_is_one_line(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = tmp_path / "x.policy.safetensors"
    save_file(load_file(BUNDLED), path, metadata={"card": json.dumps(card() | changes)})
    with pytest.raises(UserError, match=says) as error:
        policy_file.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04" * 100, b"\xff" * 64])
def test_what_is_no_policy_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.policy.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a policy that `demoreset export` wrote"):
        policy_file.load(str(path))


def test_a_torn_policy_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.policy.safetensors"
    path.write_bytes(BUNDLED.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged"):
        policy_file.load(str(path))


def test_statistics_are_those_of_the_field() -> None:
    cell = summarise("none", "sampled", [0, 0, 100, 100, 100, 100, 100, 400], [10] * 8, 100)
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
