"""What several tests use: a short demo of a real game, a cache of start states; who runs alone."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: one thread, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from demoreset_trainer.demo import Demo, record

# Timed, or of processes that want all cores: nothing runs beside them.
ALONE = {
    *("test_checkpoint", "test_checkpoint_writer", "test_cli_run", "test_cli_worker"),
    *("test_coordinator", "test_disk", "test_elastic", "test_faults", "test_fence", "test_group"),
    *("test_hangs", "test_heart", "test_links", "test_lives", "test_network", "test_nursery"),
    *("test_question", "test_signals", "test_supervise"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nobody's own cache of start states is read or written; new processes inherit that."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMORESET_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def freeway() -> Demo:
    """A chicken that crosses the road: always up, one point for the last of 172 frames."""
    return record("freeway", np.full(172, 2, np.uint8), frame_skip=4)


@pytest.fixture(scope="session")
def assault() -> Demo:
    """Shoots up: 21 points at each of the frames 54, 144, 198, 224 and 282; no life is lost."""
    return record("assault", np.full(300, 2, np.uint8), frame_skip=4)
