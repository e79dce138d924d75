"""Films: every picture is in the file, the file is whole or not there."""

import os
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from demoreset_api.errors import UserError
from demoreset_trainer import cli
from demoreset_trainer.demo import record, replay
from demoreset_trainer.emulator import Emulator
from demoreset_trainer.video import HEIGHT, WIDTH, VideoWriter, caption

Picture = npt.NDArray[np.uint8]
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def plain(number: int) -> Picture:
    """A picture of one colour, another one than the picture before."""
    return np.full((64, 96, 3), COLOURS[number % len(COLOURS)], np.uint8)


def decoded(path: Path) -> list[Picture]:
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in film.decode(video=0)]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("pictures", [1, 31])
def test_a_film_has_every_picture(tmp_path: Path, suffix: str, pictures: int) -> None:
    path = tmp_path / f"film{suffix}"
    with VideoWriter(path, fps=15) as film:
        for number in range(pictures):
            film.add(plain(number))
        assert not path.exists()
    found = decoded(path)
    assert len(found) == pictures
    for number, picture in enumerate(found):
        assert picture.shape == (64, 96, 3)
        assert np.abs(picture.astype(int) - plain(number)).mean() < 12  # mp4 halves the colours
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 30.0), (".mp4", 60 / 7), (".gif", 15.0)])
def test_a_film_takes_its_time(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"film{suffix}"
    with VideoWriter(path, fps) as film:
        for number in range(60):
            film.add(plain(number))
    with av.open(str(path)) as opened:
        times = [float(frame.time or 0) for frame in opened.decode(video=0)]
    # A GIF counts in hundredths of a second.
    assert np.allclose(times, np.arange(60) / fps, atol=0.02)


def test_a_gif_shows_the_console_s_own_colours(tmp_path: Path) -> None:
    emulator = Emulator("montezuma_revenge")
    for _ in range(30):
        emulator.act(0)
    screen = caption(emulator.rgb(), [])
    path = tmp_path / "film.gif"
    with VideoWriter(path, fps=15) as film:
        film.add(screen)
    shown = decoded(path)[0][:HEIGHT]
    assert np.abs(shown.astype(int) - screen[:HEIGHT]).max() <= 8


def test_a_film_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    film = VideoWriter(path, fps=15)

    def fail() -> None:
        with film:
            film.add(plain(0))
            raise RuntimeError("the game crashed")

    with pytest.raises(RuntimeError, match="the game crashed"):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["film.mp4"]


def filmed(path: Path, pictures: int) -> None:
    with VideoWriter(path, fps=15) as film:
        for number in range(pictures):
            film.add(plain(number))


@pytest.mark.parametrize(
    ("name", "pictures", "says"),
    [
        ("film.avi", 1, "ends in .mp4 or .gif"),
        ("film", 1, "ends in .mp4 or .gif"),
        ("none/film.mp4", 1, "cannot be written"),
        ("none/film.gif", 1, "cannot be written"),
        ("film.mp4", 0, "at least one picture"),
        ("folder.mp4", 1, "cannot be written"),
    ],
)
def test_a_place_that_cannot_hold_a_film_is_one_line(
    tmp_path: Path, name: str, pictures: int, says: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=says) as error:
        filmed(tmp_path / name, pictures)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_a_caption_is_below_a_picture_of_a_television_s_shape() -> None:
    screen = Emulator("freeway").rgb()
    bare, one, two = (caption(screen, ["score 1"] * count) for count in range(3))
    assert WIDTH * 3 == HEIGHT * 4
    for picture in (bare, one, two):
        assert picture.shape[1] == WIDTH
        assert picture.shape[0] % 2 == 0  # as H.264 needs it
        assert (picture[:HEIGHT] == bare[:HEIGHT]).all()
    assert bare[HEIGHT:].max() == 0
    assert one[HEIGHT:].max() > 200
    assert two.shape[0] > one.shape[0] > bare.shape[0]


@pytest.mark.parametrize(
    ("name", "flags", "pictures"),
    [
        ("demo.mp4", [], 30),  # of 60 frames
        ("demo.gif", ["--from", "20", "--to", "41"], 6),  # of 21
    ],
)
def test_the_video_of_a_demo_has_the_frames_asked_for(
    tmp_path: Path, name: str, flags: list[str], pictures: int
) -> None:
    demo = record("freeway", np.full(60, 2, np.uint8), frame_skip=1)
    demo.save(tmp_path / "demo")
    out = tmp_path / name
    assert cli.main(["demo", "video", str(tmp_path / "demo"), "--out", str(out), *flags]) == 0
    found = decoded(out)
    assert len(found) == pictures
    last = int(flags[-1]) - 1 if flags else len(demo) - 1
    emulator = Emulator("freeway")
    screens = {frame: emulator.rgb() for frame, _ in replay(demo, emulator)}
    expected = caption(np.maximum(screens[last], screens[last - 1]), [])[:HEIGHT]
    assert np.abs(found[-1][:HEIGHT].astype(int) - expected).mean() < 12
