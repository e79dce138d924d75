"""A real group: torchft's coordinator, members in processes, signals that really come."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demoreset_trainer import checkpoint, demo, run_folder
from demoreset_trainer.checkpoint import newest
from demoreset_trainer.wire import Note, parse
from small_run import make

os.environ.setdefault("RUST_LOG", "error")
torchft = pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

PATIENCE = 90.0  # seconds for anything; never what is measured
TINY = (
    "spec.environment.slots=8",
    "spec.ppo.rolloutLength=8",
    "spec.goal.episodes=1000000",
    "spec.checkpoint.intervalSeconds=1",
)
ROOT = Path(__file__).parents[2]


class Village:
    """A coordinator and members that train in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events_file = folder.parent / "events.jsonl"
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        self._wires: dict[str, Any] = {}
        self.coordinate(0)

    def coordinate(self, port: int, least: int = 1) -> None:
        self.coordinator = torchft.LighthouseServer(
            bind=f"0.0.0.0:{port}",
            min_replicas=least,
            join_timeout_ms=60_000,
            quorum_tick_ms=20,
            heartbeat_timeout_ms=700,
        )
        self.port = int(self.coordinator.address().rpartition(":")[2])

    def start(self, id: str, *changes: str) -> None:
        here, there = os.pipe()
        told = {
            "DEMORESET_WIRE": str(there),
            "DEMORESET_EVENTS": str(self.events_file),
            "DEMORESET_CORES": "1",
        }
        command = [sys.executable, "-m", "demoreset_trainer.cli", "member", "--id", id]
        command += ["-f", str(ROOT / "demos/freeway-crossing.yaml"), "--dir", str(self.folder)]
        command += ["--coordinator", f"127.0.0.1:{self.port}", "--address", "127.0.0.1"]
        for change in (*TINY, *changes):
            command += ["--set", change]
        self.members[id] = subprocess.Popen(
            command, env={**os.environ, **told}, pass_fds=[there], stderr=subprocess.PIPE
        )
        os.close(there)
        self._wires[id] = os.fdopen(here, "rb")

    def events(self, *names: str) -> list[dict[str, Any]]:
        if not self.events_file.exists():
            return []
        lines = self.events_file.read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event"] in names]

    def wait(self, met: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if result := met():
                return result
            for id, member in self.members.items():
                if member.poll() not in (None, 0, 2, 143, -signal.SIGKILL):
                    assert member.stderr is not None
                    pytest.fail(f"{id} ended with {member.returncode}: {member.stderr.read()!r}")
            time.sleep(0.05)
        pytest.fail(f"not within {PATIENCE} s; {self.events('formed', 'lost')}")

    def whole(self, *ids: str) -> Callable[[], Any]:
        """Whether these members have formed a group, and learned in it."""

        def formed() -> bool:
            groups = [set(event["members"]) for event in self.events("formed")]
            if not groups or groups[-1] != set(ids):
                return False
            last = self.events("formed")[-1]["time"]
            learned = {e["member"] for e in self.events("commit") if e["time"] > last}
            return learned >= set(ids)

        return formed

    def notes(self, id: str) -> list[str]:
        """What it told; to be asked when it has ended."""
        messages = [parse(line) for line in self._wires[id]]
        return [message.text for message in messages if isinstance(message, Note)]

    def check(self) -> dict[int, int]:
        """No update lost, none twice in another way; frames by update."""
        states: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for event in self.events("commit"):
            states[event["update"]].add((event["frames"], event["digest"]))
        assert all(len(known) == 1 for known in states.values())
        updates = sorted(states)
        assert updates == list(range(1, updates[-1] + 1))
        frames = [next(iter(states[update]))[0] for update in updates]
        assert frames == sorted(set(frames))
        return dict(zip(updates, frames, strict=True))

    def close(self) -> None:
        for member in self.members.values():
            member.kill()
            member.wait()
            assert member.stderr is not None
            member.stderr.close()
        for wire in self._wires.values():
            wire.close()


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    village = Village(tmp_path / "run")
    yield village
    village.close()


def test_a_group_loses_its_first_member_grows_again_and_one_may_leave(village: Village) -> None:
    for id in ("a", "b", "c"):
        village.start(id)
    village.wait(village.whole("a", "b", "c"))
    first = village.events("formed")[-1]["members"][0]
    others = {"a", "b", "c"} - {first}
    village.members[first].kill()
    village.wait(village.whole(*others))
    village.start("d")
    village.wait(village.whole(*others, "d"))
    leaving = sorted(others)[0]
    village.members[leaving].terminate()
    assert village.members[leaving].wait(PATIENCE) == 143
    village.wait(village.whole(*others - {leaving}, "d"))
    frames = village.check()
    # What the first one played when it was killed is all that was not learned from.
    lost = max(frames) * 8 * 8 * 4 - frames[max(frames)]
    assert 0 <= lost <= 3 * 8 * 4
    village.wait(lambda: newest(village.folder / "checkpoints"))
    for id in (*others - {leaving}, "d"):
        village.members[id].terminate()
    for id in (*others - {leaving}, "d"):
        assert village.members[id].wait(PATIENCE) == 143
    saved = newest(village.folder / "checkpoints")
    assert saved is not None
    assert int(saved.name.rpartition("u")[2]) >= max(frames) - 1
    again = [note for id in village.members for note in village.notes(id) if "going on" in note]
    assert again == []  # nobody read the disk


def test_a_group_waits_for_its_coordinator_and_goes_on_from_disk_when_all_died(
    village: Village,
) -> None:
    for id in ("a", "b"):
        village.start(id)
    village.wait(village.whole("a", "b"))
    village.coordinator.shutdown()
    port = village.port
    del village.coordinator
    before = len(village.events("commit"))
    village.coordinate(port)
    village.wait(lambda: len(village.events("commit")) > before + 4)
    village.check()
    saved = village.wait(lambda: newest(village.folder / "checkpoints"))
    for member in village.members.values():
        member.kill()
    update = max(event["update"] for event in village.events("commit"))
    died = time.monotonic()
    village.start("c", "spec.budget.frames=1")
    assert village.members["c"].wait(PATIENCE) == 2  # the budget is spent already
    (note,) = [note for note in village.notes("c") if "going on" in note]
    assert int(saved.name.rpartition("u")[2]) <= update
    assert "ckpt-l000001" in note
    assert not [event for event in village.events("commit") if event["time"] > died]
    # It might have been the first to find a coordinator that was away: it waited for the others.
    asked, formed = (
        next(event["time"] for event in village.events(name) if event["member"] == "c")
        for name in ("quorum", "formed")
    )
    assert formed - asked > 1


def test_a_run_goes_on_from_a_checkpoint_that_is_still_being_written(village: Village) -> None:
    loop, _, _ = make(demo.load(demo.find("freeway-crossing")))
    loop.state.life, loop.state.counters.update, loop.state.counters.frames = 1, 5, 1000
    checkpoints = run_folder.make_folder(village.folder)
    whole = checkpoint.write(checkpoints, loop.snapshot())
    half = whole.rename(checkpoints / ".partial-late")
    village.start("a", "spec.budget.frames=1")
    village.wait(lambda: village.events("formed"))
    time.sleep(0.5)  # whoever does not wait has looked, found nothing, and cleared it away
    half.rename(whole)
    assert village.members["a"].wait(PATIENCE) == 2  # the budget is spent already
    assert any(f"{whole} (1,000 frames)" in note for note in village.notes("a"))
    assert newest(checkpoints) == checkpoints / "ckpt-l000002-u0000000005"


def test_who_is_left_without_the_first_saves_what_they_knew(village: Village) -> None:
    village.coordinate(0, least=2)
    for id in ("a", "b"):
        village.start(id, "spec.checkpoint.intervalSeconds=10000")
    village.wait(village.whole("a", "b"))
    first, other = village.events("formed")[-1]["members"]
    village.members[first].kill()
    time.sleep(2)
    village.members[other].terminate()
    assert village.members[other].wait(PATIENCE) == 143
    saved = newest(village.folder / "checkpoints")
    assert saved is not None
    assert int(saved.name.rpartition("u")[2]) == max(village.check())


def test_a_frozen_member_is_left_behind_and_comes_back_when_it_thaws(village: Village) -> None:
    for id in ("a", "b", "c"):
        village.start(id)
    village.wait(village.whole("a", "b", "c"))
    village.members["b"].send_signal(signal.SIGSTOP)
    village.wait(village.whole("a", "c"))
    village.members["b"].send_signal(signal.SIGCONT)
    village.wait(village.whole("a", "b", "c"))
    village.check()
