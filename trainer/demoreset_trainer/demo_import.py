"""OpenAI's published demonstrations, as demos of ours.

They are pickles of the actions (as indices into the game's own actions), rewards, lives, and every
100 frames a state of the emulator of 2018. That emulator began a game in another state, so that a
replay may drift; its states cannot be loaded today, but the console's RAM can be read out of them,
and where a replay drifts, setting the bytes that differ puts it right.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError
from demoreset_trainer import demo_pickle
from demoreset_trainer.demo import Demo, Difference, read_file, record, refuse_packed
from demoreset_trainer.emulator import RAM_BYTES, Emulator, rom_md5

MAX_BYTES = 32 << 20  # two and a half hours of play, at 55 bytes a frame
_RAM_MARK = b"M6532"  # in a state: the mark, an int32 128, and one int32 for each byte of RAM
_ROM_MARK = re.compile(rb"\x20\x00\x00\x00([0-9a-f]{32})")  # a text of 32 letters: the ROM's MD5
_RAM_FIRST = np.int32(RAM_BYTES).tobytes()


@dataclass(frozen=True)
class Recording:
    """A published demonstration. lives [T] is None where the file has none.

    rams: the RAM before the action of some frames. rom: MD5 of the ROM it was played on.
    """

    actions: npt.NDArray[np.int64]  # indices into the game's own actions
    rewards: npt.NDArray[np.int64]
    lives: npt.NDArray[np.int64] | None
    rams: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    rom: str | None = None


def read(source: Path, game: str | None = None) -> Demo:
    """Import a published demonstration: every reward and every life as recorded.

    `game`: ale-py's name of it; by default the file's name says it (MontezumaRevenge.demo).

    Raises:
        UserError: the file is not one, is of another game, or its replay cannot be made exact.
    """
    recording = parse(read_file(source, MAX_BYTES), str(source))
    game = game or _guess(source)
    emulator = Emulator(game)
    codes = np.array(emulator.minimal_actions, np.uint8)
    if recording.actions.max() >= len(codes):
        raise UserError(
            f"{source}: actions hold {recording.actions.max()}; {game} has the actions 0 to "
            f"{len(codes) - 1}: is it a recording of another game? --game names it"
        )
    actions = codes[recording.actions]
    patches, bare = _play(recording, actions, emulator, {})
    if bare is not None:
        patches, difference = _play(recording, actions, emulator, recording.rams)
        if difference is not None:
            raise UserError(_not_exact(source, recording, game, bare, difference))
    origin = {"imported_from": source.name}
    if recording.rom not in (None, rom_md5(game)):
        origin["rom_of_recording"] = str(recording.rom)
    return record(
        game, actions, frame_skip=_frame_skip(actions), patches=_rows(patches), origin=origin
    )


def parse(content: bytes, name: str) -> Recording:
    """What a published file holds; `name` is what error messages call it.

    Raises:
        UserError: it is damaged, or not one.
    """
    refuse_packed(content, name)
    if content[:1] != b"\x80" or content[8:9] == b"{":
        hint = " (it looks like a demo of ours: nothing to import)" if content[8:9] == b"{" else ""
        raise UserError(f"{name}: not a pickle, as OpenAI published demonstrations{hint}")
    fields = demo_pickle.read(content, name)
    if not isinstance(fields, dict):
        raise UserError(f"{name}: holds a {type(fields).__name__}; a dictionary is needed")
    actions = _whole(fields, "actions", name)
    if len(actions) == 0 or actions.min() < 0:
        worst = f"{actions.min()} among them" if len(actions) else "none"
        raise UserError(f"{name}: actions: received {worst}; indices from 0 are needed")
    rams, rom = _checkpoints(fields, len(actions), name)
    return Recording(
        actions,
        _per_action(_whole(fields, "rewards", name), "rewards", len(actions), name),
        _per_action(_whole(fields, "lives", name), "lives", len(actions), name)
        if "lives" in fields
        else None,
        rams,
        rom,
    )


def _whole(fields: dict[str, Any], key: str, name: str) -> npt.NDArray[np.int64]:
    if key not in fields:
        raise UserError(f"{name}: {key} are missing")
    try:
        found = demo_pickle.numbers(fields[key])
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name}: {key}: received {error}") from None
    strange = (found != np.rint(found)) | (np.abs(found) >= 2**31)
    if strange.any():
        raise UserError(f"{name}: {key}: received {found[strange][0]}; whole numbers are needed")
    return found.astype(np.int64)


def _per_action(
    values: npt.NDArray[np.int64], key: str, actions: int, name: str
) -> npt.NDArray[np.int64]:
    """One value for each action; where there is one more, the first is of the game's own start."""
    if len(values) not in (actions, actions + 1):
        raise UserError(f"{name}: {key}: received {len(values)} for {actions} actions")
    return values[len(values) - actions :]


def _checkpoints(
    fields: dict[str, Any], frames: int, name: str
) -> tuple[dict[int, npt.NDArray[np.uint8]], str | None]:
    states = fields.get("checkpoints", [])
    places = _whole({"checkpoint_action_nr": [], **fields}, "checkpoint_action_nr", name)
    if not isinstance(states, list) or len(states) != len(places):
        raise UserError(f"{name}: checkpoints and checkpoint_action_nr are not equally many")
    rams: dict[int, npt.NDArray[np.uint8]] = {}
    rom = None
    for place, state in zip(places.tolist(), states, strict=True):
        if not 0 <= place <= frames:
            raise UserError(f"{name}: checkpoint_action_nr: received {place} of {frames} actions")
        if not isinstance(state, demo_pickle.Array) or state.numbers is None:
            raise UserError(f"{name}: checkpoints: received a {type(state).__name__}, no array")
        raw = state.numbers.tobytes()
        ram = _ram(raw)
        if ram is not None and place < frames:
            rams[place] = ram
        if rom is None and (found := _ROM_MARK.search(raw)):
            rom = found[1].decode()
    return rams, rom


def _ram(state: bytes) -> npt.NDArray[np.uint8] | None:
    """The console's RAM in an old state; None where it is not found."""
    first = state.find(_RAM_MARK + _RAM_FIRST) + len(_RAM_MARK) + len(_RAM_FIRST)
    last = first + 4 * RAM_BYTES
    if first < len(_RAM_MARK) + len(_RAM_FIRST) or last > len(state):
        return None
    ram = np.frombuffer(state[first:last], "<i4")
    return ram.astype(np.uint8) if ((ram >= 0) & (ram < 256)).all() else None


def _guess(source: Path) -> str:
    """ale-py's name of the game in a file's name: MontezumaRevenge.demo is montezuma_revenge."""
    game = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", source.name.split(".")[0]).lower()
    try:
        rom_md5(game)
    except UserError as error:
        raise UserError(
            f"{source}: its name does not say the game; --game does (montezuma_revenge, ...)"
        ) from error
    return game


def _play(
    recording: Recording,
    actions: npt.NDArray[np.uint8],
    emulator: Emulator,
    rams: Mapping[int, npt.NDArray[np.uint8]],
) -> tuple[list[tuple[int, int, int]], Difference | None]:
    """Replay a recording, with its RAM set where `rams` has it.

    Returns (frame, address, value) of each byte that had to be set, and the first difference.
    """
    emulator.reset()
    rewards = recording.rewards.tolist()
    lives = None if recording.lives is None else recording.lives.tolist()
    patches: list[tuple[int, int, int]] = []
    for frame, action in enumerate(actions.tolist()):
        if frame in rams:
            ram = rams[frame]
            for address in np.flatnonzero(emulator.ram() != ram).tolist():
                emulator.poke(address, int(ram[address]))
                patches.append((frame, address, int(ram[address])))
        reward = emulator.act(action)
        if reward != rewards[frame]:
            return patches, Difference(frame, "reward", rewards[frame], reward)
        if lives is not None and lives[frame] != emulator.lives():
            return patches, Difference(frame, "lives", lives[frame], emulator.lives())
    return patches, None


def _not_exact(
    source: Path, recording: Recording, game: str, bare: Difference, patched: Difference
) -> str:
    best = max(bare, patched, key=lambda difference: difference.frame)
    rom = f" (recorded on the ROM {recording.rom})" if recording.rom else ""
    if recording.rams:
        why = f"{best}, and the RAM of its {len(recording.rams)} checkpoints does not repair it"
    else:
        why = f"{best}, and it has no checkpoints to repair it with"
    return (
        f"{source}: does not replay as {game}{rom}: {why}; if it is another game, --game names it"
    )


def _frame_skip(actions: npt.NDArray[np.uint8]) -> int:
    """Frames per action of the recording: the widest grid, up to 8, that all changes lie on."""
    grid = math.gcd(*(np.flatnonzero(np.diff(actions)) + 1).tolist())
    return max(frames for frames in range(1, 9) if grid % frames == 0) if grid else 1


def _rows(patches: list[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
    return np.array(patches, np.int32).reshape(-1, 3)
