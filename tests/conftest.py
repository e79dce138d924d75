"""What several tests use: a short demo of a real game, and a cache of start states of their own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from demoreset_trainer.demo import Demo, record


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
