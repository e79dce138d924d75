"""Faults from the inside, in real groups: rows of the fault matrix (`benchmarks/`), tried once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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


@pytest.mark.parametrize("name", ["inf-gradient", "crash"])
def test_a_fault_inside_members(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import faults_inside

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
    os.kill(environment, signal.SIGSTOP)
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
