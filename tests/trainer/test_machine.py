"""What a process may use of the machine: what it was told, its affinity, its container's quota."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demoreset_api.errors import UserError
from demoreset_api.spec import EnvironmentSpec
from demoreset_trainer import machine
from demoreset_trainer.machine import (
    cores,
    cores_each,
    emulators_per_process,
    environment_processes,
)

V1 = {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("files", "allowed", "wanted"),
    [
        ({}, 8, 8),
        ({"cpu.max": "max 100000\n"}, 8, 8),
        ({"cpu.max": "150000 100000\n"}, 8, 2),  # one and a half: two threads, half of them idle
        ({"cpu.max": "20000 100000\n"}, 8, 1),
        ({"cpu.max": "400000 100000\n"}, 3, 3),
        ({"cpu.max": "nonsense\n"}, 3, 3),
        (V1, 8, 3),
        (V1 | {"cpu/cpu.cfs_quota_us": "-1"}, 8, 8),
    ],
)
def test_cores_follow_the_affinity_and_the_quota(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: dict[str, str],
    allowed: int,
    wanted: int,
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    assert cores({}) == wanted
    assert cores({"DEMORESET_CORES": "5"}) == 5


def test_cores_that_are_no_number_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^DEMORESET_CORES: received '2.5'; it is a whole number$"):
        cores({"DEMORESET_CORES": "2.5"})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has affinities")
def test_a_process_that_is_kept_on_one_core_has_one() -> None:
    script = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from demoreset_trainer.machine import cores; print(cores({}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize(
    ("slots", "cores", "said", "processes", "emulators"),
    [
        (64, 1, None, 2, 32),
        (64, 2, None, 2, 32),
        (64, 8, None, 8, 8),
        (1024, 2, None, 4, 256),
        (65, 2, None, 3, 22),
        (4, 8, None, 4, 1),
        (64, 8, 1, 1, 64),
        (3, 2, 8, 3, 1),
    ],
)
def test_a_process_begins_with_the_emulators_that_it_needs(
    slots: int, cores: int, said: int | None, processes: int, emulators: int
) -> None:
    environment = EnvironmentSpec(slots=slots, processes=said)
    assert environment_processes(slots, cores, said) == processes
    assert emulators_per_process(environment, cores) == emulators


@pytest.mark.parametrize(
    ("cores", "members", "each", "emulators"),
    [(8, 1, 8, 8), (8, 3, 2, 32), (1, 2, 1, 32)],  # more members than cores, at last
)
def test_members_share_the_cores_and_each_has_one(
    cores: int, members: int, each: int, emulators: int
) -> None:
    assert cores_each(members, {"DEMORESET_CORES": str(cores)}) == each
    assert emulators_per_process(EnvironmentSpec(slots=64), each) == emulators
