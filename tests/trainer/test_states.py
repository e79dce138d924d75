"""Start states: whoever begins inside the demo sees and plays what one who came there would."""

import os
import resource
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demoreset_api.errors import TryAgain, UserError
from demoreset_trainer.demo import Demo, record, verify
from demoreset_trainer.emulator import Emulator
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.states import View, start_states

GREY = View()
VIEWS = [
    GREY,
    View(stack=1, max_over_frames=1),
    View(84, 84, max_over_frames=4),
    View(105, 80, channels=3),
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_start_sees_what_a_player_who_came_there_sees(freeway: Demo, view: View) -> None:
    states = start_states(freeway, view, 4)
    env = DemoResetEnv(freeway, view=view, states=states, extra_frames=1000)
    observation, _ = env.reset()
    up = env.action_codes.index(2)
    for index in range(len(freeway) // 4):
        np.testing.assert_array_equal(states.observation(index, view), observation)
        observation = env.step(up)[0]
    np.testing.assert_array_equal(states.observation(43, view), observation)
    assert len(states) == 44


def test_a_demo_that_does_not_replay_is_refused(freeway: Demo) -> None:
    actions = freeway.actions.copy()
    actions[60:100] = 0
    other = replace(freeway, actions=actions)
    difference = verify(other)
    assert difference is not None
    for _ in range(2):  # nothing of the first time is taken for whole
        with pytest.raises(UserError, match="does not replay here") as refused:
            start_states(other, GREY, 4)
        assert str(difference) in str(refused.value)


def test_many_starts_at_once_are_the_single_ones(freeway: Demo) -> None:
    states = start_states(freeway, GREY, 4)
    index = np.array([0, 1, 2, 3, 17, 43, 17])
    expected = [states.observation(one, GREY) for one in index.tolist()]
    np.testing.assert_array_equal(states.observations(index, GREY), expected)
    # Before the game's own start there is only its first image.
    np.testing.assert_array_equal(expected[0], np.repeat(states.images[0], 4, axis=0))
    assert len(np.unique(expected[4], axis=0)) > 1


@pytest.mark.parametrize("start", [0, 4, 52, 100, 236, 296])
def test_a_restored_state_plays_on_like_the_demo(assault: Demo, start: int) -> None:
    whole, restored = Emulator("assault"), Emulator("assault")
    whole.reset()
    for code in assault.actions[:start].tolist():
        whole.act(code)
    restored.restore(start_states(assault, GREY, 4).state(start // 4))
    for frame in range(start, len(assault)):
        np.testing.assert_array_equal(restored.ram(), whole.ram())
        code = int(assault.actions[frame])
        reward = int(assault.rewards[frame])
        assert (whole.act(code), restored.act(code)) == (reward, reward)
        assert restored.lives() == assault.lives[frame]


def test_a_state_holds_the_patches_up_to_its_frame() -> None:
    # Address 14 is the chicken's height: it is lifted before the frames 40 and 81.
    patches = np.array([[40, 14, 60], [81, 14, 150]], np.int32)
    lifted = record("freeway", np.full(120, 2, np.uint8), frame_skip=4, patches=patches)
    states = start_states(lifted, GREY, 4)
    emulator = Emulator("freeway")
    emulator.restore(states.state(10))
    assert emulator.ram()[14] == 60
    for index, lower, upper in ((9, 0, 59), (20, 61, 149), (21, 150, 200)):
        emulator.restore(states.state(index))
        assert lower <= emulator.ram()[14] <= upper


def test_a_demo_may_end_in_the_middle_of_a_decision(freeway: Demo) -> None:
    states = start_states(freeway.prefix(39), GREY, 4)
    assert len(states) == 10
    whole = start_states(freeway, GREY, 4)
    np.testing.assert_array_equal(states.images, whole.images[:10])


@pytest.mark.parametrize("skip", [1, 3])
def test_starts_lie_at_every_decision(freeway: Demo, skip: int) -> None:
    short = freeway.prefix(30)
    states = start_states(short, GREY, skip)
    assert len(states) == 30 // skip + 1
    emulator, other = Emulator("freeway"), Emulator("freeway")
    emulator.reset()
    for frame in range(31):
        if frame % skip == 0:
            other.restore(states.state(frame // skip))
            np.testing.assert_array_equal(other.ram(), emulator.ram())
        emulator.act(2)


def test_the_cache_is_used_and_knows_what_differs(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path / "of" / "mine"))
    cache = tmp_path / "of" / "mine"
    short = freeway.prefix(20)
    first = start_states(short, GREY, 4)
    (only,) = cache.iterdir()
    made = {path: path.stat().st_mtime_ns for path in only.iterdir()}
    again = start_states(short, View(stack=2), 4)  # what is stacked does not matter
    assert {path: path.stat().st_mtime_ns for path in only.iterdir()} == made
    np.testing.assert_array_equal(again.images, first.images)
    others = [
        (short, View(height=32), 4),
        (short, View(max_over_frames=1), 4),
        (short, GREY, 5),
        (freeway.prefix(24), GREY, 4),
    ]
    for number, (demo, view, skip) in enumerate(others):
        start_states(demo, view, skip)
        assert len(list(cache.iterdir())) == 2 + number
    assert not list(cache.glob(".partial-*"))


def test_what_somebody_was_making_who_was_killed_does_not_stay_for_ever(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path))
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "images.npy").write_bytes(b"half")
    os.utime(old, (0, 0))
    start_states(freeway.prefix(20), GREY, 4)
    assert not old.exists()
    assert young.exists()


def test_without_a_writable_cache_there_is_a_temporary_one(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = start_states(freeway.prefix(8), GREY, 4)
    assert len(states) == 3
    (cache,) = tmp_path.glob("demoreset-cache-*")
    assert len(list(cache.iterdir())) == 1
    cache.chmod(0o777)  # as of somebody else, who may put there what they like
    with pytest.raises(UserError, match=r"not a folder that is yours alone.*DEMORESET_CACHE"):
        start_states(freeway.prefix(8), GREY, 4)
    cache.rename(tmp_path / "moved")
    cache.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="not a folder that is yours alone"):
        start_states(freeway.prefix(8), GREY, 4)


@pytest.mark.parametrize("name", ["images", "states", "offsets"])
@pytest.mark.parametrize("left", [0, 40, -64])
def test_torn_start_states_are_made_anew(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: int
) -> None:
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path))
    short = freeway.prefix(20)
    expected = start_states(short, GREY, 4)
    (path,) = tmp_path.glob(f"*/{name}.npy")
    whole = path.read_bytes()
    path.unlink()  # `expected` has the old one mapped
    path.write_bytes(whole[:left])
    found = start_states(short, GREY, 4)
    np.testing.assert_array_equal(found.images, expected.images)
    assert [found.state(index) for index in range(6)] == [expected.state(i) for i in range(6)]
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["images", "states", "offsets"])
def test_arrays_that_do_not_belong_together_are_made_anew(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path))
    start_states(freeway.prefix(24), GREY, 4)
    (longer,) = tmp_path.iterdir()
    start_states(freeway.prefix(20), GREY, 4)
    (shorter,) = set(tmp_path.iterdir()) - {longer}
    whole = (shorter / f"{name}.npy").read_bytes()
    os.replace(longer / f"{name}.npy", shorter / f"{name}.npy")
    assert len(start_states(freeway.prefix(20), GREY, 4)) == 6
    assert (shorter / f"{name}.npy").read_bytes() == whole
    assert len(start_states(freeway.prefix(24), GREY, 4)) == 7  # one of its arrays is missing


def test_start_states_that_are_too_large_for_the_disk_are_one_line(
    freeway: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMORESET_CACHE", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TryAgain, match=r"File too large.*DEMORESET_CACHE") as error:
            start_states(freeway, GREY, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("game", ["qbert", "tetris", "montezuma_revenge"])
def test_a_state_goes_on_exactly_in_an_emulator_that_has_not_played(game: str) -> None:
    demo = record(game, np.full(120, 5, np.uint8), frame_skip=4)
    states = start_states(demo, View(), 4)
    for first in (0, 10):
        restored, watched = Emulator(game), Emulator(game)
        restored.restore(states.state(first))
        watched.reset()
        for number, action in enumerate(demo.actions.tolist()):
            watched.act(action)
            if number >= 4 * first:
                restored.act(action)
        np.testing.assert_array_equal(restored.ram(), watched.ram())
