"""Demos: whole or refused, exact or told where not; and the commands that show and cut them."""

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from demoreset_api.errors import UserError
from demoreset_trainer import cli, demo_plot
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import SUFFIX, UNKNOWN_LIVES, Demo, from_bytes, record, verify

UP, DOWN = 2, 5
CHICKEN = 14  # the address of its height in Freeway's memory


def crossing(frames: int = 180, patches: npt.NDArray[np.int32] | None = None) -> Demo:
    """Freeway, always up: the first point comes at frame 172."""
    actions = np.full(frames, UP, np.uint8)
    return record("freeway", actions, frame_skip=4, patches=patches, origin={"by": "a test"})


CROSSING = crossing()
GOOD = CROSSING.to_bytes()


def header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(
        json.loads(content[8 : 8 + size])["__metadata__"]["demo"],
    )
    return found


def with_header(**changes: object) -> bytes:
    """The good demo's file with other entries in its header."""
    changed = json.dumps({**header(GOOD), **changes})
    return save_tensors(load_tensors(GOOD), metadata={"demo": changed})


def with_metadata(**more: str) -> bytes:
    """The good demo's file with more beside its header."""
    return save_tensors(load_tensors(GOOD), metadata={"demo": json.dumps(header(GOOD)), **more})


def with_tensors(**changes: npt.NDArray[np.generic]) -> bytes:
    """The good demo's file with other arrays."""
    tensors = {**load_tensors(GOOD), **changes}
    return save_tensors(tensors, metadata={"demo": json.dumps(header(GOOD))})


def claiming(shape: list[int], offsets: list[int]) -> bytes:
    """A file whose header claims an array that is not there."""
    entry = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"actions": entry}).encode()
    return len(text).to_bytes(8, "little") + text


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("demo", content)
    return file.getvalue()


def test_a_demo_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    CROSSING.save(path)
    found = demos.load(path)
    assert found.to_bytes() == path.read_bytes() == GOOD
    assert (found.actions == CROSSING.actions).all()
    assert found.origin == {"by": "a test"}
    assert os.listdir(tmp_path) == [path.name]


def test_the_bundled_demos_are_exact() -> None:
    assert {"freeway-crossing", "montezuma-first-key"} <= set(demos.bundled())
    for name in demos.bundled():
        demo = demos.load(demos.find(name))
        assert verify(demo) is None
        assert demo.to_bytes() == demos.find(name).read_bytes()  # its hash is the file's


def test_a_header_that_begins_like_a_pickle_is_a_demo() -> None:
    """A file begins with the length of its header, and 0x80 is where a pickle begins."""
    for padding in range(0, 300, 4):
        demo = replace(CROSSING, origin={"by": "x" * padding})
        if demo.to_bytes()[0] == 0x80:
            assert len(from_bytes(demo.to_bytes(), "x")) == len(CROSSING)
            return
    pytest.fail("no such header was made")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["empty"]),
        (b"\0" * 8, ["not a demo"]),
        (GOOD[:7], ["not a demo, or a damaged one"]),
        (GOOD[:-1], ["not a demo, or a damaged one"]),
        (GOOD[: len(GOOD) // 2], ["not a demo, or a damaged one"]),
        (GOOD + b"\0", ["not a demo, or a damaged one"]),
        (b"\x80\x03}q\x00.", ["pickle", "demoreset demo import"]),
        (gzip.compress(GOOD), ["gzip file", "unpack"]),
        (gzip.compress(bytes(50 << 20)), ["gzip file", "unpack"]),
        (zipped(bytes(50 << 20)), ["zip file", "unpack"]),
        (b"\xff" * 8 + b"{}", ["damaged"]),  # a header of 2^64 bytes
        (claiming([2**40], [0, 2**40]), ["damaged"]),
        (claiming([2**62, 2**62], [0, 0]), ["damaged"]),
        (claiming([-1], [0, 0]), ["damaged"]),
        (claiming([0], [8, 0]), ["damaged"]),
        (save_tensors(load_tensors(GOOD)), ["damaged"]),  # no header of ours
        (with_header(format="demoreset-demo/9"), ["'demoreset-demo/9'", "demoreset-demo/1"]),
        (with_header(game="no_game"), ["no game 'no_game'"]),
        (with_header(game="../../etc/passwd"), ["no game"]),
        (with_header(game="pong"), ["another ROM of pong", header(GOOD)["rom"]]),
        (with_header(rom="0" * 32), ["another ROM of freeway", "0" * 32]),
        (with_header(frame_skip="0"), ["frame_skip is 0"]),
        (with_header(frame_skip="-4"), ["frame_skip is -4"]),
        (with_header(frame_skip="four"), ["damaged"]),
        (with_header(frame_skip=float("inf")), ["damaged"]),
        (with_header(frame_skip=float("nan")), ["damaged"]),
        (with_header(frame_skip="9" * 5000), ["damaged"]),
        (with_header(origin="[1]"), ["damaged"]),
        (with_header(origin="[" * 100_000), ["damaged"]),
        (
            with_header(more="x"),
            ["the entry of the header 'more' is none of a demo's (format, game"],
        ),
        (
            with_tensors(more=np.zeros(1)),
            ["the array 'more' is none of a demo's (actions, rewards"],
        ),
        (with_metadata(more="x"), ["the metadata 'more' is none of a demo's (demo)"]),
        (with_tensors(actions=np.full(180, 18, np.uint8)), ["actions hold 18", "0 to 17"]),
        (with_tensors(actions=np.full(180, 2, np.int64)), ["actions", "uint8"]),
        (with_tensors(actions=np.full(180, np.nan)), ["actions", "uint8"]),
        (with_tensors(actions=np.zeros(0, np.uint8)), ["1 to"]),
        (with_tensors(actions=np.array(3, np.uint8)), ["actions must be a list"]),
        (with_tensors(actions=np.zeros((0, 9), np.uint8)), ["actions must be a list"]),
        (with_tensors(rewards=np.zeros(179, np.int32)), ["180 actions"]),
        (with_tensors(lives=np.full(180, -2, np.int16)), ["lives hold -2"]),
        (with_tensors(ram_hashes=np.zeros(9, np.uint64)), ["ram_hashes"]),
        (with_tensors(patches=np.array([[0, 128, 0]], np.int32)), ["patch", "outside"]),
        (with_tensors(patches=np.array([[0, 0, 256]], np.int32)), ["patch", "outside"]),
        (with_tensors(patches=np.array([[181, 0, 0]], np.int32)), ["patch", "outside"]),
        (with_tensors(patches=np.array([[-1, 0, 0]], np.int32)), ["patch", "outside"]),
        (with_tensors(patches=np.zeros((0, 2), np.int32)), ["patches", "rows"]),
    ],
)
def test_a_bad_file_is_one_line_that_says_what_is_wrong(
    tmp_path: Path, content: bytes, says: list[str]
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        demos.load(path)
    for part in [str(path), *says]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert path.read_bytes() == content


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_refused_or_still_a_demo(place: int, damage: bytes) -> None:
    content = GOOD[:place] + damage + GOOD[place + len(damage) :]
    try:
        found = from_bytes(content, "x")
    except UserError:
        return
    assert len(found.rewards) == len(found)


def folder(path: Path) -> None:
    path.mkdir()


def loop_of_links(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (folder, "received a folder"),
        (os.mkfifo, "no regular file"),
        (loop_of_links, "cannot be read"),
        (Path.touch, "is empty"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_is_told_at_once(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    path = tmp_path / f"x{SUFFIX}"
    make(path)
    with pytest.raises(UserError, match=says):
        demos.load(path)


def test_a_file_without_end_is_not_read() -> None:
    with pytest.raises(UserError, match="no regular file"):
        demos.load(Path("/dev/zero"))


def test_a_file_that_is_too_large_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(11))
    with pytest.raises(UserError, match="too large"):
        demos.read_file(path, 10)
    assert demos.read_file(path, 11) == bytes(11)


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    for path in (tmp_path / "none" / "x", taken):
        with pytest.raises(UserError, match="cannot be written"):
            CROSSING.save(path)
    assert os.listdir(tmp_path) == ["taken"]


def flipped(values: npt.NDArray[Any], place: int, value: int) -> npt.NDArray[Any]:
    changed = values.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        ("rewards", 40, 1, "frame 40: reward recorded 1, replayed 0"),
        ("rewards", 171, 0, "frame 171: reward recorded 0, replayed 1"),
        ("lives", 7, 3, "frame 7: lives recorded 3, replayed 0"),
        ("actions", 60, DOWN, "frame 100: RAM hash recorded"),
        ("actions", 130, DOWN, "frame 171: reward recorded 1, replayed 0"),
        ("ram_hashes", 0, 1, "frame 0: RAM hash recorded 1"),
        ("ram_hashes", 1, 1, "frame 100: RAM hash recorded 1"),
    ],
)
def test_verify_finds_one_wrong_value(name: str, place: int, value: int, says: str) -> None:
    assert verify(CROSSING) is None
    changed: dict[str, Any] = {name: flipped(getattr(CROSSING, name), place, value)}
    difference = verify(replace(CROSSING, **changed))
    assert str(difference).startswith(says)


def test_lives_that_were_not_recorded_are_not_compared() -> None:
    unknown = np.full(len(CROSSING), UNKNOWN_LIVES, np.int16)
    assert verify(replace(CROSSING, lives=unknown)) is None


def test_every_prefix_is_exact_also_where_it_ends_at_a_patch() -> None:
    patches = np.array([[50, CHICKEN, 100], [100, CHICKEN, 140]], np.int32)
    demo = crossing(200, patches)
    assert demo.scores[138] == 1  # the patch was played: the crossing took 34 frames less
    for end in (1, 49, 50, 99, 100, 101, 137, 199, 200):
        prefix = from_bytes(demo.prefix(end).to_bytes(), "x")
        assert verify(prefix) is None
        assert (prefix.rewards == demo.rewards[:end]).all()


@pytest.mark.parametrize("end", [0, -3, 181])
def test_a_prefix_lies_in_the_demo(end: int) -> None:
    with pytest.raises(UserError, match=rf"received {end}; the demo has frames 1 to 180"):
        CROSSING.prefix(end)


def demoreset(capsys: pytest.CaptureFixture[str], *arguments: object, expect: int = 0) -> str:
    """Run the command `demoreset demo`; what it printed."""
    code = cli.main(["demo", *map(str, arguments)])
    printed = capsys.readouterr()
    assert code == expect, printed
    if expect > 1:
        assert printed.err.startswith("demoreset: ")
        assert printed.err.count("\n") == 1
    return printed.out + printed.err


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with the crossing in it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"crossing{SUFFIX}"
    CROSSING.save(path)
    return path


def test_info_and_verify_take_a_name_or_a_file(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved.parent / "freeway-crossing").mkdir()  # a run's folder does not hide the bundled demo
    for name in ("freeway-crossing", saved, saved.name):
        info = demoreset(capsys, "info", name)
        assert "freeway" in info
        assert "172        +1         1" in info
        checked = demoreset(capsys, "verify", name)
        for part in ("file", "ROM", "rewards", "lives", "memory", "The replay is exact."):
            assert part in checked


def test_a_hash_that_is_not_the_files_own_is_told(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("info", "verify"):
        saved.write_bytes(GOOD)
        assert "not of this file" not in demoreset(capsys, command, saved)
        saved.write_bytes(with_header(frame_skip=4))  # a number, where we write text
        assert f"{CROSSING.sha256} of the demo as demoreset writes it, not of this file" in (
            demoreset(capsys, command, saved)
        )


def test_info_is_in_words(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(CROSSING, origin={"imported_from": "x"}).save(saved)
    info = demoreset(capsys, "info", saved)
    assert "1 in 1 reward\n" in info
    assert "imported from" in info


def test_verify_exits_1_with_the_first_difference(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(CROSSING, rewards=flipped(CROSSING.rewards, 40, 1)).save(saved)
    out = demoreset(capsys, "verify", saved, expect=1)
    assert "differs at frame 40: reward recorded 1, replayed 0" in out
    assert "exact" not in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nosuch", "no bundled demo of that name; there are: freeway-crossing"),
        ("no/such", "No such file"),
        (f"nosuch{SUFFIX}", "No such file"),
        (".", "received a folder"),
        ("", "no bundled demo"),
        ("a\0b/c", "null byte"),
    ],
)
@pytest.mark.parametrize("command", ["info", "verify", "plot", "video"])
def test_an_unknown_demo_is_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, says: str
) -> None:
    assert says in demoreset(capsys, command, name, expect=64)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_strangers_text_does_not_reach_the_terminal_as_it_is(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(CROSSING, origin={"by\n\x1b[2J": "\x1b]0;title\x07"}).save(saved)
    out = demoreset(capsys, "info", saved)
    assert "\x1b" not in out
    assert "\x07" not in out


@pytest.mark.parametrize(
    ("end", "length", "says"), [(172, 172, "written"), (180, 172, "frame 180 is not right after")]
)
def test_trim_cuts_at_the_last_gain(
    saved: Path, capsys: pytest.CaptureFixture[str], end: int, length: int, says: str
) -> None:
    out = saved.parent / "short.demo"
    printed = demoreset(capsys, "trim", saved, "--end", end, "--out", out)
    assert says in printed
    assert f"{length} frames, score 1" in printed
    short = demos.load(out)
    assert (len(short), short.rewards[-1]) == (length, 1)
    assert verify(short) is None
    assert short.origin["trimmed"] == "the first 172 of 180 frames"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (171, "the first gain of score ends at frame 172"),
        (0, "frames 1 to 180"),
        (-5, "frames 1 to 180"),
        (181, "frames 1 to 180"),
    ],
)
def test_trim_refuses_an_end_without_a_gain(
    saved: Path, capsys: pytest.CaptureFixture[str], end: int, says: str
) -> None:
    out = saved.parent / "short.demo"
    assert says in demoreset(capsys, "trim", saved, "--end", end, "--out", out, expect=64)
    assert not out.exists()


def test_a_loss_is_no_place_to_cut(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(CROSSING, rewards=flipped(CROSSING.rewards, 171, -1)).save(saved)
    out = demoreset(capsys, "trim", saved, "--end", 180, "--out", "short.demo", expect=64)
    assert "never gains" in out


@pytest.mark.parametrize("command", [["trim", "--end", "172"], ["plot"], ["video"]])
def test_what_is_there_is_kept_without_force(
    saved: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    out = saved.parent / {"trim": "x.demo", "plot": "x.png", "video": "x.gif"}[command[0]]
    shutil.copy(saved, out)
    arguments = [command[0], saved, *command[1:], "--out", out]
    assert "--force" in demoreset(capsys, *arguments, expect=64)
    assert out.read_bytes() == GOOD
    demoreset(capsys, *arguments, "--force")
    assert out.read_bytes() != GOOD
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, out.name])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plot", "--out", "x.jpg"], "must end in .png"),
        (["plot", "--out", "none/x.png"], "there is no folder"),
        (["video", "--out", "x.avi"], "must end in .mp4 or .gif"),
        (["trim", "--end", "172", "--out", "."], "is a folder"),
        (["trim", "--end", "172", "--out", "none/x"], "there is no folder"),
        (["video", "--from", "180"], "frames 0 to 179"),
        (["video", "--from", "-1"], "frames 0 to 179"),
        (["video", "--from", "20", "--to", "20"], "behind --from there are 21 to 180"),
        (["video", "--to", "181"], "received 181"),
    ],
)
def test_a_wrong_flag_is_named_before_any_work(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert says in demoreset(capsys, arguments[0], saved, *arguments[1:], expect=64)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_plot_has_the_score_the_rewards_and_the_lives(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "crossing.png" in demoreset(capsys, "plot", saved)
    picture = cv2.imread(str(saved.parent / "crossing.png"))
    assert picture is not None
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # lines, letters, colours
    score, rewards, lives = demo_plot.draw(CROSSING, "crossing").axes
    assert np.array_equal(score.lines[0].get_ydata(), CROSSING.scores)
    assert np.concatenate([line.get_xdata() for line in rewards.lines[:2]]).tolist() == [172]
    assert np.array_equal(lives.lines[0].get_ydata(), CROSSING.lives)


def test_a_plot_says_that_lives_were_not_recorded() -> None:
    demo = replace(CROSSING, lives=np.full(180, UNKNOWN_LIVES, np.int16))
    lives = demo_plot.draw(demo, "x").axes[2]
    assert [text.get_text() for text in lives.texts] == ["not recorded"]
