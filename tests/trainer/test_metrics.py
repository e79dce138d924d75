"""The metrics file: one line per update, whoever is the group's first, over all lives of a run."""

import json
import resource
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from demoreset_api.errors import TryAgain
from demoreset_trainer import metrics
from demoreset_trainer.metrics import MetricsFile
from small_progress import PROGRESS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / metrics.NAME


def append(file: MetricsFile, updates: Iterable[int], generation: int = 0, life: int = 1) -> None:
    for update in updates:
        file.append(replace(PROGRESS, update=update, generation=generation, life=life))


def write(path: Path, updates: Iterable[int], resumed: int | None = None, life: int = 1) -> None:
    with MetricsFile(path, resumed) as file:
        append(file, updates, life=life)


def updates(path: Path) -> list[int]:
    return [line["update"] for line in metrics.read(path)]


def lines(path: Path) -> list[int]:
    """The updates as they stand in the file."""
    return [json.loads(line)["update"] for line in path.read_text().splitlines()]


def test_a_run_that_goes_on_cuts_what_was_lost(path: Path) -> None:
    write(path, range(1, 6))
    write(path, [], resumed=3)
    assert lines(path) == [1, 2, 3]
    write(path, range(4, 7), resumed=3)
    assert lines(path) == [1, 2, 3, 4, 5, 6]


def test_a_process_that_may_be_one_of_several_cuts_nothing_before_its_first_line(
    path: Path,
) -> None:
    write(path, range(1, 6))
    with MetricsFile(path) as other:
        assert lines(path) == [1, 2, 3, 4, 5]
        append(other, [6])
    assert lines(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_first_line_that_is_not_later_than_the_last_one_says_that_the_run_went_back(
    path: Path, first: int
) -> None:
    write(path, range(1, 6))
    write(path, [first], life=2)
    assert lines(path) == list(range(1, first + 1))


def test_a_run_goes_back_under_a_process_that_lives_on(path: Path) -> None:
    # All members died and were started again by the supervisor that writes here.
    with MetricsFile(path) as file:
        append(file, range(1, 8))
        append(file, range(4, 6), generation=2, life=2)
    assert lines(path) == [1, 2, 3, 4, 5]
    assert [line["generation"] for line in metrics.read(path)] == [0, 0, 0, 2, 2]


def test_a_run_goes_back_under_workers_that_live_on(path: Path) -> None:
    """All members died: one of another worker is the first now, and later one of a third."""
    with MetricsFile(path) as one, MetricsFile(path) as other:
        append(other, range(1, 4))
        append(one, range(4, 8))
        append(other, range(5, 7), life=2)  # from the checkpoint of update 4
        assert lines(path) == [1, 2, 3, 4, 5, 6]
        append(one, [7], life=2)
        write(path, [8], life=2)
    assert [(line["update"], line["life"]) for line in metrics.read(path)] == [
        *((update, 1) for update in range(1, 5)),
        *((update, 2) for update in range(5, 9)),
    ]


def test_a_late_line_of_an_earlier_life_does_not_count(path: Path) -> None:
    with MetricsFile(path) as frozen, MetricsFile(path) as other:
        append(frozen, [1, 2])
        append(other, [2, 3, 4], life=2)
        append(frozen, [3])
        append(other, [5], life=2)
        write(path, [6], life=2)
    assert [(line["update"], line["life"]) for line in metrics.read(path)] == [
        (1, 1),
        *((update, 2) for update in range(2, 7)),
    ]


def test_the_first_member_moves_from_worker_to_worker_and_no_line_is_lost(path: Path) -> None:
    with MetricsFile(path) as one, MetricsFile(path) as other:
        append(one, range(1, 4))
        append(other, range(4, 7))
        append(one, range(7, 9))
        append(other, [9])
    assert lines(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_of_an_update_that_was_done_again_the_last_line_counts(path: Path) -> None:
    with MetricsFile(path) as one, MetricsFile(path) as other:
        append(other, [1])
        append(one, [2, 3], generation=1)
        append(other, [3, 4], generation=2)
    told = [(line["update"], line["generation"]) for line in metrics.read(path)]
    assert told == [(1, 0), (2, 1), (3, 2), (4, 2)]


def test_a_line_that_comes_late_takes_nothing_back(path: Path) -> None:
    with MetricsFile(path) as frozen, MetricsFile(path) as other:
        append(frozen, [1, 2])
        append(other, [3, 4, 5])
        append(frozen, [3])  # done before it froze, told when it thawed
        append(other, [6])
    assert updates(path) == [1, 2, 3, 4, 5, 6]


def test_lines_of_several_writers_at_the_same_time_are_whole(path: Path) -> None:
    files = [MetricsFile(path) for _ in range(3)]
    for number, file in enumerate(files):
        append(file, [number])
    with ThreadPoolExecutor() as threads:
        for number, file in enumerate(files, 1):
            threads.submit(append, file, range(number * 1000, number * 1000 + 200))
    for file in files:
        file.close()
    wanted = [0, 1, 2, *range(1000, 1200), *range(2000, 2200), *range(3000, 3200)]
    assert updates(path) == wanted


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(path: Path) -> None:
    write(path, range(1, 4))
    path.write_text(path.read_text()[:-20] + '\n{"update": 2}\n')  # nor has that a life
    assert updates(path) == [1, 2]
    write(path, range(3, 5), resumed=2)
    assert updates(path) == [1, 2, 3, 4]


def test_half_a_line_of_another_process_does_not_spoil_the_next(path: Path) -> None:
    with MetricsFile(path) as file:
        append(file, [1])
        with path.open("ab") as other:
            other.write(b'{"update": 2, "fra')
        append(file, [2, 3])
    assert updates(path) == [1, 2, 3]


def test_a_full_disk_costs_lines_and_neither_the_run_nor_the_file(path: Path) -> None:
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with MetricsFile(path) as file:
            append(file, [1])
            # Half of the next line fits, and nothing of the one after that.
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size * 3 // 2, hard))
            append(file, [2, 3])
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            append(file, [4])
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
            append(file, [5])
        write(path, [5], resumed=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert updates(path) == [1, 4]


def test_a_volume_that_is_away_is_tried_again_later(tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match=r"metrics\.jsonl: cannot be written now"):
        MetricsFile(tmp_path / "away" / metrics.NAME)


def test_bytes_that_are_no_text_are_left_out_of_the_metrics(path: Path) -> None:
    path.write_bytes(b'\xff\xfe\x00\n{"update": 3, "life": 1}\n')
    assert metrics.read(path) == [{"update": 3, "life": 1}]
    write(path, [4])
    assert updates(path) == [3, 4]
