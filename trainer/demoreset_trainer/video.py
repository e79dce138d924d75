"""Films: pictures in, mp4 (H.264) or GIF out; no ffmpeg on the machine is needed."""

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import cv2
import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError

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
        self._palette: Any = None
        try:
            self._container = av.open(str(self._partial), "w")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    def add(self, picture: Picture) -> None:
        """Add a picture; all of a film have the same even height and width."""
        if self._stream is None:
            self._begin(picture)
        frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if self._palette is not None:
            self._palette.push(frame)
            frame = self._palette.pull()
            frame.pts = None  # the stream counts
        try:
            self._container.mux(self._stream.encode(frame))
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _begin(self, picture: Picture) -> None:
        codec, pixels = _CODECS[self._path.suffix]
        height, width = picture.shape[:2]
        self._stream = self._container.add_stream(codec, rate=self._fps)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = pixels
        if self._path.suffix == ".gif":
            self._palette = _palette(width, height, self._fps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._stream is not None and kind is None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                if self._stream is None:
                    raise UserError(f"{self._path}: a film needs at least one picture")
                self._partial.replace(self._path)
        except OSError as error:
            if kind is None:
                raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)


def _palette(width: int, height: int, fps: Fraction) -> Any:
    """A filter that gives each picture a palette of its own: an Atari shows few colours at once."""
    graph = av.filter.Graph()
    pixels = av.VideoFormat("rgb24")
    source = graph.add_buffer(width=width, height=height, format=pixels, time_base=1 / fps)
    split = graph.add("split")
    generate = graph.add("palettegen", "stats_mode=single")
    use = graph.add("paletteuse", "new=1:dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


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
