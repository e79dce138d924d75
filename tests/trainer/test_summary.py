"""What is left of a run when it ends, and what a person is told then."""

import argparse
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from demoreset_api.errors import ExitCode, NoProgress
from demoreset_api.spec import RunSpec
from demoreset_trainer import cli_run, metrics, summary
from demoreset_trainer.lives import TakenOver
from demoreset_trainer.progress import Progress
from small_progress import PROGRESS

CONFIRMED = replace(
    PROGRESS, start_frame=0, evaluation_update=5, evaluation_episodes=100, evaluation_rate=0.93
)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli_run.register(parser.add_subparsers())
    return parser.parse_args(["run", "-f", "x.yaml", *arguments])


def finish(folder: Path, code: int, after: str, progress: Progress) -> tuple[str, dict[str, Any]]:
    (folder / metrics.NAME).write_text(json.dumps(asdict(progress)) + "\n")
    spec = RunSpec.model_validate({"demo": {"name": "x"}, "goal": {"after": after}})
    said = summary.finish(folder, spec, code, options())
    return said, json.loads((folder / summary.NAME).read_text())


@pytest.mark.parametrize(
    ("code", "after", "progress", "met"),
    [
        (ExitCode.INTERRUPTED, "PlayOn", CONFIRMED, True),
        (ExitCode.DONE, "PlayOn", CONFIRMED, True),
        (ExitCode.DONE, "Stop", CONFIRMED, True),
        (ExitCode.INTERRUPTED, "PlayOn", PROGRESS, False),
        (ExitCode.INTERRUPTED, "PlayOn", replace(CONFIRMED, evaluation_rate=0.89), False),
        (ExitCode.INTERRUPTED, "PlayOn", replace(CONFIRMED, goal=0.5), False),  # an earlier goal
        (ExitCode.TRY_AGAIN, "Stop", CONFIRMED, False),  # it could not be saved
    ],
)
def test_a_run_that_plays_on_has_met_its_goal(
    tmp_path: Path, code: int, after: str, progress: Progress, met: bool
) -> None:
    said, found = finish(tmp_path, code, after, progress)
    assert found["goalMet"] is met
    assert ("93% of the episodes" in said) is met
    assert found["exitCode"] == code
    assert found["error"] is None
    assert ("(guide 0.1)" in said) is (code == ExitCode.DONE)
    began = "Stopped after"
    if code == ExitCode.DONE:
        began = "Played on until the budget" if after == "PlayOn" else "Goal met after"
    assert said.startswith(began)
    assert found["budgetSpent"] is began.startswith("Played on")
    assert ("oal met at update 5" in said) is (met and began != "Goal met after")


def test_a_disk_without_room_for_the_last_lines_makes_no_wrong_words(tmp_path: Path) -> None:
    (tmp_path / metrics.NAME).write_text(json.dumps(asdict(PROGRESS)) + "\n")
    saved = tmp_path / "checkpoints" / "ckpt-l000001-u0000000055"
    saved.mkdir(parents=True)
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    last = replace(PROGRESS, update=55, frames=450_560)
    said = summary.finish(tmp_path, spec, ExitCode.DRAINED, options(), latest=last)
    assert "Stopped after 450,560 frames" in said
    assert "; saved." in said
    (tmp_path / metrics.NAME).unlink()
    assert "; saved." in summary.finish(tmp_path, spec, ExitCode.DRAINED, options(), latest=last)


def test_a_command_that_did_no_update_speaks_of_its_checkpoint(tmp_path: Path) -> None:
    """Metrics of the command before may be behind it, or ahead: of updates that it has lost."""
    (tmp_path / "checkpoints" / "ckpt-l000001-u0000000008").mkdir(parents=True)
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    for updates, stands in (([6, 7], 7), ([7, 8, 9], 8)):
        lines = [json.dumps(asdict(replace(PROGRESS, update=update))) for update in updates]
        (tmp_path / metrics.NAME).write_text("\n".join(lines) + "\n")
        said = summary.finish(tmp_path, spec, ExitCode.DRAINED, options(), idle=True)
        assert "; saved. " in said
        found = json.loads((tmp_path / summary.NAME).read_text())
        assert (found["updates"], found["savedUpdate"]) == (stands, 8)


def test_who_joins_is_no_loss(tmp_path: Path) -> None:
    changes = {"joined": 3, "left": 1, "collective": 2, "coordinator": 1}
    _, found = finish(tmp_path, ExitCode.DONE, "Stop", replace(PROGRESS, recoveries=changes))
    assert found["recoveries"] == 4


def test_every_field_is_explained(tmp_path: Path) -> None:
    _, found = finish(tmp_path, ExitCode.DONE, "Stop", CONFIRMED)
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    table = page.partition("## The summary")[2].partition("\n\nHow it")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))
    assert sorted(named) == sorted(found)


def test_a_run_that_failed_says_so_in_its_summary(tmp_path: Path) -> None:
    (tmp_path / metrics.NAME).write_text(json.dumps(asdict(PROGRESS)) + "\n")
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    for error, code in ((NoProgress("update 8 failed"), 66), (RuntimeError(), 1)):
        with pytest.raises(type(error)), cli_run._failure_told(tmp_path, spec, options()):
            raise error
        found = json.loads((tmp_path / summary.NAME).read_text())
        assert (found["exitCode"], found["goalMet"]) == (code, False)
        assert found["error"] == (str(error) or "RuntimeError")
    with pytest.raises(TakenOver), cli_run._failure_told(tmp_path, spec, options()):
        raise TakenOver("another process has taken this run over")
    assert json.loads((tmp_path / summary.NAME).read_text()) == found, "it is the other's folder"


def test_a_run_that_ends_before_its_first_update_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / metrics.NAME).touch()
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    said = summary.finish(tmp_path, spec, ExitCode.INTERRUPTED, options("--members", "2"))
    assert said.endswith("update. Go on with: demoreset run -f x.yaml --members 2")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--set 'spec.demo={name: x}' --set spec.seed=1 --dir 'a b' --members 2",
        "--port 0 --host 0.0.0.0 --log json --tensorboard",
    ],
)
def test_a_run_goes_on_as_it_was_begun(flags: str) -> None:
    given = options(*shlex.split(flags), "--fresh")
    assert summary.again(given) == f"demoreset run -f x.yaml {flags}".strip()


def test_of_two_changes_of_a_field_the_last_one_stands() -> None:
    given = options("--set", "spec.budget.frames=1", "--set", "spec.seed=1")
    told = summary.again(given, "spec.budget.frames=2")
    assert told == "demoreset run -f x.yaml --set spec.seed=1 --set spec.budget.frames=2"
