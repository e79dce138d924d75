"""A run's folder: whose checkpoints it holds, and what becomes of an old one."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demoreset_api.errors import TryAgain, UserError
from demoreset_api.spec import ApiModel, RunSpec
from demoreset_trainer import run_folder
from demoreset_trainer.demo import Demo

WANTED = RunSpec.model_validate({"demo": {"name": "x"}})


def state_of(demo: Demo) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    return {
        "spec": WANTED.model_dump(mode="json", by_alias=True),
        "demo": {"game": demo.game, "sha256": demo.sha256},
    }


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "spec.seed = 0, the run file 1"),
        ({"policy": {"preset": "Base"}}, "spec.policy.preset = Small, the run file Base"),
        ({"environment": {"frameSkip": 3}}, "spec.environment.frameSkip = 4, the run file 3"),
        ({"policy": {"recurrent": True}}, "without memory, the run file's is one with (spec"),
    ],
)
def test_a_checkpoint_of_another_spec_is_refused(
    freeway: Demo, changed: dict[str, object], says: str
) -> None:
    state = state_of(freeway)
    run_folder.check_same_run(state, WANTED, freeway, Path("runs/x"))  # the same one is welcome
    other = RunSpec.model_validate({"demo": {"name": "x"}, **changed})
    with pytest.raises(UserError, match="--fresh") as error:
        run_folder.check_same_run(state, other, freeway, Path("runs/x"))
    assert says in str(error.value)


def test_a_checkpoint_of_another_demo_is_refused(freeway: Demo) -> None:
    state = state_of(freeway.prefix(100))
    with pytest.raises(UserError, match="belongs to another demo"):
        run_folder.check_same_run(state, WANTED, freeway, Path("runs/x"))


def test_an_old_folder_is_renamed_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert run_folder.set_aside(folder) is None
    for number in (1, 2):
        folder.mkdir()
        (folder / "kept").write_text(str(number))
        assert run_folder.set_aside(folder) == tmp_path / f"x.{number}"
    assert (tmp_path / "x.2" / "kept").read_text() == "2"


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, TryAgain), (errno.EACCES, UserError)])
def test_a_folder_that_cannot_be_renamed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(kind, match=rf"--fresh: {tmp_path} cannot be renamed: .*another --dir"):
        run_folder.set_aside(tmp_path)


def test_what_a_checkpoint_depends_on_never_changes_on_a_cluster() -> None:
    def fixed(model: type[ApiModel], place: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            shown = place + (field.alias or name)
            if shown.rpartition(".")[2] in model.fixed:
                yield shown
            elif isinstance(field.annotation, type) and issubclass(field.annotation, ApiModel):
                yield from fixed(field.annotation, f"{shown}.")

    there = set(fixed(RunSpec))
    for field in run_folder._FIXED:
        assert {field, field.partition(".")[0]} & there, field
    # And the other way round, but for the demo, of which the hash is compared, and for what has
    # nothing to do with learning.
    others = {"demo", "managedBy", "checkpoint"}
    assert {one.partition(".")[0] for one in there} - others == {
        field.partition(".")[0] for field in run_folder._FIXED
    }


def test_what_is_said_instead_of_left_to_a_default_is_the_same_run(freeway: Demo) -> None:
    said = {
        "demo": {"name": "x", "endFrame": len(freeway)},
        "policy": {"preset": "Small", "recurrent": False},
    }
    wanted = RunSpec.model_validate(said)
    run_folder.check_same_run(state_of(freeway), wanted, freeway, Path("runs/x"))
