"""`demoreset worker` and `run --members`, for real: what is lost comes back, and all of it ends."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import faults_inside
from demoreset_api.errors import UserError
from demoreset_trainer import checkpoint, lives, metrics, runfile, summary
from demoreset_trainer.cli_group import met_on_disk
from demoreset_trainer.cli_worker import MAX_BYTES, leave_words, met_before, whereabouts
from demoreset_trainer.local_coordinator import PORTS, free_port
from demoreset_trainer.report import standing
from demoreset_trainer.restart import LastError
from demoreset_trainer.runfile import read
from small_progress import PROGRESS

CROSSING = Path(__file__).parents[2] / "demos" / "freeway-crossing.yaml"
PATIENCE = 120.0  # seconds until a test counts as stuck
SMALL = [
    *("--set", "spec.environment.slots=8", "--set", "spec.environment.processes=1"),
    *("--set", "spec.ppo.rolloutLength=16", "--set", "spec.goal.episodes=100000"),
]
NAMES = (
    *("DEMORESET_COORDINATOR", "DEMORESET_ADDRESS", "DEMORESET_ID", "DEMORESET_TERMINATION_LOG"),
    *("DEMORESET_GRACE_SECONDS", "DEMORESET_HANG_SECONDS", "DEMORESET_START_SECONDS"),
)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the tests says nothing of where we are."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("flags", "environment", "found"),
    [
        (("c:1", "10.0.0.7"), {}, ("c:1", "10.0.0.7")),
        ((None, None), {NAMES[0]: "c:1", NAMES[1]: "10.0.0.7"}, ("c:1", "10.0.0.7")),
        (("d:2", "10.0.0.8"), {NAMES[0]: "c:1", NAMES[1]: "10.0.0.7"}, ("d:2", "10.0.0.8")),
        (("localhost:1", None), {}, ("localhost:1", "127.0.0.1")),
        (("127.0.0.1:1", None), {}, ("127.0.0.1:1", "127.0.0.1")),
        (("[::1]:1", None), {}, ("[::1]:1", "127.0.0.1")),
        (("127.0.0.1:1", "10.0.0.7"), {}, ("127.0.0.1:1", "10.0.0.7")),
    ],
)
def test_where_it_is_told_to_be(
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str | None, str | None],
    environment: dict[str, str],
    found: tuple[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert whereabouts(*flags) == found


@pytest.mark.parametrize(
    ("coordinator", "address", "message"),
    [
        (None, "10.0.0.7", "--coordinator: missing.*DEMORESET_COORDINATOR"),
        ("coordinator", "10.0.0.7", "--coordinator.*received 'coordinator'; it is host:port"),
        (":1", "10.0.0.7", "received ':1'"),
        ("c:x", "10.0.0.7", "received 'c:x'"),
        ("c:65536", "10.0.0.7", "received 'c:65536'"),
        ("c:1", None, "--address: missing.*DEMORESET_ADDRESS"),
    ],
)
def test_it_never_guesses_where_it_is(
    coordinator: str | None, address: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        whereabouts(coordinator, address)


def test_its_last_error_fits_where_the_kubelet_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "log"
    monkeypatch.setenv("DEMORESET_TERMINATION_LOG", str(place))
    error = LastError("ValueError", "7", tuple(f"{number} " + "€" * 300 for number in range(20)))
    leave_words(error.report(MAX_BYTES))
    content = place.read_bytes()
    assert MAX_BYTES - 1000 < len(content) <= MAX_BYTES
    assert content.startswith(b"ValueError: 7\n")
    assert content.decode().splitlines()[-1].startswith("19 ")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "demoreset_trainer.cli", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--coordinator: missing"),
        (("--coordinator", "127.0.0.1:1", "--set", "spec.seed=-1"), "spec.seed: received -1"),
        (("--coordinator", "127.0.0.1:1", "--members", "0"), "--members: received 0"),
        (
            ("--coordinator", "127.0.0.1:1", "--address", "203.0.113.7"),
            "--address (or DEMORESET_ADDRESS) 203.0.113.7: cannot listen there",
        ),
    ],
)
def test_a_users_mistake_is_told_in_a_line_and_to_the_kubelet(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    log = tmp_path / "log"
    done = subprocess.run(
        command("worker", "-f", CROSSING, "--dir", tmp_path / "run", *arguments),
        env=os.environ | {"DEMORESET_TERMINATION_LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert message in log.read_text()
    assert "UserError" not in log.read_text()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"goal": {"met": True}, "playing_on": False}, True),
        ({"goal": {"met": False}, "playing_on": False}, False),
        ({"goal": {"met": True}, "playing_on": False, "spec": {"goal": {}}}, False),
        ({"goal": {"met": True}, "playing_on": False, "spec": {}}, False),
        ({}, False),
        (None, False),
    ],
)
def test_whether_the_goal_is_met_already(tmp_path: Path, state: Any, expected: bool) -> None:
    spec = read(CROSSING).spec
    demo = runfile.load_demo(spec, CROSSING)
    assert met_on_disk(tmp_path, spec, demo) is None
    goal = {
        "spec": spec.model_dump(mode="json", by_alias=True),
        "demo": {"game": demo.game, "sha256": demo.sha256},
    }
    for name, content in (("u0000000007", None), ("u0000000008", state)):
        folder = tmp_path / "checkpoints" / f"ckpt-l000001-{name}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(
            "torn" if content is None else json.dumps(goal | content)
        )
    assert (met_on_disk(tmp_path, spec, demo) is not None) is expected


def test_a_worker_whose_run_was_done_before_says_how_it_stands() -> None:
    """A run that is applied again, over a volume that was kept, has a status without any poll."""
    counters = {"update": 9, "frames": 700, "seconds": 8.5, "episodes": 3}
    state = {
        "life": 2,
        "counters": counters | {"resumed_life": 1, "resumed_update": 4, "resumed_frames": 300},
        "goal": {
            "met": True,
            "latest": [True, True, True, False],
            "evaluation": {"update": 9, "episodes": 100, "successes": 93},
        },
    }
    told = met_before(state, 356)
    assert (told["update"], told["frames"], told["seconds"], told["life"]) == (9, 700, 8.5, 2)
    assert told["resumed"] == {"life": 1, "update": 4, "frames": 300}
    assert told["curriculum"]["goalRate"] == 0.75
    assert told["evaluation"] == {"update": 9, "episodes": 100, "successRate": 0.93}
    same = standing(PROGRESS)
    assert told.keys() <= same.keys()
    assert all(
        part.keys() <= same[key].keys() for key, part in told.items() if isinstance(part, dict)
    )


def test_what_keeps_members_running_needs_no_torch() -> None:
    modules = ("cli_worker", "cli_group", "cli_coordinator", "summary", "runfile", "watch")
    imports = "; ".join(f"import demoreset_trainer.{module}" for module in modules)
    check = f"{imports}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_free_port_is_none_that_the_kernel_gives_to_clients() -> None:
    assert free_port() in PORTS


class Running:
    """A command that runs, in a session of its own as under a terminal."""

    def __init__(self, output: Path, *arguments: object) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command(*arguments), stdout=file, stderr=file, start_new_session=True
            )
        self.port = 0

    def said(self) -> str:
        return self.output.read_text()

    def until(self, what: str, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"{what}: {self.said()}"
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        if not self.port:
            self.until("a port", lambda: re.search(r"on port (\d+)\n", self.said()))
            self.port = int(re.findall(r"on port (\d+)\n", self.said())[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status") as answer:
            status: dict[str, Any] = json.load(answer)
            return status

    def train(self, members: int) -> dict[str, Any]:
        """Wait until so many members train together, and an update is done by them."""
        found: list[dict[str, Any]] = []

        def trains() -> bool:
            found.append(self.status())
            states = [member["state"] for member in found[-1]["members"]]
            return states == ["training"] * members and found[-1].get("update", 0) > 0

        self.until(f"{members} members", trains)
        return found[-1]

    def children(self) -> dict[int, list[str]]:
        """The processes that it started itself, by what they run."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                words = (stat.parent / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if parent == self.process.pid:
                found[int(stat.parent.name)] = words
        return found

    def session(self) -> list[int]:
        """All processes that came of it."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def send(self, number: int) -> None:
        """A signal to all processes that came of it."""
        for pid in self.session():
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(pid, number)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*arguments: object) -> Running:
        started.append(Running(tmp_path / f"output-{len(started)}", *arguments))
        return started[-1]

    yield start
    for running in started:
        running.send(signal.SIGKILL)
        running.process.wait()


def test_a_group_regains_its_first_member_and_its_coordinator_and_stops_on_ctrl_c(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    folder = tmp_path / "run"
    group = start(*("run", "-f", CROSSING, "--members", 2, "--dir", folder, "--port", 0, *SMALL))
    first = group.train(2)["members"][0]
    os.kill(first["pid"], signal.SIGKILL)
    group.until("a loss", lambda: "lost member" in group.said())
    (lost,) = [line for line in group.said().splitlines() if line.startswith("lost member")]
    assert lost.startswith(f"lost member {first['id']} (pid {first['pid']}) at update ")
    assert lost.endswith(": killed by SIGKILL; starting it again")
    (coordinator,) = [pid for pid, words in group.children().items() if "coordinator" in words]
    os.kill(coordinator, signal.SIGKILL)
    group.until("another", lambda: "lost the coordinator" in group.said())
    group.until("the new one", lambda: first["id"] not in str(group.status()["members"]))
    group.train(2)
    (coordinator,) = [pid for pid, words in group.children().items() if "coordinator" in words]
    os.kill(coordinator, signal.SIGSTOP)
    group.until("a third", lambda: f"coordinator (pid {coordinator}) stands" in group.said())
    before = group.status()["update"]
    group.until("an update", lambda: group.status()["update"] > before)
    os.killpg(group.process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    assert group.process.wait(timeout=60) == 130
    assert not group.session()
    said = group.said()
    assert "Traceback" not in said
    assert said.count("lost member") == 1
    assert said.count("Ctrl-C: this update is finished, then a checkpoint is written") == 1
    assert re.search(
        r"^Stopped after .*; saved\. Go on with: .* --members 2 --port 0$", said, re.MULTILINE
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["recoveries"] >= 2
    assert summary["updatesLost"] == 0
    assert 0 <= summary["goodput"] < 1  # of its few seconds most were lost
    updates = [line["update"] for line in metrics.read(folder / metrics.NAME)]
    assert updates == list(range(1, summary["updates"] + 1))
    assert any(
        f"u{summary['updates']:010d}" in path.name for path in (folder / "checkpoints").iterdir()
    )


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a worker finds in its environment; where its last words are."""
    port = free_port()
    process = subprocess.Popen(
        command("coordinator", "--port", port, "--host", "127.0.0.1"), stderr=subprocess.DEVNULL
    )
    monkeypatch.setenv("DEMORESET_COORDINATOR", f"127.0.0.1:{port}")
    monkeypatch.setenv("DEMORESET_ID", "crossing-w1")
    monkeypatch.setenv("DEMORESET_TERMINATION_LOG", str(tmp_path / "log"))
    yield tmp_path / "log"
    process.kill()
    process.wait()


def test_a_worker_finds_the_coordinator_and_drains_on_sigterm(
    tmp_path: Path, start: Callable[..., Running], coordinator: Path
) -> None:
    one_each = ("--set", "spec.environment.slots=4", "--set", "spec.environment.processes=4")
    worker = start(
        *("worker", "-f", CROSSING, "--dir", tmp_path / "run", "--port", 0, *SMALL, *one_each)
    )
    (member,) = worker.train(1)["members"]
    assert re.fullmatch(r"crossing-w1-0-[0-9a-f]{8}", member["id"])
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in worker.session()]
    assert not [one for one in commands if "spawn_main" in one], "emulators are made once for all"
    worker.process.terminate()
    assert worker.process.wait(timeout=60) == 143
    assert not worker.session()
    assert not coordinator.exists()


def test_a_worker_whose_grace_is_short_leaves_in_the_middle_of_an_update(
    tmp_path: Path,
    start: Callable[..., Running],
    coordinator: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEMORESET_GRACE_SECONDS", "3")
    folder = tmp_path / "run"
    slow = ("--set", "spec.ppo.rolloutLength=1024", "--set", "spec.ppo.epochs=1")
    worker = start("worker", "-f", CROSSING, "--dir", folder, "--port", 0, *SMALL, *slow)
    update = worker.train(1)["update"]
    worker.process.terminate()
    assert worker.process.wait(timeout=60) == 143, worker.said()
    assert "did not stop well" not in worker.said()
    assert summary.saved(folder / "checkpoints") == update


def test_a_worker_that_was_frozen_while_the_run_began_anew_spoils_nothing(
    tmp_path: Path,
    start: Callable[..., Running],
    coordinator: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frozen with all of its processes when its checkpoint had its name, and was no best yet."""
    for name, value in faults_inside.inside(what="slow-disk", seconds=0.3).items():
        monkeypatch.setenv(name, value)
    checkpoints = tmp_path / "run" / "checkpoints"
    words = ["worker", "-f", CROSSING, "--dir", tmp_path / "run", "--port", 0, *SMALL]
    words += ["--set", "spec.checkpoint.intervalSeconds=1"]

    def best() -> str:
        found = checkpoint.best(checkpoints)
        return found.name if found is not None else ""

    def saved() -> list[str]:
        return sorted(path.name for path in checkpoints.glob("ckpt-*"))

    frozen = start(*words, "--id", "frozen")
    frozen.train(1)  # it is the first, and saves
    lost = start(*words, "--id", "lost")
    frozen.train(2)
    frozen.until("a best", best)
    deadline = time.monotonic() + PATIENCE
    while True:  # until it was faster than the mark
        known = saved()
        while saved()[-1] == known[-1]:
            assert time.monotonic() < deadline, frozen.said()
            time.sleep(0.01)
        frozen.send(signal.SIGSTOP)
        if best() != saved()[-1]:
            break
        frozen.send(signal.SIGCONT)
    lost.send(signal.SIGKILL)
    new = start(*words, "--id", "new")
    new.until("a best of the new life", lambda: best().startswith("ckpt-l000002"))
    frozen.send(signal.SIGCONT)

    def gives_up() -> bool:
        assert best().startswith("ckpt-l000002"), frozen.said()
        return "life 2, this is life 1" in frozen.said()

    frozen.until("the end of its save", gives_up)
    new.train(2)  # it has what the others know, and goes on with them
    for worker in (frozen, new):
        worker.process.terminate()
    for worker in (frozen, new):
        assert worker.process.wait(timeout=PATIENCE) == 143, worker.said()
    newest = checkpoint.newest(checkpoints)
    assert newest is not None
    assert newest.name == saved()[-1]
    assert checkpoint.read(newest).life == checkpoint.read(checkpoints / best()).life == 2
    assert not faults_inside.unsound(tmp_path / "run")


def test_workers_of_two_coordinators_do_not_take_a_run_from_one_another(
    tmp_path: Path, start: Callable[..., Running], coordinator: Path
) -> None:
    """As on two sides of a network that is cut in two, while both reach the volume."""
    elsewhere = free_port()
    start("coordinator", "--port", elsewhere, "--host", "127.0.0.1")
    words = ["worker", "-f", CROSSING, "--dir", tmp_path / "run", "--port", 0, *SMALL]
    words += ["--set", "spec.checkpoint.intervalSeconds=1"]
    two = ("--set", "spec.workers.membersPerWorker=2")  # who goes leaves no state to the other
    first = start(*words, *two, "--id", "first")
    first.train(2)
    second = start(*words, "--id", "second", "--coordinator", f"127.0.0.1:{elsewhere}")
    second.train(1)
    first.until("it is kept out", lambda: "others train this run now" in first.said())
    assert second.train(1)["life"] == 2, "it was left alone"
    second.send(signal.SIGKILL)
    first.until("its turn", lambda: first.status().get("life") == 3)
    first.train(2)


def test_a_run_whose_end_could_not_be_saved_is_not_over(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    folder = tmp_path / "run"
    spent = ("--set", "spec.budget.frames=10000", "--set", "spec.checkpoint.intervalSeconds=1000")
    run = start("run", "-f", CROSSING, "--dir", folder, "--port", 0, *SMALL, *spent)
    run.until("a checkpoint", lambda: summary.saved(folder / "checkpoints"))
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert run.process.wait(timeout=PATIENCE) == 75, run.said()
    assert f"demoreset: {summary.NOT_KEPT}: " in run.said()
    first = summary.saved(folder / "checkpoints")
    says = f"NOT saved: the checkpoint is of update {first}. Go on with: demoreset run"
    assert says in run.said()


def test_a_group_begins_with_all_of_its_members(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    """Its first updates are else those of whoever came first, another time of another."""
    words = ["--set", "spec.budget.frames=2000", "--members", 3]
    run = start("run", "-f", CROSSING, "--dir", tmp_path / "run", *SMALL, *words)
    assert run.process.wait(timeout=PATIENCE) == 2, run.said()
    lines = metrics.read(tmp_path / "run" / metrics.NAME)
    assert (lines[0]["generation"], lines[0]["members"]) == (1, 3)
    assert json.loads((tmp_path / "run" / summary.NAME).read_text())["recoveries"] == 0


def test_ctrl_c_twice_leaves_word_of_how_a_group_ended(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    words = ["--port", 0, "--members", 2]
    run = start("run", "-f", CROSSING, "--dir", tmp_path / "run", *SMALL, *words)
    update = run.train(2)["update"]
    for _ in range(2):
        run.send(signal.SIGINT)
        time.sleep(0.01)
    assert run.process.wait(timeout=PATIENCE) == 130, run.said()
    found = json.loads((tmp_path / "run" / summary.NAME).read_text())
    assert (found["exitCode"], found["members"], found["interrupted"]) == (130, 2, True)
    assert found["updates"] >= update


def test_two_commands_do_not_train_in_one_folder(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    folder = tmp_path / "run"
    first = start("run", "-f", CROSSING, "--dir", folder, "--port", 0, *SMALL)
    first.train(1)
    for more in ((), ("--members", 2), ("--fresh",)):
        second = subprocess.run(
            command("run", "-f", CROSSING, "--dir", folder, *SMALL, *more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 64
        assert f"{folder}: process {first.process.pid} trains there" in second.stderr
    assert first.process.poll() is None


def test_what_another_worker_writes_is_waited_for(tmp_path: Path) -> None:
    kept = partial(summary.kept, tmp_path, 1, 7, patience=0)
    assert not kept()
    for life, update, whether in ((1, 6, False), (1, 7, True), (2, 3, False)):
        path = tmp_path / "checkpoints" / lives.checkpoint_name(life, update)
        path.mkdir(parents=True)
        assert kept() is whether
        path.rmdir()


def test_a_worker_that_is_done_leaves_how_the_run_stands(
    tmp_path: Path, start: Callable[..., Running], coordinator: Path
) -> None:
    spent = ("--set", "spec.budget.frames=1500")
    worker = start("worker", "-f", CROSSING, "--dir", tmp_path / "run", "--port", 0, *SMALL, *spent)
    assert worker.process.wait(timeout=PATIENCE) == 2
    stands = json.loads(coordinator.read_text())
    assert stands["update"] == 3
    assert stands["frames"] >= 1500
    assert (stands["life"], stands["resumed"]) == (
        1,
        {"life": 0, "update": 0, "frames": 0},
    )
    assert stands["curriculum"]["demoFrames"] > 0
    assert stands["evaluation"]["episodes"] is None
