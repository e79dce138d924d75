"""Films: pictures in, mp4 (H.264) or GIF out; no ffmpeg on the machine is needed."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import cv2
import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError
from demoreset_trainer.disk import writing

Picture = npt.NDArray[np.uint8]  # [height, width, 3], RGB

WIDTH, HEIGHT = 480, 360  # an Atari picture on a television, 4:3
LINE = 22  # height of a line of text
MARGIN = 8
_CODECS = {".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "pal8")}


class VideoWriter:
    """Writes a film; it is there as a whole when the context ends, or not at all.

    Raises:
        UserError: the name ends in neither .mp4 nor .gif, or its place cannot be written to.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix not in _CODECS:
            raise UserError(f"{path}: a film's name ends in .mp4 or .gif")
        self._path = path
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._fps = Fraction(fps).limit_denominator(1000)
        self._stream: Any = None
        self._gif = _Gif() if path.suffix == ".gif" else None
        with writing(path):
            self._container = av.open(str(self._partial), "w")

    def add(self, picture: Picture) -> None:
        """Add a picture; all of a film have the same even height and width."""
        if self._stream is None:
            codec, pixels = _CODECS[self._path.suffix]
            self._stream = self._container.add_stream(codec, rate=self._fps)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = pixels
        if self._gif is not None:
            self._gif.keep(picture)
            return
        with writing(self._path):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def _finish(self) -> None:
        if self._stream is None:
            raise UserError(f"{self._path}: a film needs at least one picture")
        for frame in self._gif.frames() if self._gif is not None else ():
            self._container.mux(self._stream.encode(frame))
        self._container.mux(self._stream.encode())
        self._container.close()
        self._partial.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                with writing(self._path):
                    self._finish()
        finally:
            with suppress(OSError):
                self._container.close()
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)


class _Gif:
    """The pictures of a GIF until its end, when the colours of all are known.

    An Atari has 128 colours, so that one table of 256 is exact. With a table for each picture, the
    encoder can no longer leave out what did not change (and mistakes one picture for another).
    """

    def __init__(self) -> None:
        self._pictures: list[bytes] = []  # compressed: some 5 kB each
        self._shape: tuple[int, ...] = ()
        self._counts: dict[int, int] = {}

    def keep(self, picture: Picture) -> None:
        packed = _packed(picture)
        self._shape = packed.shape
        colours, counts = np.unique(packed, return_counts=True)
        for colour, count in zip(colours.tolist(), counts.tolist(), strict=True):
            self._counts[colour] = self._counts.get(colour, 0) + count
        self._pictures.append(zlib.compress(packed.tobytes(), 1))

    def frames(self) -> Iterator[av.VideoFrame]:
        """The pictures as numbers of one table; a colour too many becomes the nearest in it."""
        colours = np.array(sorted(self._counts), np.uint32)
        commonest = sorted(self._counts, key=lambda colour: -self._counts[colour])[:256]
        table = np.array(commonest, np.uint32)
        distance = _channels(colours)[:, None].astype(int) - _channels(table)[None]
        nearest = np.square(distance).sum(2).argmin(1).astype(np.uint8)
        palette = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
        palette[: len(table), 1:] = _channels(table)
        for picture in self._pictures:
            packed = np.frombuffer(zlib.decompress(picture), np.uint32).reshape(self._shape)
            numbers = nearest[np.searchsorted(colours, packed)]
            indexed: Any = (numbers, palette)  # missing in its types
            yield av.VideoFrame.from_ndarray(indexed, format="pal8")


def _packed(picture: Picture) -> npt.NDArray[np.uint32]:
    weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
    packed: npt.NDArray[np.uint32] = (picture * weights).sum(2, dtype=np.uint32)
    return packed


def _channels(packed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    return np.stack([packed >> 16, packed >> 8, packed], -1).astype(np.uint8)


def caption(screen: Picture, lines: Sequence[str]) -> Picture:
    """A screen at a television's shape, with lines of text below it."""
    large = cv2.resize(screen, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
    below = MARGIN + LINE * len(lines)
    picture = np.zeros((HEIGHT + below + below % 2, WIDTH, 3), np.uint8)
    picture[:HEIGHT] = large
    for number, line in enumerate(lines):
        place = (MARGIN, HEIGHT + LINE * (number + 1) - 4)
        cv2.putText(
            picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (235, 235, 235), 1, cv2.LINE_AA
        )
    return picture
