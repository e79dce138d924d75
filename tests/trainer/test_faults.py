"""Faults from the inside, in real groups: rows of the fault matrix (`benchmarks/`), tried once."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGABRT, SIGKILL, SIGSEGV, SIGSTOP, SIGTERM

import pytest

import faults_disk
import faults_inside
import faults_members
import injured
from measure import tree

pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

PATIENCE = 60.0  # seconds for anything; never what is measured
PARENT = """
import time
from demoreset_trainer.demo import find, load
from demoreset_trainer.env import Rules
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import View

if __name__ == "__main__":
    demo = load(find("freeway-crossing"))
    slots = Slots(demo, Rules(), View(), slots=1, processes=1).ready()
    print(*slots.pids, flush=True)
    time.sleep(1000)
"""


def test_members_die_in_every_way_and_nothing_is_lost_or_left() -> None:
    strikes: list[Callable[[injured.Injured], object]] = [
        *(faults_members.by_signal(number) for number in (SIGSEGV, SIGABRT, SIGTERM, SIGKILL)),
        faults_members.by_signal(SIGKILL, first=True),
        lambda run: faults_inside.hung(run, faults_inside.hold_lock),
    ]
    processes: set[int] = set()
    with injured.group(environment=faults_inside.inside()) as run:
        run.whole()
        open_files = len(os.listdir(f"/proc/{run.process.pid}/fd"))
        for strike in strikes:
            run.whole()
            processes |= set(tree(run.process.pid))  # of who is lost others are the parents
            strike(run)
        run.whole()
        # What it has open for a member goes with the member.
        assert len(os.listdir(f"/proc/{run.process.pid}/fd")) <= open_files
        processes |= set(tree(run.process.pid))
    found = injured.check(run.events)
    assert found["updates"] > 10 * len(strikes)
    assert (found["updatesLost"], found["forks"]) == (0, 0)
    assert faults_inside.gone(list(processes), PATIENCE)


@pytest.mark.parametrize("name", ["first-saving", "drained-saving"])
def test_the_first_member_is_struck_in_the_middle_of_a_save(name: str) -> None:
    outcome = faults_members.ROWS[name].measure(1)
    assert outcome.n == 1
    assert outcome.failures == []
    assert (outcome.facts["updatesLost"], outcome.facts["forks"]) == (0, 0)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root mounts")
def test_a_group_trains_on_while_its_disk_is_full() -> None:
    try:
        outcome = faults_disk.ROWS["full"].measure(1)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to mount: {error}")
    assert outcome.n == 1
    assert outcome.failures == []
    assert (outcome.facts["updatesLost"], outcome.facts["forks"]) == (0, 0)


def test_members_come_and_go_and_every_update_has_all_of_its_frames() -> None:
    outcome = faults_inside.changing(1, (3, 2))
    assert outcome.failures == []
    assert (outcome.facts["updatesLost"], outcome.facts["forks"]) == (0, 0)
    assert outcome.facts["framesDrift"] == 0


@pytest.mark.parametrize("name", ["inf-gradient", "crash"])
def test_a_fault_inside_members(name: str) -> None:
    outcome = faults_inside.ROWS[name].measure(1)
    assert outcome.n
    assert outcome.failures == []
    assert outcome.facts["updatesLost"] == 0
    assert outcome.facts.get("forks", 0) == 0


def test_an_environment_that_hangs_ends_with_its_member(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    environment = int(parent.stdout.readline())
    os.kill(environment, SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{environment}").exists():
        state = Path(f"/proc/{environment}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        assert time.monotonic() < deadline, f"it is there still, in state {state}"
        time.sleep(0.05)
