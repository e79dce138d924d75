"""Slots in processes give what single environments give, stepped one after the other."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from demoreset_trainer.demo import Demo
from demoreset_trainer.env import TRUNCATED, DemoResetEnv, End, Rules
from demoreset_trainer.slots import IDLE, Begin, Slots, SlotsDied
from demoreset_trainer.states import View

COUNT = 5
STEPS = 60
RULES = Rules(sticky_probability=0.25, lag_frames=8, max_frames=60, extra_frames=5)
VIEW = View(stack=2)


def begin(slot: int, episode: int) -> Begin:
    """Any fixed plan: starts near the crossing's end, near its middle, and at the game's own."""
    start = (0, 160, 136, 168)[(slot + episode) % 4]
    return Begin(start, seed=100 * slot + episode, limits=(slot + episode) % 3 > 0)


def actions() -> npt.NDArray[np.uint8]:
    """Of every step and slot; slot 2 rests for a while."""
    drawn = np.random.default_rng(0).choice([0, 1, 1, 1, 2], size=(STEPS, COUNT)).astype(np.uint8)
    drawn[10:20, 2] = IDLE
    return drawn


Step = dict[str, npt.NDArray[np.generic]]


def single(demo: Demo) -> list[Step]:
    """What happens, by environments that are stepped one after the other."""
    envs = [DemoResetEnv(demo, rules=RULES, view=VIEW) for _ in range(COUNT)]
    episodes = [0] * COUNT

    def enter(slot: int) -> None:
        planned = begin(slot, episodes[slot])
        envs[slot].reseed(planned.seed)
        envs[slot].reset(options={"start": planned.start, "limits": planned.limits})

    for slot in range(COUNT):
        enter(slot)
    history = []
    for row in actions():
        step = blank()
        for slot, action in enumerate(row.tolist()):
            env = envs[slot]
            if action != IDLE:
                seen, reward, terminated, truncated, info = env.step(action)
                step["reward"][slot] = reward
                if terminated or truncated:
                    step["end"][slot] = End[info["end"]]
                    step["score"][slot], step["frame"][slot] = info["score"], info["frame"]
                    step["success"][slot] = info["success"]
                    if truncated:
                        step["last"][slot] = seen
                    episodes[slot] += 1
                    enter(slot)
            step["observation"][slot] = env.observation
        history.append(step)
    return history


def blank() -> dict[str, npt.NDArray[np.generic]]:
    images = np.zeros((COUNT, *VIEW.shape), np.uint8)
    numbers = np.zeros((5, COUNT))
    names = ("reward", "end", "score", "frame", "success")
    return dict(zip(names, numbers, strict=True)) | {"last": images, "observation": images.copy()}


def together(slots: Slots, bounds: Sequence[int] = (0, COUNT)) -> list[Step]:
    """What happens, in processes. What is not an ended episode's is void, and not looked at.

    Between the bounds lie parts; each is told its next step before the others are waited for.
    """
    episodes = [0] * COUNT
    slots.reset([begin(slot, 0) for slot in range(COUNT)])
    for slot in range(COUNT):
        slots.plan(slot, begin(slot, 1))
    history = [blank() for _ in range(STEPS)]

    def look(step: Step, part: slice) -> None:
        step["reward"][part], step["end"][part] = slots.reward[part], slots.end[part]
        step["observation"][part] = slots.observation[part]
        for slot in (np.flatnonzero(slots.end[part]) + part.start).tolist():
            step["score"][slot], step["frame"][slot] = slots.score[slot], slots.frame[slot]
            step["success"][slot] = slots.success[slot]
            if slots.end[slot] in TRUNCATED:
                step["last"][slot] = slots.last_observation[slot]
            episodes[slot] += 1
            slots.plan(slot, begin(slot, episodes[slot] + 1))

    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    for number in range(STEPS + 1):
        for part in parts:
            if number > 0:
                slots.wait()
                look(history[number - 1], part)
            if number < STEPS:
                slots.action[part] = actions()[number, part]
                slots.send(part.start, part.stop)
    return history


@pytest.fixture(scope="module")
def expected(freeway: Demo) -> list[Step]:
    return single(freeway)


@pytest.fixture(scope="module")
def two(freeway: Demo) -> Iterator[Slots]:
    with Slots(freeway, RULES, VIEW, slots=COUNT, processes=2) as slots:
        yield slots


def compare(history: list[Step], expected: list[Step]) -> None:
    for number, (step, wanted) in enumerate(zip(history, expected, strict=True)):
        for name, array in wanted.items():
            np.testing.assert_array_equal(step[name], array, err_msg=f"{name} at {number}")


def test_the_comparison_sees_all_that_may_happen(expected: list[Step]) -> None:
    ends = {int(end) for step in expected for end in step["end"]}
    assert ends >= {End.NONE, End.SUCCESS, End.BEHIND, End.FRAMES}
    assert sum(np.count_nonzero(step["end"]) for step in expected) > 2 * COUNT


def test_processes_give_what_single_environments_give(two: Slots, expected: list[Step]) -> None:
    compare(together(two), expected)


def test_a_reset_in_the_middle_begins_everything_anew(two: Slots, expected: list[Step]) -> None:
    slots = two
    slots.reset([begin(slot, 3) for slot in range(COUNT)])
    slots.action[:] = 1
    slots.send()
    slots.wait()
    compare(together(slots), expected)


def test_the_number_of_processes_changes_nothing(freeway: Demo, expected: list[Step]) -> None:
    with Slots(freeway, RULES, VIEW, slots=COUNT, processes=1) as slots:
        assert len(slots.pids) == 1
        compare(together(slots), expected)


def test_some_play_while_others_are_waited_for(two: Slots, expected: list[Step]) -> None:
    compare(together(two, (0, 2, COUNT)), expected)


def test_an_idle_slot_waits(two: Slots) -> None:
    slots = two
    slots.reset([begin(slot, 0) for slot in range(COUNT)])
    before = slots.observation.copy()
    slots.action[:] = [1, IDLE, 1, IDLE, 1]
    for _ in range(3):
        slots.send()
        slots.wait()
    idle = [1, 3]
    np.testing.assert_array_equal(slots.observation[idle], before[idle])
    assert not slots.reward[idle].any()
    assert not slots.end[idle].any()
    assert (slots.observation[[0, 2, 4]] != before[[0, 2, 4]]).any()


def test_a_lost_process_is_named_and_the_rest_still_ends(freeway: Demo) -> None:
    slots = Slots(freeway, RULES, VIEW, slots=3, processes=8)
    try:
        assert len(slots.pids) == 3  # never more than slots
        slots.reset([Begin(0, slot) for slot in range(3)])
        os.kill(slots.pids[1], signal.SIGKILL)
        slots.action[:] = 0
        slots.send()
        with pytest.raises(SlotsDied, match=r"process slots-1-of-3 is gone \(killed by SIGKILL\)$"):
            slots.wait()
        pids = slots.pids
    finally:
        slots.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_does_not_come_is_not_waited_for_forever(
    freeway: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demoreset_trainer.slots.STARTING", 0.5)
    beats: list[None] = []
    with Slots(freeway, RULES, VIEW, slots=2, processes=1) as slots:
        os.kill(slots.pids[0], signal.SIGSTOP)
        with pytest.raises(SlotsDied, match=r"process slots-0-of-1 .* has said nothing for"):
            slots.ready(lambda: beats.append(None))
    assert beats, "who waits looks alive"


def test_who_stops_all_processes_at_once_means_the_parent(two: Slots, expected: list[Step]) -> None:
    for pid in two.pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    compare(together(two), expected)


def test_ctrl_c_while_they_are_made_is_the_parents_and_is_not_lost(
    freeway: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = BaseProcess.start
    seen: list[int] = []

    def pressed(process: BaseProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(process)

    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        monkeypatch.setattr(BaseProcess, "start", pressed)
        with Slots(freeway, RULES, VIEW, slots=2, processes=2) as slots:
            slots.ready()
            assert set(seen) == {signal.SIGINT}
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_nobody_closed_ends_with_the_parent(tmp_path: Path) -> None:
    script = """
from demoreset_trainer import demo
from demoreset_trainer.env import Rules
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import View

if __name__ == "__main__":
    freeway = demo.load(demo.locate("freeway-crossing"))
    slots = Slots(freeway, Rules(), View(stack=2), slots=2, processes=2).ready()
    print(*slots.pids)
"""
    path = tmp_path / "script.py"  # imported by the processes it starts: -c would not do
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, check=True
    )
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_an_error_in_a_process_is_a_lost_process(
    freeway: Demo, capfd: pytest.CaptureFixture[str]
) -> None:
    with Slots(freeway, RULES, VIEW, slots=2, processes=1) as slots:
        with pytest.raises(SlotsDied, match="its own lines above say why"):
            slots.reset([Begin(0, 0), Begin(2, 0)])
        assert "start: received 2" in capfd.readouterr().err


FORKS = """
import socket
from demoreset_trainer import demo, emulator
from demoreset_trainer.env import Rules
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.states import View

if __name__ == "__main__":
    emulator.stock("freeway", 2)
    ours, theirs = socket.socketpair()
    crossing = demo.load(demo.find("freeway-crossing"))
    with Slots(crossing, Rules(), View(), slots=2, processes=2) as slots:
        slots.reset([Begin(0, 1), Begin(0, 2)])
        ours.close()  # as a group that is left
        theirs.settimeout(5)
        print("heard:", theirs.recv(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_processes_that_are_forked_hold_none_of_the_parents_connections() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "heard: b''\n", done.stderr
