"""Run files: every mistake is one line that names the field, what was received, what is right."""

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demoreset_api.errors import TryAgain, UserError
from demoreset_api.spec import Collectives, RunSpec, Workers
from demoreset_trainer import runfile
from demoreset_trainer.demo import Demo, record

GOOD = """
apiVersion: demoreset.dev/v1alpha1
kind: DemoResetRun
metadata: {name: crossing}
spec:
  demo: {name: freeway-crossing}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_the_smallest_run_file_has_defaults_for_all_else(tmp_path: Path) -> None:
    run = runfile.read(write(tmp_path, GOOD))
    assert run.metadata.name == "crossing"
    assert run.spec.environment.slots == 64
    assert run.spec.curriculum.threshold == 0.2


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("spec.ppo.learningRate=3e-4", "learning_rate", 3e-4),
        ("spec.ppo.epochs=1", "epochs", 1),
        ("spec.ppo.lambda=0.9", "lambda_", 0.9),
    ],
)
def test_set_changes_a_field(tmp_path: Path, change: str, field: str, value: float) -> None:
    run = runfile.read(write(tmp_path, GOOD), [change])
    assert getattr(run.spec.ppo, field) == value


def test_set_reaches_words_and_truth_values(tmp_path: Path) -> None:
    changes = ["spec.curriculum.mode=Original", "spec.environment.lifeLossEnds=false"]
    spec = runfile.read(write(tmp_path, GOOD), changes).spec
    assert spec.curriculum.mode == "Original"
    assert spec.environment.life_loss_ends is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD + "  ppo: {learningrate: 1}\n",
            ["spec.ppo.learningrate: unknown field; did you mean learningRate?"],
        ),
        (GOOD + "  sed: 1\n", ["spec.sed: unknown field; did you mean seed?"]),
        (GOOD + "  budget: {x: 1}\n", ["spec.budget.x: unknown field; known are frames"]),
        (GOOD + "  ppo: {clip: 2}\n", ["spec.ppo.clip", "received 2", "less than 1"]),
        (GOOD + "  seed: x\n", ["spec.seed", "received 'x'"]),
        (GOOD + "  ppo: {learningRate: .nan}\n", ["spec.ppo.learningRate", "finite"]),
        (GOOD + "  environment: {slots: 63}\n", ["slots (63)", "multiple", "minibatches (4)"]),
        (
            GOOD + "  environment: {frameSkip: 1}\n",
            ["spec.environment: maxOverFrames (2)", "frameSkip (1)"],
        ),
        (GOOD + "  workers: {min: 3, max: 2}\n", ["spec.workers", "max (2)", "min (3)"]),
        (GOOD.replace("DemoResetRun", "Job"), ["kind", "'Job'", "DemoResetRun"]),
        (GOOD.replace("{name: freeway-crossing}", "{}"), ["spec.demo", "exactly one"]),
        (GOOD.replace("name: crossing", "name: Über"), ["metadata.name", "Über"]),
        ("- a\n- b\n", ["received list", "mapping"]),
        (
            GOOD.replace("demo: {name: freeway-crossing}", "seed: 1").replace(
                "name: cro", "x: cro"
            ),
            [
                "metadata.name: missing; the run's name",
                "spec.demo: missing; set exactly one of name",
            ],
        ),
        (GOOD.partition("spec:")[0], ["spec: missing; it holds demo (set exactly one of name"]),
        (GOOD + "  seed: true\n", ["spec.seed: received True; it is a number"]),
        (GOOD + "  budget: {frames: false}\n", ["spec.budget.frames: received False; it is a num"]),
        (GOOD + "  ppo: {clip: yes}\n", ["spec.ppo.clip: received True; it is a number"]),
        (
            GOOD + "  workers: {tolerations: {'0': {key: a}}}\n",
            ["spec.workers.tolerations: received {'0': {'key': 'a'}}; it is a list, which --set"],
        ),
        (GOOD + "  seed: 1\n  seed: 1\n", ["seed: said twice, in line 7 and in line 8; say it on"]),
        (GOOD + "  ppo: {clip: 0.1, clip: 0.2}\n", ["clip: said twice, in line 7 and in line 7"]),
        ("kind: x", ["apiVersion: missing; it is always demoreset.dev/v1alpha1"]),
        ("a: [", ["not YAML"]),
        ("a: 2024-13-45", ["not YAML: month must be in 1..12"]),
        ("a: " + 5000 * "[", ["nested too deeply"]),
        ("# nothing yet", ["the file is empty", "mapping"]),
    ],
)
def test_a_mistake_names_its_field(tmp_path: Path, text: str, says: list[str]) -> None:
    with pytest.raises(UserError) as error:
        runfile.read(write(tmp_path, text))
    for part in ["run.yaml", *says]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["spec.ppo", "ppo.clip=1", "spec=1", "=3"])
def test_a_change_that_is_none_says_how_one_looks(tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match=r"--set.*spec\.ppo\.learningRate=3e-4"):
        runfile.read(write(tmp_path, GOOD), [change])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("spec..seed=1", "'spec..seed' is not a field's name"),
        ("spec.seed.=1", "'spec.seed.' is not a field's name"),
        (
            "spec.workers.tolerations.0.key=a",
            "spec.workers.tolerations is a list, which is set as a whole: "
            "spec.workers.tolerations=[A, B]",
        ),
        ("spec.seed.x=1", "spec.seed is not a mapping: 3"),
    ],
)
def test_a_change_of_what_is_no_field_says_what_it_is(
    tmp_path: Path, change: str, says: str
) -> None:
    path = write(tmp_path, GOOD + "  seed: 3\n  workers: {tolerations: [{key: b}]}\n")
    with pytest.raises(UserError) as error:
        runfile.read(path, [change])
    assert str(error.value) == f"--set: received {change!r}; {says}"


def test_what_is_merged_may_be_said_otherwise(tmp_path: Path) -> None:
    merged = "  environment: {<<: {slots: 8, frameSkip: 8}, frameSkip: 2}\n"
    spec = runfile.read(write(tmp_path, GOOD + merged)).spec
    assert (spec.environment.slots, spec.environment.frame_skip) == (8, 2)


def test_a_missing_or_binary_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        runfile.read(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        runfile.read(binary)


def crossing(frames: int = 172) -> Demo:
    return record("freeway", np.full(frames, 2, np.uint8), frame_skip=4)


def spec(**demo: object) -> RunSpec:
    return RunSpec.model_validate({"demo": demo})


def test_a_demo_is_found_beside_its_run_file_and_cut(tmp_path: Path) -> None:
    demo = crossing(200)
    demo.save(tmp_path / "x.demo.safetensors")
    wanted = spec(path="x.demo.safetensors", endFrame=180, sha256=demo.sha256)
    assert len(runfile.load_demo(wanted, tmp_path / "run.yaml")) == 180


def test_members_read_the_run_file_as_it_was(tmp_path: Path) -> None:
    crossing().save(tmp_path / "x.demo.safetensors")
    file = write(tmp_path, GOOD)
    changes = ["spec.demo={path: x.demo.safetensors}", "spec.seed=7"]
    wanted = runfile.read(file, changes)
    with runfile.frozen(wanted, file) as copy:
        file.write_text("nonsense: [")
        descriptor = os.open(copy.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # whoever tidies up old files sees that it is in use
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        kept = runfile.read(copy)
        assert kept.spec.seed == 7
        assert len(runfile.load_demo(kept.spec, copy)) == 172
    assert not copy.exists()


def test_another_demo_than_the_hash_is_refused(tmp_path: Path) -> None:
    crossing().save(tmp_path / "x.demo.safetensors")
    with pytest.raises(UserError, match=r"sha256.*wants 0000"):
        runfile.load_demo(spec(path="x.demo.safetensors", sha256="0" * 64), tmp_path / "run.yaml")


def test_a_demo_that_is_longer_than_an_episode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfile, "MAX_EPISODE_FRAMES", 171)
    crossing().save(tmp_path / "x.demo.safetensors")
    with pytest.raises(UserError, match=r"172 frames, and .* ends after 171: .*endFrame"):
        runfile.load_demo(spec(path="x.demo.safetensors"), tmp_path / "run.yaml")


def test_a_demo_without_a_reward_is_refused(tmp_path: Path) -> None:
    crossing(100).save(tmp_path / "x.demo.safetensors")
    with pytest.raises(UserError, match=r"nothing to learn.*endFrame"):
        runfile.load_demo(spec(path="x.demo.safetensors"), tmp_path / "run.yaml")


def test_a_demo_that_ends_below_its_beginning_is_refused(tmp_path: Path) -> None:
    demo = crossing(172)
    rewards = np.zeros(172, np.int32)
    rewards[[50, 100]] = -5, 2
    replace(demo, rewards=rewards).save(tmp_path / "x.demo.safetensors")
    with pytest.raises(UserError, match=r"score at frame 172 is -3, no more than at its beginning"):
        runfile.load_demo(spec(path="x.demo.safetensors"), tmp_path / "run.yaml")


def test_an_unknown_bundled_demo_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no bundled demo 'pong'.*montezuma-first-key"):
        runfile.load_demo(spec(name="pong"), tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("curriculum", "says"),
    [
        ({}, "guide 0.1"),
        ({"guide": 0.025}, "guide 0.025"),
        ({"guide": 0}, "pure reinforcement learning"),
        ({"mode": "Original"}, "pure reinforcement learning"),
    ],
)
def test_a_result_says_whether_the_guide_was_used(curriculum: dict[str, object], says: str) -> None:
    wanted = {"demo": {"name": "x"}, "curriculum": curriculum}
    assert runfile.guided(RunSpec.model_validate(wanted)) == says


def test_a_group_where_no_temporary_folder_can_be_made_is_told_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    path = write(tmp_path, GOOD)
    monkeypatch.setattr(runfile, "TemporaryDirectory", full)
    frozen = runfile.frozen(runfile.read(path), path)
    with pytest.raises(TryAgain, match=r"No usable .*; make room .* TMPDIR"), frozen:
        pass


@pytest.mark.parametrize(
    ("wanted", "there", "allowed"), [(1, 0, True), (2, 2, True), (2, 1, False), (2, 0, False)]
)
def test_nccl_needs_a_gpu_for_each_member(
    wanted: int, there: int, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfile, "gpus", lambda: there)
    workers = Workers(collectives=Collectives.NCCL, gpus=1)
    if allowed:
        assert runfile.members(wanted, workers) == wanted
        return
    with pytest.raises(UserError, match=f"a GPU for each of 2 members, and here are {there}; take"):
        runfile.members(wanted, workers)
