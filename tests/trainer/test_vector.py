"""The vector environment: gymnasium's own semantics over our slots."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import demoreset_trainer  # noqa: F401  (registers the environment)
from demoreset_api.errors import UserError
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.vector import DemoResetVectorEnv

PAGE = Path(__file__).parents[2] / "docs" / "environment.md"
UP, NOOP = 1, 0


@pytest.fixture(scope="module")
def envs(freeway: Demo) -> Iterator[DemoResetVectorEnv]:
    envs = DemoResetVectorEnv(freeway, 3, processes=2)
    yield envs
    envs.close()


def test_every_slot_plays_as_one_environment_does(freeway: Demo, envs: DemoResetVectorEnv) -> None:
    starts = [0, 40, 120]
    observations, info = envs.reset(seed=3, options={"start": np.array(starts)})
    assert info["start"].tolist() == starts
    alone = [DemoResetEnv(freeway) for _ in starts]
    for env, start, observation in zip(alone, starts, observations, strict=True):
        assert np.array_equal(env.reset(options={"start": start})[0], observation)
    for _ in range(8):
        batch = envs.step(np.full(3, UP))
        for slot, env in enumerate(alone):
            single = env.step(UP)
            assert np.array_equal(batch[0][slot], single[0])
            assert [part[slot] for part in batch[1:4]] == list(single[1:4])


def test_an_episode_that_ends_is_followed_by_the_next_in_the_same_step(
    envs: DemoResetVectorEnv,
) -> None:
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    first, _ = envs.reset(seed=0, options={"start": 160})
    for _ in range(40):
        observations, _, terminated, truncated, infos = envs.step(np.full(3, UP))
        if terminated.any():
            break
    assert infos["_final_info"].tolist() == (terminated | truncated).tolist()
    slot = int(np.flatnonzero(terminated)[0])
    assert infos["final_info"]["success"][slot]
    assert infos["final_info"]["start"][slot] == 160
    assert infos["final_info"]["end"][slot] == "SUCCESS"
    assert infos["final_info"]["score"][slot] == 1
    assert np.array_equal(observations[slot], first[slot])  # the same start again
    assert not np.array_equal(infos["final_obs"][slot], observations[slot])


def test_a_curriculum_chooses_every_start(freeway: Demo) -> None:
    asked = []

    def choose(slot: int, random: np.random.Generator) -> int:
        asked.append(slot)
        return int(random.integers(30, 43)) * 4

    envs = DemoResetVectorEnv(freeway, 2, processes=1, choose_start=choose)
    seen = []
    for _ in range(2):
        _, info = envs.reset(seed=5)
        starts = [info["start"].tolist()]
        for _ in range(60):
            *_, infos = envs.step(np.full(2, UP))
            if infos:
                starts.append(infos["final_info"]["start"][infos["_final_info"]].tolist())
        seen.append(starts)
    envs.close()
    assert seen[0] == seen[1]  # by the seed
    assert len({start for starts in seen[0] for start in starts}) > 3
    assert set(asked) == {0, 1}


def test_a_list_has_a_seed_for_each_slot(freeway: Demo) -> None:
    with closing(DemoResetVectorEnv(freeway, 2, processes=1, no_ops=30)) as envs:

        def first(seed: list[int | None]) -> list[bytes]:
            return [one.tobytes() for one in envs.reset(seed=seed)[0]]

        one, other = first([1, 2])
        assert [first([1, 9])[0], first([7, 2])[1]] == [one, other]
        assert {first([seed, 0])[0] for seed in range(6)} != {one}
        with pytest.raises(UserError, match="seed: 1 of them"):
            envs.reset(seed=[1])
        with pytest.raises(UserError, match="seed: received -1"):
            envs.reset(seed=[0, -1])
        with pytest.raises(UserError, match="start: 3 of them"):
            envs.reset(options={"start": [0, 4, 8]})


def test_without_a_seed_no_two_are_alike(freeway: Demo) -> None:
    seeds = set()
    for _ in range(2):
        with closing(DemoResetVectorEnv(freeway, 1, processes=1)) as envs:
            seeds.add(envs._begin(0).seed)
    assert len(seeds) == 2


def test_an_option_that_there_is_none_of_is_named(envs: DemoResetVectorEnv) -> None:
    with pytest.raises(UserError, match="options: received strat"):
        envs.reset(options={"strat": 120})


def test_what_was_not_reset_or_is_closed_cannot_be_played(freeway: Demo) -> None:
    envs = DemoResetVectorEnv(freeway, 2, processes=1)
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.full(2, UP))
    envs.reset()
    envs.step(np.full(2, UP))
    for wrong in (np.full(1, UP), np.full((2, 1), UP)):
        with pytest.raises(UserError, match="it is one for each of the 2 slots"):
            envs.step(wrong)
    envs.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        envs.step(np.full(2, UP))


def test_a_start_outside_the_demo_is_named(envs: DemoResetVectorEnv) -> None:
    for start in (3, 172, -4):
        with pytest.raises(UserError, match=f"start: received {start}; it must be a multiple of 4"):
            envs.reset(options={"start": start})


def test_an_action_that_there_is_none_of_is_named_and_nothing_is_played(
    envs: DemoResetVectorEnv,
) -> None:
    before = envs.reset()[0]
    for action in (-1, 3, 258, 1.5):
        with pytest.raises(UserError, match=f"action: received {action}; this game's are 0 to 2"):
            envs.step(np.array([action, 0, 0]))
    assert np.array_equal(envs.step(np.array([0, 0, 0]))[0][:, :-1], before[:, 1:])


@pytest.mark.parametrize("count", [0, -1])
def test_there_is_at_least_one_slot(freeway: Demo, count: int) -> None:
    with pytest.raises(UserError, match=f"num_envs: received {count}; it is 1 or more"):
        gymnasium.make_vec("DemoReset-v0", num_envs=count, demo=freeway)


def test_gymnasium_makes_it(freeway: Demo) -> None:
    envs = gymnasium.make_vec("DemoReset-v0", num_envs=2, demo=freeway, processes=1)
    assert envs.reset(seed=0)[0].shape == (2, 4, 64, 64)
    assert isinstance(envs.unwrapped, DemoResetVectorEnv)
    envs.close()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_the_documentations_examples_run(tmp_path: Path, block: str) -> None:
    if "stable_baselines3" in block:
        pytest.importorskip("stable_baselines3")
    script = tmp_path / "example.py"  # processes of environments import it, which `exec` would hide
    script.write_text(block.replace("1_000_000", "256"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
