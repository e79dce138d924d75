"""A supervisor over real processes, that crash, hang, freeze, tell and end as they are told to."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from demoreset_trainer.machine import cores, devices
from demoreset_trainer.member_process import SETTINGS
from demoreset_trainer.progress import Progress
from demoreset_trainer.restart import Limits
from demoreset_trainer.supervise import Supervisor, share

BASE = Progress(
    update=0,
    frames=0,
    seconds=0.0,
    episodes=0,
    start_frame=8,
    demo_frames=16,
    success_rate=0.5,
    goal_rate=None,
    goal=0.9,
    ended=0,
)

# What every member of these tests can do. `attempt` counts those of its place.
ABLE = f"""
import json, os, signal, sys, threading, time
index, name = int(sys.argv[1]), sys.argv[2]
wire = os.fdopen(int(os.environ["DEMORESET_WIRE"]), "wb", buffering=0)
with open(f"place-{{index}}", "a+") as file:
    file.write(name + "\\n")
    file.seek(0)
    attempt = len(file.readlines())

def tell(kind, **content):
    wire.write(json.dumps({{"kind": kind, **content}}).encode() + b"\\n")

def beat(update=0, phase="rollout"):
    tell("beat", update=update, phase=phase)

def note(text, update=0):
    tell("note", update=update, text=text)

def progress(update, **content):
    tell("progress", **{{**{asdict(BASE)!r}, "update": update, "generation": 1, **content}})

def live(seconds=60, update=0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        beat(update)
        time.sleep(0.02)

def drain():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
"""
LIMITS = Limits(hang=0.6, start=20, grace=0.6, finish=0.3, jump=0.4)
PATIENCE = 40.0  # seconds until a test counts as stuck


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.updates: list[Progress] = []
        self.notes: list[str] = []
        self.seen: list[Mapping[str, str]] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def update(self, progress: Progress) -> None:
        self.updates.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def states(self, states: Mapping[str, str]) -> None:
        self.seen.append(dict(states))

    def lost(self) -> list[str]:
        return [note for note in self.notes if note.startswith("lost member")]


class Group:
    """A supervisor over members that run `script`."""

    def __init__(
        self, folder: Path, script: str, members: int = 1, limits: Limits = LIMITS
    ) -> None:
        self.folder = folder
        self.heard = Listener()
        self.written: list[str] = []
        self.stood: dict[str, list[str]] = {}  # what was kept of those that stood still
        self.until: Callable[[], object] = lambda: False
        self.starved: Callable[[], int] = lambda: 0
        self.number = signal.SIGTERM
        self.jump = 0.0
        self.began = time.monotonic()
        self.supervisor = Supervisor(
            "w",
            members,
            lambda index, name: [
                *(sys.executable, "-S", "-E", "-X", "faulthandler", "-c"),
                f"import os; os.chdir({str(folder)!r})\n{ABLE}\n{script}",
                *(str(index), name),
            ],
            self.heard,
            stopping=self._stopping,
            say=self.written.append,
            limits=limits,
            keep=self._keep,
            brief=True,
            starved=lambda: self.starved(),
            clock=lambda: time.monotonic() + self.jump,
        )

    def _keep(self, name: str, lines: Sequence[str]) -> str:
        self.stood[name] = list(lines)
        return "hangs/it.txt"

    def _stopping(self) -> int | None:
        assert time.monotonic() < self.began + PATIENCE, (self.heard.notes, self.written)
        return self.number if self.until() else None

    def run(self, until: Callable[["Group"], object] | None = None) -> int:
        if until is not None:
            self.until = lambda: until(self)
        return self.supervisor.run()

    def names(self, index: int = 0) -> list[str]:
        path = self.folder / f"place-{index}"
        return path.read_text().split() if path.exists() else []

    def all_train(self) -> bool:
        states = self.heard.seen[-1].values() if self.heard.seen else ()
        return list(states) == ["training", "training"]

    def updated(self, update: int) -> bool:
        return any(progress.update == update for progress in self.heard.updates)


def test_memory_that_is_not_enough_is_named_and_not_tried_for_ever(tmp_path: Path) -> None:
    # The kernel chose the process that members are forked from: they say that it is away.
    group = Group(tmp_path, "sys.exit(75)")
    group.starved = lambda: len(group.names())
    assert group.run() == 137
    assert len(group.names()) == 3
    assert str(group.supervisor.error).startswith("OutOfMemory: the kernel has killed")


def test_what_the_kernel_killed_long_before_is_not_why_a_member_ends(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); progress(attempt)\n"
        "while attempt == 1:\n    beat(); time.sleep(0.05)\n"
        "    if os.path.exists('go'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "live()",
    )
    killed: list[float] = []  # somebody else's process, on a machine without containers
    group.starved = lambda: len(killed)

    def restarted(group: Group) -> bool:
        if group.updated(1) and not killed:
            killed.append(time.monotonic())
        if killed and time.monotonic() > killed[0] + 1.5 and not group.jump:
            group.jump = 60.0
            (tmp_path / "go").touch()
        return group.updated(2)

    assert group.run(restarted) == 143
    (line,) = group.heard.lost()
    assert "killed by SIGKILL; starting it again" in line


def test_a_member_that_crashes_is_told_in_one_line_and_started_anew(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); beat()\n"
        "if attempt == 1:\n    progress(3); raise RuntimeError('all is lost')\n"
        "progress(4); live()",
    )
    assert group.run(lambda group: group.updated(4)) == 143
    first, second = group.names()
    assert first != second
    assert all(name.startswith("w-0-") and len(name) == 12 for name in (first, second))
    (line,) = group.heard.lost()
    assert line.startswith(f"lost member {first} (pid ")
    assert line.endswith("at update 3: exit code 1 (RuntimeError: all is lost); starting it again")
    assert f"[{first}] RuntimeError: all is lost" in group.written
    assert group.supervisor.error is not None
    assert group.supervisor.error.lines[0].startswith("Traceback")


def test_one_that_is_killed_does_not_touch_the_other(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); progress(1, rank=index)\n"
        "if index == 0 and attempt == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "live()",
        members=2,
    )
    assert group.run(lambda group: len(group.names(0)) == 2 and len(group.names(1)) == 1) == 143
    (line,) = group.heard.lost()
    assert "at update 1: killed by SIGKILL; starting it again" in line
    assert len(group.names(1)) == 1


@pytest.mark.parametrize("code", [64, 65, 66])
def test_a_permanent_end_of_one_ends_all(tmp_path: Path, code: int) -> None:
    group = Group(
        tmp_path,
        f"""
drain()
beat()
if index == 1:
    print("demoreset: this is wrong", file=sys.stderr)
    sys.exit({code})
live()
""",
        members=3,
    )
    assert group.run() == code
    assert not group.heard.lost()
    assert group.supervisor.error is not None
    assert group.supervisor.error.message == "this is wrong"


@pytest.mark.parametrize("code", [0, 2])
def test_an_end_of_the_run_waits_for_the_others_then_asks_them_then_kills_them(
    tmp_path: Path, code: int
) -> None:
    group = Group(
        tmp_path,
        f"""
beat()
if index == 0:
    sys.exit({code})
if index == 1:
    time.sleep(0.1)
    open("by-itself", "w").close()
    sys.exit({code})
if index == 2:
    def asked(*_):
        open("asked", "w").close()
        sys.exit(143)
    signal.signal(signal.SIGTERM, asked)
if index == 3:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
live()
""",
        members=4,
        limits=Limits(grace=0.5, finish=1.5),
    )
    assert group.run() == code
    assert (tmp_path / "by-itself").exists()
    assert (tmp_path / "asked").exists()
    assert group.heard.lost() == []


@pytest.mark.parametrize(
    "stands", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"], ids=["hang", "freeze"]
)
def test_one_that_stands_still_is_killed_and_started_anew(tmp_path: Path, stands: str) -> None:
    group = Group(
        tmp_path, f"drain(); progress(7)\nif attempt == 1: {stands}\nprogress(8); live(update=8)"
    )
    assert group.run(lambda group: group.updated(8)) == 143
    (line,) = group.heard.lost()
    assert line.endswith("at update 7: hung: no beat for 0.6 s; starting it again")
    error = group.supervisor.error
    assert error is not None
    if "sleep" in stands:  # it says where it stands; one that is frozen cannot
        assert any("most recent call first" in said for said in error.lines), error.lines
        assert list(group.stood) == group.names()[:1]
        assert any("most recent call first" in said for said in group.stood[group.names()[0]])
        assert not any("most recent call first" in said for said in group.written), "a screenful"


@pytest.mark.parametrize(
    ("phase", "kept"), [("quorum", True), ("confirm", False), ("aside", False)]
)
def test_one_that_beats_without_an_update_says_where_it_stands_when_asked_to_stop(
    tmp_path: Path, phase: str, kept: bool
) -> None:
    group = Group(
        tmp_path,
        f"""
import faulthandler
drain(); faulthandler.register(signal.SIGUSR1); progress(7)
def stand():
    while True:
        beat(7, {phase!r}); time.sleep(0.02)
stand()
""",
        limits=Limits(hang=300, grace=5, jump=300),  # however late it is heard, it is no hang
    )

    def long_after(group: Group) -> bool:
        beats = bool(group.supervisor.members) and group.supervisor.members[0].phase == phase
        if group.jump > 130:  # no more jumps: it has the whole grace time to stop
            return True
        group.jump += 10 if beats else 0
        return False

    assert group.run(long_after) == 143
    assert any("in stand" in said for lines in group.stood.values() for said in lines) == kept
    assert any("stood still: where, is in hangs/" in note for note in group.heard.notes) == kept


@pytest.mark.parametrize(("update", "others"), [(0, "aside"), (3, "rollout")])
def test_one_that_sits_out_is_told_of_and_the_group_speaks_through_the_others(
    tmp_path: Path, update: int, others: str
) -> None:
    group = Group(
        tmp_path,
        f"""
drain()
if {update}: progress({update}, rank=index)
while True:
    beat({update}, "aside" if index == 0 else {others!r}); time.sleep(0.02)
""",
        members=2 if update else 1,
    )

    def told(group: Group) -> bool:
        states = list(group.heard.seen[-1].values()) if group.heard.seen else []
        return states == ["aside", "training"][: len(states)] and group.heard.phases[-1:] == [
            others
        ]

    assert group.run(told) == 143


def test_before_its_first_beat_a_member_has_more_time(tmp_path: Path) -> None:
    group = Group(tmp_path, "drain(); time.sleep(1.2); progress(1); live()")
    assert group.run(lambda group: group.updated(1)) == 143
    assert len(group.names()) == 1


def test_one_that_is_never_ready_is_killed(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain()\nif attempt == 1: time.sleep(60)\nprogress(1); live()",
        limits=Limits(hang=5, start=0.5, grace=0.5),
    )
    assert group.run(lambda group: group.updated(1)) == 143
    assert "hung: not ready after 0.5 s" in group.heard.lost()[0]


def test_a_supervisor_that_was_frozen_itself_kills_nobody(tmp_path: Path) -> None:
    group = Group(tmp_path, "drain(); progress(1); live(update=1)", members=2)

    def jumped(group: Group) -> bool:
        if group.updated(1):
            group.jump += 100
        return group.jump >= 1000

    assert group.run(jumped) == 143
    assert group.heard.lost() == []


def test_the_same_update_three_times_is_enough(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        """
drain()
if index == 0:
    live()
for update in range(attempt, 5):
    progress(update, rank=1)
raise ValueError("poison")
""",
        members=2,
    )
    assert group.run() == 66
    assert len(group.names(1)) == 3
    assert len(group.names(0)) == 1
    assert "not again" in group.heard.lost()[-1]
    assert str(group.supervisor.error) == ("update 5 failed 3 times; the last: ValueError: poison")
    assert group.supervisor.error is not None
    assert group.supervisor.error.lines[-1] == "ValueError: poison"


def test_those_whom_a_volume_holds_up_do_not_make_an_update_hopeless(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        """
drain()
if attempt == 1:
    progress(500); os.kill(os.getpid(), signal.SIGKILL)
if attempt == 2:
    time.sleep(60)  # its folder does not answer
if attempt in (3, 4):
    beat(phase="quorum"); time.sleep(60)  # nor do its checkpoints
progress(501); live(update=501)
""",
        limits=replace(LIMITS, start=0.5),
    )
    assert group.run(lambda group: group.updated(501)) == 143
    assert len(group.heard.lost()) == 4


def test_one_that_is_killed_from_outside_is_started_again_however_often(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); progress(4)\n"
        "if attempt < 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "progress(5); live(update=5)",
    )
    assert group.run(lambda group: group.updated(5)) == 143
    assert len(group.heard.lost()) == 4


def test_deaths_at_one_update_and_then_another_are_not_the_updates_fault(tmp_path: Path) -> None:
    group = Group(tmp_path, "drain(); progress(attempt)\nif attempt < 5: sys.exit(1)\nlive()")
    assert group.run(lambda group: group.updated(5)) == 143
    assert len(group.heard.lost()) == 4


def test_a_place_that_is_late_after_all_died_is_not_given_up_while_the_others_catch_up(
    tmp_path: Path,
) -> None:
    group = Group(
        tmp_path,
        """
drain()
if attempt == 1:
    progress(1000, rank=index)
    time.sleep(0.1)
    os._exit(1)
if index == 1 and attempt < 5:
    time.sleep(0.1)
    os._exit(1)
for update in range(501, 900):  # the checkpoint was of update 500
    progress(update, rank=index, life=2)
    beat(update)
    time.sleep(0.03)
live()
""",
        members=2,
    )
    code = group.run(lambda group: len(group.names(1)) == 5 and group.updated(600))
    assert code == 143, group.heard.notes


def test_what_is_away_for_now_is_tried_again_later_each_time(tmp_path: Path) -> None:
    group = Group(tmp_path, "if attempt < 3: sys.exit(75)\ndrain(); progress(1); live()")
    assert group.run(lambda group: group.updated(1)) == 143
    endings = [line.rpartition("; ")[2] for line in group.heard.lost()]
    assert endings == ["starting it again", "starting it again in 1 s"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_all_and_kills_the_deaf(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    group = Group(
        tmp_path,
        """
def asked(*_):
    open("asked", "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, asked if index == 0 else signal.SIG_IGN)
progress(1, rank=index)
live()
""",
        members=2,
    )
    group.number = number
    assert group.run(Group.all_train) == code
    assert (tmp_path / "asked").exists()
    assert group.heard.lost() == []
    (line,) = [note for note in group.heard.notes if "did not stop well" in note]
    assert group.names(1)[0] in line
    assert {"stopping"} <= {state for states in group.heard.seen for state in states.values()}


def test_a_goal_that_is_met_while_all_stop_is_met(tmp_path: Path) -> None:
    group = Group(tmp_path, "signal.signal(15, lambda *_: os._exit(0)); progress(1); live()")
    assert group.run(lambda group: group.updated(1)) == 0


def test_ctrl_c_does_not_reach_the_members(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); progress(1); os.kill(os.getpid(), signal.SIGINT); live(0.3); progress(2); live()",
    )
    assert group.run(lambda group: group.updated(2)) == 143
    assert group.heard.lost() == []


def test_what_all_members_say_is_told_once(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        "drain(); note('the start was reached', 5); note('a word of my own', 5 + index)\n"
        "progress(6, rank=index); live()",
        members=3,
    )

    def all_told(group: Group) -> bool:
        return sum("own" in note for note in group.heard.notes) == 3

    assert group.run(all_told) == 143
    assert group.heard.notes.count("the start was reached") == 1


def test_the_first_of_its_members_speaks_and_a_generation_is_one_line(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        """
drain()
if index == 1:
    while not os.path.exists("said"):
        live(0.02)
    rank = 4
else:
    rank = 3
for update in range(1, 4):
    progress(update, rank=rank, members=5, generation=2)
open("said", "w").close()
if index == 0:
    live(0.3)
    os._exit(75)
if attempt == 1:
    live(1.5)
    progress(4, rank=3, members=4, generation=3)
live()
""",
        members=2,
    )
    assert group.run(lambda group: group.updated(4)) == 143
    assert [(told.update, told.rank) for told in group.heard.updates][:3] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert group.heard.updates[-1].update == 4
    generations = [note for note in group.heard.notes if note.startswith("generation")]
    assert generations == [
        "generation 2: 5 members, at update 1",
        "generation 3: 4 members, at update 4",
    ]


def test_a_worker_is_starting_until_a_member_has_done_an_update(tmp_path: Path) -> None:
    """By this the operator tells who loads from who stands still, whatever phase its loop is in."""
    group = Group(
        tmp_path,
        """
drain()
live(0.3)
progress(1, rank=1)
while True:
    beat(2, phase="wait")
    time.sleep(0.02)
""",
    )
    assert group.run(lambda group: group.heard.phases.count("wait") > 2) == 143
    told = group.heard.phases
    before = told.index("wait")
    assert before > 0
    assert told[0] == "starting"
    assert set(told[:before]) <= {"starting", "rollout"}
    assert told[before:] == ["wait"] * (len(told) - before)


def test_updates_that_went_with_all_who_knew_them_are_counted(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        """
drain()
if attempt == 1:
    for update in range(1, 121):
        progress(update)
    os._exit(1)
for update in range(101, 122):  # the checkpoint was of update 100
    progress(update, life=2)
live()
""",
    )
    assert group.run(lambda group: group.updated(121)) == 143
    assert group.supervisor.updates_lost == 20
    assert "back at update 100: 20 were lost with all members" in group.heard.notes
    assert group.heard.notes[-1] == "generation 1: 1 member, at update 101"
    assert group.supervisor.furthest == 121


def test_of_what_a_member_writes_the_last_lines_are_kept(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        """
for i in range(30):
    print("line", i, file=sys.stderr)
sys.stderr.buffer.write(b"torn \\xff")
sys.stderr.flush()
os._exit(64)
""",
    )
    assert group.run() == 64
    assert len(group.written) == 31
    assert group.written[0].endswith("] line 0")
    error = group.supervisor.error
    assert error is not None
    assert len(error.lines) == 20
    assert error.lines[-1] == "torn �"


def test_lines_on_the_wire_that_are_torn_or_strange_do_no_harm(tmp_path: Path) -> None:
    group = Group(
        tmp_path,
        r"""
drain()
wire.write(b'{"kind": "beat"\n\n[]\n{"kind": "what"}\n\xff\xfe\n')
wire.write(b'{"kind": "progress", "update": 1}\n')
progress(2); live()
""",
    )
    assert group.run(lambda group: group.updated(2)) == 143
    assert group.heard.lost() == []


def test_a_program_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    heard = Listener()
    supervisor = Supervisor(
        "w",
        1,
        lambda index, name: [str(tmp_path / "nothing")],
        heard,
        stopping=lambda: signal.SIGTERM if heard.notes else None,
        say=lambda text: None,
    )
    assert supervisor.run() == 143
    assert "cannot be started" in heard.notes[0]


def test_nothing_is_left_of_members_that_are_lost(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    group = Group(tmp_path, "drain(); progress(attempt)\nif attempt < 8: os._exit(1)\nlive()")
    assert group.run(lambda group: group.updated(8)) == 143
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("environment", "nodes", "found"),
    [
        ({}, [], []),
        ({}, ["/dev/nvidia0", "/dev/nvidia1"], ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3, 5"}, ["/dev/nvidia0"], ["3", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-4f"}, [], ["GPU-4f"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["/dev/nvidia0"], []),
    ],
)
def test_devices(environment: dict[str, str], nodes: list[str], found: list[str]) -> None:
    assert devices(environment, [Path(node) for node in nodes]) == found


@pytest.mark.parametrize(
    ("members", "index", "device", "its_cores"),
    [(1, 0, "4", cores()), (2, 1, "7", max(1, cores() // 2)), (999, 3, "7", 1)],
)
def test_a_member_has_its_share_of_the_machine(
    members: int, index: int, device: str, its_cores: int
) -> None:
    environment = share({"CUDA_VISIBLE_DEVICES": "4,7", "HOME": "/"}, index, members)
    assert environment == SETTINGS | {
        "CUDA_VISIBLE_DEVICES": device,
        "HOME": "/",
        "DEMORESET_CORES": str(its_cores),
    }


def test_what_the_environment_says_already_stays_so() -> None:
    told = {"RUST_LOG": "debug", "CUDA_VISIBLE_DEVICES": ""}
    assert share(told, 0, 1) == SETTINGS | told | {"DEMORESET_CORES": str(cores())}


@pytest.mark.parametrize(("told", "members", "each"), [(5, 1, 5), (5, 2, 2), (1, 3, 1)])
def test_members_share_the_cores_that_their_worker_was_told(
    told: int, members: int, each: int
) -> None:
    environment = share({"DEMORESET_CORES": str(told)}, 0, members)
    assert environment["DEMORESET_CORES"] == str(each)
