"""OpenAI's published demonstrations, as demos of ours.

They are pickles of numpy arrays and plain containers. Nothing else is admitted: a pickle can name
any function, and loading it would call it. They were recorded on an emulator with another start
state: where a replay drifts, the RAM that lies in their own checkpoints puts it right.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError
from demoreset_trainer.demo import MAX_FILE_BYTES, MAX_FRAMES, Demo, record
from demoreset_trainer.emulator import RAM_BYTES, Emulator

_SIMPLE = re.compile(r"[<>|=]?[biuf][1248]|bool|u?int\d+|float\d+")
_RAM_MARK = b"M6532"  # before the RAM in the old emulator's states: a count, then one int32 a byte


class _Unpickler(pickle.Unpickler):
    """Knows numpy's arrays and scalars, by stand-ins that build nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {"_reconstruct": _empty, "ndarray": "ndarray", "scalar": _scalar}
        if module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy"):
            if name in stand_ins:
                return stand_ins[name]
            if name == "dtype":
                return _dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise UserError(
            f"it names {module}.{name}, which a demo has no use for: a pickle can run any program, "
            "so it was not loaded"
        )


def _empty(*_: object) -> npt.NDArray[Any]:
    """An array whose content the pickle's next step sets."""
    return np.zeros(0, np.uint8)


def _dtype(kind: object, *_: object) -> np.dtype[Any]:
    if not isinstance(kind, str) or not _SIMPLE.fullmatch(kind):
        raise UserError(f"it holds arrays of {str(kind)[:20]!r}; a demo has numbers only")
    return np.dtype(kind)


def _scalar(kind: object, content: object) -> Any:
    if not isinstance(kind, np.dtype) or not isinstance(content, bytes):
        raise UserError("it holds a number that is none")
    return np.frombuffer(content, kind, count=1)[0].item()


def _encode(text: object, coding: object = "latin1") -> bytes:
    if not isinstance(text, str) or coding != "latin1":
        raise UserError("it holds text in an unknown coding")
    return text.encode("latin1")


def read(source: Path, game: str | None = None) -> Demo:
    """Read a published demonstration, and replay it with every reward and life equal.

    `game`: ale-py's name of it; default by the file's name (MontezumaRevenge.demo).

    Raises:
        UserError: it cannot be read, admits no exact replay, or is not what it should be.
    """
    content = _load(source)
    game = game or re.sub(r"(?<!^)(?=[A-Z])", "_", source.name.split(".")[0]).lower()
    codes = np.array(Emulator(game).minimal_actions, np.uint8)
    try:
        index = _numbers(content, "actions")
        rewards = _numbers(content, "rewards")
        lives = _numbers(content, "lives") if "lives" in content else None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if not len(index) or index.min() < 0 or index.max() >= len(codes):
        raise UserError(
            f"{source}: its actions go from {index.min(initial=0)} to {index.max(initial=0)}; "
            f"{game} has {len(codes)}: is it a recording of another game? (--game)"
        )
    # Where there is one entry more, entry i + 1 belongs to action i: all lives, Pong's rewards.
    rewards = rewards[len(rewards) == len(index) + 1 :]
    lives = None if lives is None else lives[len(lives) == len(index) + 1 :]
    if len(rewards) != len(index) or (lives is not None and len(lives) != len(index)):
        raise UserError(f"{source}: actions, rewards and lives are not equally many")
    actions = codes[index]
    for patches in (None, _patches(source, content, game, actions)):
        demo = record(
            game,
            actions,
            frame_skip=1,
            patches=patches,
            origin={"imported_from": source.name},
        )
        wrong = demo.rewards != rewards
        if lives is not None:
            wrong = wrong | (demo.lives != lives)
        if not wrong.any():
            return demo
    frame = int(np.flatnonzero(wrong)[0])
    raise UserError(
        f"{source}: its replay differs from the recording at frame {frame} (reward "
        f"{demo.rewards[frame]}, recorded {rewards[frame]}): it cannot be imported"
    )


def _load(source: Path) -> dict[str, Any]:
    try:
        size = source.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{source}: {size} bytes are too many (most: {MAX_FILE_BYTES})")
        raw = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if raw[:1] != b"\x80":
        raise UserError(f"{source}: not a pickle, as OpenAI published demonstrations")
    try:
        content = _Unpickler(io.BytesIO(raw)).load()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # a hostile pickle can make the machinery raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: damaged, or not a demonstration ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds {type(content).__name__}, not a demonstration")
    return content


def _numbers(content: dict[str, Any], name: str) -> npt.NDArray[np.int64]:
    if name not in content:
        raise UserError(f"it has no {name}")
    try:
        numbers = np.asarray(content[name])
        exact = numbers.astype(np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"its {name} are not numbers") from error
    if numbers.ndim != 1 or len(numbers) > MAX_FRAMES + 1 or (exact != numbers).any():
        raise UserError(f"its {name} are not a list of at most {MAX_FRAMES} whole numbers")
    return exact


def _patches(
    source: Path, content: dict[str, Any], game: str, actions: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int32]:
    """Bytes of RAM that differ from the recording's at its own checkpoints."""
    rams = _rams(source, content, len(actions))
    emulator = Emulator(game)
    emulator.reset()
    patches = []
    for frame, action in enumerate(actions.tolist()):
        if frame in rams:
            for address in np.flatnonzero(emulator.ram() != rams[frame]).tolist():
                value = int(rams[frame][address])
                emulator.poke(address, value)
                patches.append((frame, address, value))
        emulator.act(action)
    return np.array(patches, np.int32).reshape(-1, 3)


def _rams(source: Path, content: dict[str, Any], frames: int) -> dict[int, npt.NDArray[np.uint8]]:
    """The RAM at each of the recording's checkpoints, by frame."""
    states = content.get("checkpoints", [])
    try:
        places = [int(place) for place in content.get("checkpoint_action_nr", [])]
        found = {}
        for place, state in zip(places, states, strict=True):
            raw = np.asarray(state, np.uint8).tobytes()
            first = raw.index(_RAM_MARK) + len(_RAM_MARK) + 4
            ram = np.frombuffer(raw, "<i4", count=RAM_BYTES, offset=first)
            if 0 <= place < frames:
                found[place] = ram.astype(np.uint8)
        return found
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: its checkpoints cannot be read ({error})") from error
