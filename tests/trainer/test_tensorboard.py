"""TensorBoard event files, read back as TensorBoard reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from demoreset_api.errors import UserError
from demoreset_trainer import tensorboard
from demoreset_trainer.tensorboard import TensorBoardFile
from small_progress import PROGRESS


def test_every_number_is_there_over_the_frames_and_none_twice_after_a_resume(
    tmp_path: Path,
) -> None:
    for updates in ((1, 2, 3), (3, 4)):  # the third was lost with the process, and is done again
        board = TensorBoardFile(tmp_path)
        for update in updates:
            board.update(replace(PROGRESS, update=update, frames=1000 * update))
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = events.Scalars("update")
    assert [(event.step, event.value) for event in told] == [
        (1000, 1),
        (2000, 2),
        (3000, 3),
        (4000, 4),
    ]
    assert {"success_rate", "learning_rate", "entropy"} <= set(events.Tags()["scalars"])
    assert "goal_rate" not in events.Tags()["scalars"], "nothing is said that is not known"


def test_a_package_that_is_missing_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensorboard.check(True)
    monkeypatch.setattr(tensorboard, "find_spec", lambda _: None)
    tensorboard.check(False)
    with pytest.raises(UserError, match="--tensorboard needs one more package"):
        tensorboard.check(True)
