"""How a person and a machine see a group: the screen, the port, the graph, one voice for all."""

import argparse
import io
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from demoreset_api import names
from demoreset_api.errors import ExitCode
from demoreset_trainer import metrics, plot, watch
from demoreset_trainer.counters import Cause
from demoreset_trainer.metrics import MetricsFile
from demoreset_trainer.progress import Progress
from demoreset_trainer.report import Report
from demoreset_trainer.screen import Picture, plain_line, short_names
from demoreset_trainer.watch import Watchers
from small_progress import PROGRESS


def roster(members: int, name: str = "montezuma-worker") -> list[dict[str, Any]]:
    return [
        {"id": f"{name}-{i}", "pid": 4711 + i, "host": f"node-{i}", "update": 7}
        for i in range(members)
    ]


ALONE = replace(PROGRESS, phase_seconds={"rollout": 0.5, "quorum": 0.25})
GROUP = replace(
    ALONE,
    members=3,
    generation=5,
    roster=roster(3),
    recoveries={"collective": 3, "joined": 2},
    recovery_seconds={"collective": 2.5, "joined": 0.5},
    rolled_back=3,
    frames_discarded=4096,
    goodput=0.973,
)


def picture(progress: Progress, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(Picture(progress))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_screen_has_two_lines_more_for_a_group() -> None:
    alone, group = picture(ALONE), picture(GROUP)
    assert group[: len(alone)] == alone
    members, who = group[len(alone) :]
    assert re.fullmatch(r"members +3, generation 5 +recoveries +3, goodput 97\.3%", members)
    assert re.fullmatch(r"who +0 \(4711\), 1 \(4712\), 2 \(4713\)", who)


@pytest.mark.parametrize(
    "progress",
    [
        pytest.param(replace(GROUP, members=1, roster=roster(1)), id="the last one left"),
        pytest.param(replace(GROUP, roster=[]), id="nobody named"),
        pytest.param(replace(GROUP, members=64, roster=roster(64)), id="many"),
        pytest.param(replace(GROUP, roster=roster(9, "name" * 40)), id="long names"),
        pytest.param(
            replace(GROUP, members=64, generation=123_456, recoveries={"left": 98_765}),
            id="large numbers",
        ),
    ],
)
def test_the_screen_of_a_group_keeps_its_height_and_width(progress: Progress) -> None:
    lines = picture(progress)
    assert len(lines) == len(picture(GROUP))
    assert max(map(len, lines)) <= 80
    assert "goodput 97.3%" in lines[-2]  # nothing was cut off


def test_of_a_roster_that_is_too_long_the_rest_is_counted() -> None:
    line = picture(replace(GROUP, members=64, roster=roster(64)))[-1]
    shown = len(re.findall(r"\(\d+\)", line))
    assert line.endswith(f", {64 - shown} more")
    assert shown >= 5


def test_a_narrow_screen_names_the_members_of_a_group_without_their_processes() -> None:
    lines = picture(replace(GROUP, members=64, roster=roster(64)), 40)
    assert max(map(len, lines)) <= 40
    assert lines[-3:-1] == ["members        64, generation 5", "recoveries     3, goodput 97.3%"]
    assert re.fullmatch(r"who {12}0, 1, 2, 3, .*, \d+ more", lines[-1])


@pytest.mark.parametrize(
    ("ids", "short"),
    [
        ([], []),
        (["montezuma"], ["montezuma"]),
        (["run-worker-0-0", "run-worker-0-1"], ["0", "1"]),
        (["run-worker-0-1", "run-worker-1-0"], ["0-1", "1-0"]),
        (["run-0", "run-0"], ["0", "0"]),
        (["a", "a-1"], ["a", "a-1"]),
        (["0123456789abcdef"], ["..6789abcdef"]),
    ],
)
def test_ids_lose_what_they_share(ids: list[str], short: list[str]) -> None:
    assert short_names(ids) == short


def test_the_plain_line_counts_members_where_there_are_several() -> None:
    assert "3 members" in plain_line(GROUP)
    assert "member" not in plain_line(ALONE)


@pytest.fixture
def served() -> Iterator[Report]:
    served = Report(0, "127.0.0.1")
    yield served
    served.close()


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        text: str = answer.read().decode()
        return text


def samples(port: int) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(get(port, "/metrics"))
        for sample in family.samples
    }


def test_metrics_tell_what_the_group_lost_and_regained(served: Report) -> None:
    served.update(GROUP)
    told = samples(served.port)
    assert told["demoreset_recoveries_total{collective}"] == 3
    assert told["demoreset_recoveries_total{joined}"] == 2
    assert told["demoreset_recovery_seconds_total{collective}"] == 2.5
    assert told["demoreset_updates_rolled_back_total"] == 3
    assert told["demoreset_frames_discarded_total"] == 4096
    assert told["demoreset_goodput_ratio"] == 0.973
    assert told["demoreset_phase_seconds_total{quorum}"] == 0.25


def test_every_cause_is_told_from_the_start(served: Report) -> None:
    served.update(ALONE)
    told = samples(served.port)
    assert [told[f"demoreset_recoveries_total{{{cause}}}"] for cause in Cause] == [0, 0, 0, 0]


def test_every_cause_and_phase_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for metric, words in (("recoveries", tuple(Cause)), ("phase_seconds", ("rollout", "quorum"))):
        row = re.search(rf"^\| `demoreset_{metric}_total.*$", page, re.MULTILINE)
        assert row is not None
        assert all(f"`{word}`" in row[0] for word in words)


def test_status_lists_the_members_and_how_those_of_this_supervisor_are(served: Report) -> None:
    served.states({"montezuma-worker-0": "starting"})
    before = json.loads(get(served.port, "/status"))
    assert [member["state"] for member in before["members"]] == ["starting"]
    served.update(replace(GROUP, rank=1))
    served.states({"montezuma-worker-1": "stopping", "montezuma-worker-7": "starting"})
    status = json.loads(get(served.port, "/status"))
    assert [(member["id"][-1], member["state"]) for member in status["members"]] == [
        ("0", "training"),
        ("1", "stopping"),
        ("2", "training"),
        ("7", "starting"),
    ]
    assert status["members"][1] == {
        "id": "montezuma-worker-1",
        "pid": 4712,
        "host": "node-1",
        "update": 7,
        "state": "stopping",
    }
    assert status["members"][3]["pid"] is None
    group = {key: status[key] for key in ("generation", "worldSize", "rank", "recoveries")}
    assert group == {"generation": 5, "worldSize": 3, "rank": 1, "recoveries": 3}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    return stream


def written(folder: Path, *, last: int, count: int | None = None) -> list[int]:
    """The updates in the metrics file, when this is the last of them, and so many are there."""
    deadline = time.monotonic() + 10
    while True:
        updates = [line["update"] for line in metrics.read(folder / metrics.NAME)]
        done = updates[-1:] == [last] and count in (None, len(updates))
        if done or time.monotonic() > deadline:
            return updates
        time.sleep(0.01)


@pytest.fixture
def watchers(tmp_path: Path, printed: io.StringIO) -> Iterator[Watchers]:
    options = argparse.Namespace(port=0, host="127.0.0.1", log="json", tensorboard=False)
    with Watchers(tmp_path, options, None) as watchers:
        yield watchers


def test_the_groups_first_is_written_and_an_update_is_told_once(
    watchers: Watchers, tmp_path: Path, printed: io.StringIO
) -> None:
    for update in (7, 8):
        for rank in (2, 0, 1):
            watchers.update(replace(GROUP, update=update, rank=rank))
    watchers.update(replace(GROUP, update=9, rank=2))  # the first is another worker's now
    watchers.update(replace(GROUP, update=8, rank=1))  # read from its pipe a little later
    assert written(tmp_path, last=8) == [7, 8]
    told = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert [line["update"] for line in told if line["event"] == "update"] == [7, 8, 9]


def test_a_run_that_goes_back_to_a_checkpoint_is_told_again(
    watchers: Watchers, tmp_path: Path, printed: io.StringIO
) -> None:
    for life, updates in ((1, (7, 8, 9, 10)), (2, (6, 7))):
        for update in updates:
            watchers.update(replace(GROUP, update=update, life=life))
    told = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert [line["update"] for line in told if line["event"] == "update"] == [7, 8, 9, 10, 6, 7]
    assert written(tmp_path, last=7, count=2) == [6, 7]


def test_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, files = threading.Event(), []

    def append(file: MetricsFile, _: Progress) -> None:
        files.append(file)
        hangs.wait()

    monkeypatch.setattr(metrics.MetricsFile, "append", append)
    monkeypatch.setattr(watch._Behind, "PATIENCE", 0.1)
    monkeypatch.setattr(watch._Behind, "MOST", 10)
    options = argparse.Namespace(port=None, host="127.0.0.1", log="json", tensorboard=False)
    with Watchers(tmp_path, options, None) as watchers:
        for update in range(100):
            watchers.update(replace(GROUP, update=update))
    hangs.set()
    files[0].close()  # nobody else does: what was to be done next is left out
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["update"] for line in told] == list(range(100))


def test_a_supervisor_tells_of_its_members_before_any_update(
    watchers: Watchers, printed: io.StringIO
) -> None:
    note = json.loads(printed.getvalue())["text"]
    port = int(re.findall(r"port (\d+)", note)[0])
    assert get(port, "/healthz") == "starting\n"
    watchers.states({"worker-0": "starting"})
    assert json.loads(get(port, "/status"))["members"][0]["id"] == "worker-0"
    watchers.phase("rollout")  # a member's beat
    assert get(port, "/healthz") == "ok\n"
    watchers.states({})
    assert json.loads(get(port, "/status"))["members"] == []


def write(folder: Path, told: list[tuple[int, int, dict[str, int]]]) -> Path:
    """A run's folder: members, generation and recoveries at each update."""
    folder.mkdir()
    with MetricsFile(folder / metrics.NAME) as file:
        for update, (members, generation, recoveries) in enumerate(told, 1):
            file.append(
                replace(
                    ALONE,
                    update=update,
                    frames=update * 8192,
                    members=members,
                    generation=generation,
                    recoveries=recoveries,
                )
            )
    return folder


def test_the_graph_of_a_group_has_a_strip_below_and_that_of_one_member_none(
    tmp_path: Path,
) -> None:
    alone = write(tmp_path / "alone", [(1, 0, {})] * 5)
    group = write(
        tmp_path / "group", [(3, 1, {}), (2, 2, {"collective": 1}), (3, 3, {"collective": 1})]
    )
    heights = []
    for folders in ([alone], [group], [alone, group]):
        plot.plot(folders, tmp_path / "graph.png")
        heights.append(int.from_bytes((tmp_path / "graph.png").read_bytes()[20:24]))
    assert heights[0] < heights[1] == heights[2]


def test_recoveries_are_found_by_their_causes_and_changes_without_one_as_well(
    tmp_path: Path,
) -> None:
    folder = write(
        tmp_path / "run",
        [
            (3, 1, {}),
            (2, 2, {"collective": 1}),
            (2, 2, {"collective": 1}),
            (3, 3, {"collective": 1, "joined": 1}),
            (3, 3, {"collective": 1, "joined": 1, "coordinator": 1}),
            (2, 5, {"collective": 2, "joined": 1, "coordinator": 1, "unheard": 1}),
            (3, 6, {"collective": 2, "joined": 1, "coordinator": 1, "unheard": 1}),
        ],
    )
    found = plot.recoveries(metrics.read(folder / metrics.NAME))
    assert found == {"collective": [1, 5], "joined": [3], "coordinator": [4], "other": [5, 6]}


def test_every_name_of_the_environment_is_documented_and_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "elastic.md").read_text()
    known = {value for name, value in vars(names).items() if name.startswith("ENV_")}
    assert set(re.findall(r"\bDEMORESET_\w+", page)) == known
    assert str(names.COORDINATOR_PORT) in page
    assert names.TERMINATION_LOG in page
    table = page[page.index("| exit code") :].partition("\n\n")[0]
    codes = {int(code) for code in re.findall(r"\b\d+\b", table)}
    assert codes == set(ExitCode) - {ExitCode.CRASH}
