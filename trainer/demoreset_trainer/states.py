"""Start states: what an episode needs to begin inside a demo, made once by replaying it.

For every decision boundary of the demo there are the emulator's state and the image that the
policy would have seen. An episode then begins without stepping the emulator: the state is restored
and the frame stack (and a recurrent policy's burn-in) comes from the images. A blank stack would
be an observation of its own, for which a policy learns an action of its own.

States and images are cached on disk and mapped into memory, so that all processes share them.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import cv2
import numpy as np
import numpy.typing as npt

from demoreset_api.errors import TryAgain, UserError
from demoreset_api.names import ENV_CACHE
from demoreset_trainer.demo import Demo, compared
from demoreset_trainer.disk import sweep
from demoreset_trainer.emulator import Emulator, emulator_version

Image = npt.NDArray[np.uint8]
CACHE_FORMAT = 3
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class View:
    """How a policy sees the game: images of [channels, height, width], `stack` of them."""

    height: int = 64
    width: int = 64
    channels: int = 1  # 1: grey, 3: RGB
    stack: int = 4
    max_over_frames: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an observation: the stacked images, newest last."""
        return self.stack * self.channels, self.height, self.width


class Camera:
    """Takes screens of an emulator and turns the latest few into one image."""

    def __init__(self, emulator: Emulator, view: View) -> None:
        self._emulator = emulator
        self._view = view
        depth = () if view.channels == 1 else (3,)
        self._screens = np.zeros(
            (view.max_over_frames, emulator.height, emulator.width, *depth), np.uint8
        )
        self._max = np.zeros(self._screens.shape[1:], np.uint8)
        self._next = 0

    def take(self) -> None:
        """Keep the screen of this frame; the oldest one is forgotten."""
        screen = self._screens[self._next]
        if self._view.channels == 1:
            self._emulator.grey_into(screen)
        else:
            screen[:] = self._emulator.rgb()
        self._next = (self._next + 1) % len(self._screens)

    def forget(self) -> None:
        """Keep no screen: another episode begins."""
        self._screens[:] = 0

    def fill(self) -> None:
        """Keep the screen of this frame and nothing else."""
        for _ in self._screens:
            self.take()

    def image_into(self, out: Image) -> None:
        """Write the maximum of the latest screens, resized, into `out` [channels, H, W].

        Some sprites are drawn in every second (or fourth) frame only: hence the maximum.
        """
        screens = self._screens
        merged = screens[0]
        for other in screens[1:]:
            merged = np.maximum(merged, other, out=self._max)
        size = (self._view.width, self._view.height)
        height, width = merged.shape[:2]
        if size[0] <= width // 2 and size[1] <= height // 2:
            # An exact halving first costs 2 us and makes the rest twice as fast.
            merged = cv2.resize(merged, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        if self._view.channels == 1:
            cv2.resize(merged, size, dst=out[0], interpolation=cv2.INTER_AREA)
        else:
            out[:] = cv2.resize(merged, size, interpolation=cv2.INTER_AREA).transpose(2, 0, 1)


@dataclass(frozen=True)
class StartStates:
    """The demo's states and images at every `frame_skip`-th frame, K of them.

    images: [K, channels, height, width]. The last one belongs to the demo's end, where no episode
    begins, when the demo's length is a multiple of `frame_skip`.
    """

    frame_skip: int
    images: Image
    _states: npt.NDArray[np.uint8]  # all states, one after the other
    _offsets: npt.NDArray[np.int64]  # [K + 1]

    def __len__(self) -> int:
        return len(self.images)

    def state(self, index: int) -> bytes:
        """The emulator's state at frame index * frame_skip."""
        return self._states[self._offsets[index] : self._offsets[index + 1]].tobytes()

    def observation(self, index: int, view: View) -> Image:
        """What the policy sees at a start: its stack of images, [stack * channels, H, W]."""
        observation: Image = self.observations(np.array([index]), view)[0]
        return observation

    def observations(self, index: npt.NDArray[np.int64], view: View) -> Image:
        """What the policy sees at n starts, [n, stack * channels, H, W]."""
        rows = index[:, None] + np.arange(1 - view.stack, 1)
        images: Image = self.images[rows.clip(0)]
        return images.reshape(len(index), *view.shape)


def start_states(demo: Demo, view: View, frame_skip: int) -> StartStates:
    """Load the start states of a demo from the cache, making them first if need be.

    Raises:
        UserError: the demo does not replay as it was recorded.
        TryAgain: the cache cannot be written, or read.
    """
    folder = _cache() / _key(demo, view, frame_skip)
    if not folder.is_dir():
        _make(demo, view, frame_skip, folder)
    found = _load(demo, view, frame_skip, folder)
    if found is None:
        # Renamed first: half a deletion must not look like start states.
        torn = folder.with_name(f"{_PARTIAL}{uuid4().hex}")
        with suppress(OSError):  # another process did it
            folder.rename(torn)
        shutil.rmtree(torn, ignore_errors=True)
        _make(demo, view, frame_skip, folder)
        found = _load(demo, view, frame_skip, folder)
    if found is None:
        raise TryAgain(
            f"{folder}: these start states cannot be read, nor made anew; delete them, or "
            f"name another folder in {ENV_CACHE}"
        )
    return found


def _load(demo: Demo, view: View, frame_skip: int, folder: Path) -> StartStates | None:
    """What is in a folder of the cache; None where it is torn."""
    try:
        images, states, offsets = (
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
            for name in ("images", "states", "offsets")
        )
    except (OSError, ValueError):
        return None
    shape = _shape(demo, view, frame_skip)
    if images.shape != shape or offsets.shape != (shape[0] + 1,) or offsets[-1] != len(states):
        return None
    return StartStates(frame_skip, images, states, offsets)


def _shape(demo: Demo, view: View, frame_skip: int) -> tuple[int, int, int, int]:
    """Of the images."""
    return len(demo) // frame_skip + 1, view.channels, view.height, view.width


def _key(demo: Demo, view: View, frame_skip: int) -> str:
    # What is seen of a demo does not depend on how many images are stacked.
    look = {**asdict(view), "stack": 0}
    facts = f"{CACHE_FORMAT} {demo.sha256} {look} {frame_skip} {emulator_version()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _cache() -> Path:
    """The folder of cached states: ours alone, since the emulator parses what is in it."""
    home = os.environ.get(ENV_CACHE) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "demoreset"
    )
    path = Path(home)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    fallback = Path(tempfile.gettempdir()) / f"demoreset-cache-{os.getuid()}"
    try:
        fallback.mkdir(exist_ok=True, mode=0o700)
        found = fallback.lstat()
    except OSError as error:
        raise _unwritable(fallback, error) from error
    # Anybody may have made it: what they put there would go into the emulator's parser.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(
            f"{fallback}: not a folder that is yours alone; remove it, or name another one in "
            f"{ENV_CACHE}"
        )
    return fallback


def _unwritable(cache: Path, error: OSError) -> TryAgain:
    return TryAgain(
        f"{cache}: start states cannot be written there now: {error.strerror}; make room, or name "
        f"another folder in {ENV_CACHE}"
    )


def _make(demo: Demo, view: View, frame_skip: int, folder: Path) -> None:
    """Replay the demo into `folder`: whole, or not there.

    Raises:
        UserError: the demo does not replay as it was recorded.
        TryAgain: the disk is full, read-only, or away.
    """
    with suppress(OSError):
        sweep(folder.parent.glob(f"{_PARTIAL}*"), time.time())
    emulator = Emulator(demo.game)
    camera = Camera(emulator, view)
    shape = _shape(demo, view, frame_skip)
    image = np.empty(shape[1:], np.uint8)
    states: list[bytes] = []
    try:
        with tempfile.TemporaryDirectory(
            prefix=_PARTIAL, dir=folder.parent, ignore_cleanup_errors=True
        ) as name:
            partial = Path(name)
            with _array(partial / "images.npy", "|u1", shape) as images:

                def keep() -> None:
                    camera.image_into(image)
                    images.write(image.data)
                    states.append(emulator.save())

                for frame, difference in enumerate(compared(demo, emulator)):
                    if difference is not None:  # nobody could learn from there
                        raise UserError(
                            f"this demo of {demo.game} does not replay here ({difference}): it is "
                            f"damaged, or not of {emulator_version()}; `demoreset demo verify`"
                        )
                    (camera.take if frame else camera.fill)()
                    if frame % frame_skip == 0:
                        keep()
            offsets = np.cumsum([0] + [len(state) for state in states], dtype=np.int64)
            with _array(partial / "offsets.npy", "<i8", offsets.shape) as file:
                file.write(offsets.tobytes())
            with _array(partial / "states.npy", "|u1", (int(offsets[-1]),)) as file:
                file.writelines(states)
            os.replace(partial, folder)
    except OSError as error:
        # Another process may have made the same folder in the meantime; theirs is as good.
        if not folder.is_dir():
            raise _unwritable(folder.parent, error) from error


@contextmanager
def _array(path: Path, kind: str, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A .npy to write into, which is on the disk afterwards.

    Not through a mapping: where the disk is full, that is a SIGBUS and no error.
    """
    with path.open("wb") as file:
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())
