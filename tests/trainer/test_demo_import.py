"""Published demos: all five exact; a hostile pickle is refused, and nothing of it is run."""

import builtins
import gzip
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from demoreset_api.errors import UserError
from demoreset_trainer import cli, demo_import, demo_pickle
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import Demo, record, replay, verify
from demoreset_trainer.emulator import Emulator, rom_md5

UP = 2  # the joystick's code; Freeway's own actions are 0 (nothing), 1 (up) and 2 (down)
CHICKEN = 14  # the address of its height in Freeway's memory
FRAMES = 180


def played(patches: npt.NDArray[np.int32] | None = None) -> Demo:
    return record("freeway", np.full(FRAMES, UP, np.uint8), frame_skip=1, patches=patches)


PLAIN = played()


def published(demo: Demo = PLAIN, **changes: object) -> dict[str, Any]:
    """The demo's play as atari-demo wrote it: a value more of lives, numpy's numbers as rewards."""
    rams = {}
    emulator = Emulator(demo.game)
    for frame, _ in replay(demo, emulator):
        if (frame + 1) % 50 == 0 and frame + 1 < len(demo):
            rams[frame + 1] = emulator.ram()
    content = {
        "actions": [1] * len(demo),
        "rewards": [np.float64(reward) for reward in demo.rewards],
        "lives": [0, *demo.lives.tolist()],
        "checkpoints": [state(ram) for ram in rams.values()],
        "checkpoint_action_nr": list(rams),
        "signed_rewards": [np.sign(reward) for reward in demo.rewards.tolist()],
    }
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


def state(ram: npt.NDArray[np.uint8], rom: str = "0" * 32) -> npt.NDArray[np.uint8]:
    """What the old emulator wrote, as far as it is of use."""
    name = struct.pack("<i", len(rom)) + rom.encode()
    memory = b"M6532" + struct.pack("<i", len(ram)) + ram.astype("<i4").tobytes()
    return np.frombuffer(b"\x01\x02\x03" + name + memory + bytes(40), np.uint8)


def write(path: Path, content: object, protocol: int = 3) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def refusal(path: Path, game: str | None = None) -> str:
    """The one line that refuses a file."""
    with pytest.raises(UserError) as error:
        demo_import.read(path, game)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_recording_is_imported_from_every_protocol(tmp_path: Path, protocol: int) -> None:
    demo = demo_import.read(write(tmp_path / "Freeway.demo", published(), protocol))
    assert demo.game == "freeway"
    assert (demo.actions == UP).all()
    assert (demo.rewards == PLAIN.rewards).all()
    assert len(demo.patches) == 0
    assert demo.origin == {"imported_from": "Freeway.demo", "rom_of_recording": "0" * 32}
    assert verify(demo) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": [0, *PLAIN.rewards.tolist()]},  # Pong's: one more than actions
        {"rewards": PLAIN.rewards.astype(float)},
        {"lives": None},
        {"lives": PLAIN.lives.tolist()},
        {"checkpoints": None, "checkpoint_action_nr": None},
        {"checkpoints": [np.zeros(9, np.uint8)], "checkpoint_action_nr": [100]},
        {"actions": np.ones(FRAMES, ">i8")},
    ],
)
def test_a_recording_may_lack_what_is_not_needed(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write(tmp_path / "any.demo", published(**changes))
    demo = demo_import.read(path, "freeway")
    assert (demo.rewards == PLAIN.rewards).all()


def test_drift_is_repaired_from_the_checkpoints_and_only_there(tmp_path: Path) -> None:
    patches = np.array([[100, CHICKEN, 140]], np.int32)  # as if the old emulator drifted here
    recorded = played(patches)
    assert recorded.scores[-1] == PLAIN.scores[-1] == 1
    assert (recorded.rewards != PLAIN.rewards).any()
    path = write(tmp_path / "Freeway.demo", published(recorded))
    demo = demo_import.read(path)
    assert (demo.rewards == recorded.rewards).all()
    assert (demo.patches == patches).all()
    assert verify(demo) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoints": [], "checkpoint_action_nr": []}, "no checkpoints to repair it with"),
        ({"lives": [3] * FRAMES}, "frame 0: lives recorded 3, replayed 0"),
        ({"rewards": [1, *[0] * (FRAMES - 1)]}, "frame 0: reward recorded 1, replayed 0"),
    ],
)
def test_drift_that_cannot_be_repaired_is_told(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    recorded = played(np.array([[100, CHICKEN, 140]], np.int32))
    said = refusal(write(tmp_path / "Freeway.demo", published(recorded, **changes)))
    assert "does not replay as freeway" in said
    assert says in said


def test_another_game_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "Freeway.demo", published())
    assert "does not replay as pong" in refusal(path, "pong")
    assert "no game 'nosuch'" in refusal_of_game(path)
    unnamed = write(tmp_path / "best-of-2018.demo", published())
    assert "its name does not say the game; --game does" in refusal(unnamed)


def refusal_of_game(path: Path) -> str:
    with pytest.raises(UserError, match="game") as error:
        demo_import.read(path, "nosuch")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"actions": None}, "actions are missing"),
        ({"rewards": None}, "rewards are missing"),
        ({"actions": []}, "actions: received none"),
        ({"actions": [-1] * FRAMES}, "actions: received -1 among them"),
        ({"actions": [3] * FRAMES}, "actions hold 3; freeway has the actions 0 to 2"),
        ({"actions": [10**300] * FRAMES}, "whole numbers are needed"),
        ({"actions": [10**320 * 10**200] * FRAMES}, "actions: received int too large"),
        ({"actions": [0.5] * FRAMES}, "received 0.5; whole numbers"),
        ({"actions": [float("nan")] * FRAMES}, "NaN"),
        ({"rewards": np.full(FRAMES, np.inf)}, "an infinite number"),
        ({"actions": ["up"] * FRAMES}, "str among the numbers"),
        ({"actions": [[1]] * FRAMES}, "list among the numbers"),
        ({"actions": "up"}, "str, not a list"),
        ({"rewards": [0.0] * (FRAMES - 1)}, "rewards: received 179 for 180 actions"),
        ({"lives": [0] * (FRAMES + 2)}, "lives: received 182 for 180 actions"),
        ({"checkpoints": []}, "not equally many"),
        ({"checkpoints": 3}, "not equally many"),
        ({"checkpoints": ["x"], "checkpoint_action_nr": [1]}, "received a str, no array"),
        ({"checkpoint_action_nr": [-1, 50, 100]}, "received -1 of 180 actions"),
        ({"checkpoint_action_nr": [50, 100, 10**12]}, "whole numbers are needed"),
        ({"checkpoint_action_nr": [50, 100, 181]}, "received 181 of 180 actions"),
    ],
)
def test_impossible_content_is_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    content = published()
    content.update({key: value for key, value in changes.items() if value is not None})
    for key in [key for key, value in changes.items() if value is None]:
        del content[key]
    assert says in refusal(write(tmp_path / "Freeway.demo", content))


class Calls:
    """Pickles into a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (builtins.eval, "eval"), (builtins.getattr, "getattr")],
)
def test_nothing_that_a_pickle_names_is_run(
    tmp_path: Path, function: Callable[..., object], name: str, protocol: int
) -> None:
    ran = tmp_path / "ran"
    arguments = {
        "system": (f"touch {ran}",),
        "eval": (f"open({str(ran)!r}, 'w')",),
        "getattr": (ran, "touch"),
    }[name]
    hidden = Calls(function, *arguments)
    for content in (hidden, published(lives=[hidden]), [[[{"x": (1, hidden)}]]]):
        said = refusal(write(tmp_path / "Freeway.demo", content, protocol))
        assert "nothing of it was run" in said
        # Path and posix come before the function's own name where they are arguments of it.
        assert f".{name}" in said or "names" in said
    assert not ran.exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "not a pickle"),  # protocol 0 has no mark of its own
        (b"\x80\x03cos\nsystem\n.", "it names 'os.system'"),
        (b"\x80\x03cnumpy\nload\n.", "it names 'numpy.load'"),
        (b"\x80\x03cnumpy\ndtype.__class__\n.", "it names"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "it names"),
        (b"\x80\x03(S'touch ran'\nios\nsystem\n.", "the instruction"),
        (b"\x80\x03(cnumpy\ndtype\no.", "the instruction OBJ"),
        (b"\x80\x03cnumpy\ndtype\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x04cnumpy\ndtype\n)}\x92.", "the instruction NEWOBJ_EX"),
        (b"\x80\x03\x82\x01.", "the instruction EXT1"),
        (b"\x80\x03K\x01Q.", "the instruction BINPERSID"),
        (b"\x80\x03P1\n.", "the instruction PERSID"),
        (b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
        (b"\x80\x03]2].", "the instruction DUP"),
        (b"\x80\x03cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", "it holds arrays of 'O'"),
        (b"\x80\x03cnumpy\ndtype\nX\x03\x00\x00\x00S99\x85R.", "it holds arrays of 'S99'"),
        (b"\x80\x03cnumpy\ndtype\n}b.", "damaged"),  # would change numpy itself
        (b"\x80\x03cnumpy\ndtype\nK\x01\x85R.", "damaged"),
        (b"\x80\x03.", "damaged"),
        (b"\x80\x03]", "damaged"),
        (b"\x80\x03e.", "damaged"),
        (b"\x80\x03K\x01\x86.", "damaged"),
        (b"\x80\x03h\x07.", "damaged"),
        (b"\x80\x03]K\x01s.", "damaged"),
        (b"\x80\x03}]K\x01s.", "damaged"),
        (b"\x80\x03}(X\x01\x00\x00\x00au.", "damaged"),
        (b"\x80\x03\x8a\xff\x01.", "damaged"),
        (b"\x80\x03X\x02\x00\x00\x00\xff\xff.", "damaged"),
        (b"\x80\x03K\x01.", "holds a int; a dictionary is needed"),
        (b"\x80\x03].", "holds a list"),
        (b"\x80", "damaged"),
    ],
)
def test_a_program_is_refused(tmp_path: Path, program: bytes, says: str) -> None:
    assert says in refusal(write(tmp_path / "Freeway.demo", program))


def array(shape: int, content: bytes, kind: str = "u1") -> bytes:
    """A program that makes an array and claims its length."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        + b"(K\x01\x8a\x08"
        + shape.to_bytes(8, "little", signed=True)
        + b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00"
        + kind.encode()
        + b"\x85R\x89C"
        + bytes([len(content)])
        + content
        + b"tb"
    )


def test_the_array_program_is_a_good_one() -> None:
    made = demo_pickle.read(b"\x80\x03" + array(4, b"\1\2\3\4") + b".", "x")
    assert demo_pickle.numbers(made).tolist() == [1, 2, 3, 4]


LAUGHS = b"\x80\x03]q\x00" + b"".join(
    b"](" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    for level in range(60)
)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x03" + array(10**15, b"\1\2\3\4") + b".",
        b"\x80\x03" + array(-1, b"\1\2\3\4") + b".",
        b"\x80\x03" + array(-(2**63), b"") + b".",
        b"\x80\x03" + array(4, b"\1\2\3\4", "i8") + b".",
        b"\x80\x03]r\xff\xff\xff\xff.",  # Python's own machine would make a table of 64 GB
        b"\x80\x03B\xff\xff\xff\x7f\x00.",  # bytes that are not there
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"].",
        b"\x80\x03\x8b\xff\xff\xff\x7f\x00.",
        b"\x80\x03" + b"]" * 100_000 + b"a" * 99_999 + b".",  # a list in a list in a list ...
        LAUGHS + b".",
        b"\x80\x03}X\x07\x00\x00\x00actions" + LAUGHS[2:] + b"s.",
        gzip.compress(bytes(50 << 20)),
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_a_bomb_takes_little_memory(tmp_path: Path, program: bytes) -> None:
    path = write(tmp_path / "Freeway.demo", program)
    tracemalloc.start()
    try:
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 << 20


def test_so_many_instructions_are_no_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_pickle, "MAX_INSTRUCTIONS", 1000)
    path = write(tmp_path / "Freeway.demo", b"\x80\x04]" + b"\x94" * 999 + b".")
    assert "most: 1,000 instructions" in refusal(path)


def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    short = {"actions": [1, 1], "rewards": [np.float64(0)] * 2, "checkpoints": [np.arange(3)]}
    whole = pickle.dumps(short, 4)
    assert "not equally many" in refusal(write(tmp_path / "Freeway.demo", whole))
    for end in range(1, len(whole)):
        assert "damaged" in refusal(write(tmp_path / "Freeway.demo", whole[:end]))


SMALL = pickle.dumps(
    {"actions": [1, 0], "rewards": [np.float64(0)] * 2, "x": np.arange(3, dtype=np.uint8)}, 3
)


@settings(max_examples=300, deadline=None)
@example(48, b"\\")  # an escape that is none
@given(st.integers(2, len(SMALL) - 1), st.binary(min_size=1, max_size=6))
def test_a_damaged_pickle_is_refused_or_holds_numbers(place: int, damage: bytes) -> None:
    try:
        recording = demo_import.parse(SMALL[:place] + damage + SMALL[place + len(damage) :], "x")
    except UserError:
        return
    assert recording.actions.dtype == recording.rewards.dtype == np.int64
    assert recording.actions.min() >= 0


def test_a_demo_of_ours_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "Freeway.demo"
    PLAIN.save(path)
    assert "nothing to import" in refusal(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "received a folder"),
        (Path.touch, "is empty"),
        (lambda path: None, "No such file"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_what_is_no_file_is_told(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "Freeway.demo"
    make(path)
    assert says in refusal(path)


def test_too_large_a_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "Freeway.demo"
    with path.open("wb") as file:
        file.truncate(demo_import.MAX_BYTES + 1)  # no blocks on the disk
    assert "too large" in refusal(path)


def test_the_command_keeps_what_is_there_and_exits_64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "Freeway.demo", published()), tmp_path / "out.demo"
    out.write_bytes(b"mine")
    arguments = ["demo", "import", str(source), "--out", str(out)]
    assert cli.main(arguments) == 64
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert cli.main([*arguments, "--force"]) == 0
    assert "freeway, 180 frames, score 1; every reward and life" in capsys.readouterr().out
    assert cli.main(["demo", "verify", str(out)]) == 0
    good = out.read_bytes()
    write(source, Calls(os.system, "true"))
    assert cli.main([*arguments, "--force"]) == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert out.read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["Freeway.demo", "out.demo"]


def test_a_rom_of_the_recording_that_is_ours_is_not_noted(tmp_path: Path) -> None:
    states = [state(np.zeros(128, np.uint8), rom_md5("freeway"))]
    content = published(checkpoints=states, checkpoint_action_nr=[100])
    demo = demo_import.read(write(tmp_path / "Freeway.demo", content))
    assert demo.origin == {"imported_from": "Freeway.demo"}


# name, game, frames, score, frames per action, bytes patched, frames with a patch
PUBLISHED = [
    ("MontezumaRevenge", "montezuma_revenge", 53_061, 71_500, 1, 7, [100]),
    ("PrivateEye", "private_eye", 8_749, 100_400, 4, 0, []),
    ("Pitfall", "pitfall", 42_036, 48_990, 3, 0, []),
    ("Gravitar", "gravitar", 36_603, 16_000, 3, 3_385, list(range(100, 36_601, 100))),
    ("Pong", "pong", 22_869, 5, 3, 0, []),
]
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "demos"
FOLDER = Path(os.environ.get("DEMORESET_PUBLISHED_DEMOS") or _BESIDE)


@pytest.mark.published
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no published demos: {FOLDER} is not there")
@pytest.mark.parametrize(("name", "game", "frames", "score", "skip", "size", "places"), PUBLISHED)
def test_a_published_demo_is_imported_with_every_reward_and_life(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    game: str,
    frames: int,
    score: int,
    skip: int,
    size: int,
    places: list[int],
) -> None:
    source, out = FOLDER / f"{name}.demo", tmp_path / f"{game}{demos.SUFFIX}"
    assert cli.main(["demo", "import", str(source), "--out", str(out)]) == 0
    demo = demos.load(out)
    assert (demo.game, len(demo), demo.scores[-1], demo.frame_skip) == (game, frames, score, skip)
    assert len(demo.patches) == size
    assert sorted(set(demo.patches[:, 0].tolist())) == places
    recording = demo_import.parse(source.read_bytes(), name)
    assert (demo.rewards == recording.rewards).all()
    assert (recording.lives is None) == (name == "Pong")
    assert recording.lives is None or (demo.lives == recording.lives).all()
    capsys.readouterr()
    assert cli.main(["demo", "verify", str(out)]) == 0
    assert "The replay is exact." in capsys.readouterr().out
