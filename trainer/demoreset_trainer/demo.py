"""What a demonstration is: its file, its replay, and the proof that the replay is exact.

A demo is the actions of one game, frame by frame, from the game's own start, with what is needed
to check a replay. It holds no emulator states: these are made by replaying (`states`).

Positions are frames: at frame f, actions[0..f-1] have been played and actions[f] comes next.
"""

import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from demoreset_api.errors import UserError
from demoreset_trainer.disk import DAMAGE, fault, write_whole, writing
from demoreset_trainer.emulator import ALL_ACTIONS, RAM_BYTES, Emulator, emulator_version, rom_md5

SUFFIX = ".demo.safetensors"
FORMAT = "demoreset-demo/1"
HASH_EVERY = 100  # frames between two hashes of the RAM
UNKNOWN_LIVES = -1
MAX_FILE_BYTES = 256 << 20
MAX_FRAMES = 10_000_000
_PACKED = {"zip": b"PK\x03\x04", "gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}

_PACKAGE = Path(__file__).resolve().parent
BUNDLED = (_PACKAGE / "bundled", _PACKAGE.parents[1] / "demos")  # a wheel, a checkout

_ARRAYS = {
    "actions": np.uint8,
    "rewards": np.int32,
    "lives": np.int16,
    "ram_hashes": np.uint64,
    "patches": np.int32,
}


_HEADER = ("format", "game", "rom", "frame_skip", "origin")


@dataclass(frozen=True)
class Demo:
    """A recorded game of T frames.

    actions [T]: ALE's joystick codes, 0..17. rewards [T]: of each action. lives [T]: after each
    action, UNKNOWN_LIVES where the recording lacks them. ram_hashes: of the RAM at power-on and
    before the actions HASH_EVERY, 2 * HASH_EVERY, .. (T // HASH_EVERY + 1 of them). patches [n, 3]:
    (frame, address, value), bytes of RAM set before that frame's action, for recordings of
    emulators with another start state; at frame T they belong to the end, for its hash.
    """

    game: str
    rom: str  # MD5 of the ROM
    frame_skip: int  # frames per action of the recording
    actions: npt.NDArray[np.uint8]
    rewards: npt.NDArray[np.int32]
    lives: npt.NDArray[np.int16]
    ram_hashes: npt.NDArray[np.uint64]
    patches: npt.NDArray[np.int32]
    origin: dict[str, str] = field(default_factory=dict)  # who made it, with which seed

    def __len__(self) -> int:
        return len(self.actions)

    @cached_property
    def scores(self) -> npt.NDArray[np.int64]:
        """Score at each frame, [T + 1]: scores[f] is the sum of the rewards of actions 0..f-1."""
        return np.concatenate([[0], np.cumsum(self.rewards, dtype=np.int64)])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content: safetensors with a JSON header."""
        header = {
            "format": FORMAT,
            "game": self.game,
            "rom": self.rom,
            "frame_skip": str(self.frame_skip),
            "origin": json.dumps(self.origin, sort_keys=True),
        }
        tensors = {
            name: np.ascontiguousarray(getattr(self, name), dtype=dtype)
            for name, dtype in _ARRAYS.items()
        }
        return save_tensors(tensors, metadata={"demo": json.dumps(header, sort_keys=True)})

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: the place cannot be written to.
        """
        with writing(path):
            write_whole(path, self.to_bytes())

    def prefix(self, end: int) -> "Demo":
        """The demo's first `end` frames.

        Raises:
            UserError: `end` is not inside the demo.
        """
        if not 1 <= end <= len(self):
            raise UserError(
                f"spec.demo.endFrame: received {end}; the demo has frames 1 to {len(self)}"
            )
        if end == len(self):
            return self
        return replace(
            self,
            actions=self.actions[:end],
            rewards=self.rewards[:end],
            lives=self.lives[:end],
            ram_hashes=self.ram_hashes[: end // HASH_EVERY + 1],
            patches=self.patches[self.patches[:, 0] <= end],
        )


def load(path: Path) -> Demo:
    """Read a demo and check all that can be checked without playing it.

    Raises:
        UserError: the file is missing, torn, of another kind, or its content impossible.
    """
    return from_bytes(read_file(path, MAX_FILE_BYTES), str(path))


def read_file(path: Path, most: int) -> bytes:
    """The content of a file of 1 to `most` bytes.

    Raises:
        UserError: there is none, it cannot be read, or it is empty or too large.
        TryAgain: the disk does not answer now.
    """
    try:
        facts = path.stat()
        # A pipe or a device has no end, and opening one may already wait for ever.
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise UserError(f"{path}: received {kind}; a demonstration is a file")
        with path.open("rb") as file:
            content = file.read(min(facts.st_size, most) + 1)
    except OSError as error:
        raise fault(error)(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not content:
        raise UserError(f"{path}: the file is empty; a demonstration has at least one frame")
    if len(content) > most:
        raise UserError(f"{path}: too large for a demonstration (most: {most:,} bytes)")
    return content


def from_bytes(content: bytes, name: str) -> Demo:
    """Parse a demo's file; `name` is what error messages call it."""
    if content[:1] == b"\x80" and content[8:9] != b"{":  # safetensors has its header there
        raise UserError(
            f"{name}: this is a pickle, as OpenAI published demos; "
            f"`demoreset demo import {shlex.quote(name)} --out NAME{SUFFIX}` turns it into a demo"
        )
    refuse_packed(content, name)
    try:
        tensors = load_tensors(content)
        header_bytes = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_bytes]).get("__metadata__", {})
        header = json.loads(metadata["demo"])
        kind = str(header["format"])
        game, rom = str(header["game"]), str(header["rom"])
        frame_skip = int(header["frame_skip"])
        origin = {str(key): str(value) for key, value in json.loads(header["origin"]).items()}
    except (*DAMAGE, SafetensorError) as error:
        if b'"__metadata__":{"card":' in content[:64]:
            raise UserError(
                f"{name}: this is a policy, not a demo; `demoreset evaluate {shlex.quote(name)}`"
            ) from error
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{name}: not a demo, or a damaged one ({reason})") from error
    if kind != FORMAT:
        raise UserError(f"{name}: format {kind[:40]!a} is unknown; this version reads {FORMAT!r}")
    # What is not read would not be in the hash, by which two files would be the same demo.
    for kind, found, known in (
        ("array", tensors, _ARRAYS),
        ("metadata", metadata, ("demo",)),
        ("entry of the header", header, _HEADER),
    ):
        if strange := sorted(set(found) - set(known)):
            raise UserError(
                f"{name}: the {kind} {strange[0][:40]!a} is none of a demo's ({', '.join(known)})"
            )
    for array, dtype in _ARRAYS.items():
        if array not in tensors or tensors[array].dtype != dtype:
            raise UserError(f"{name}: {array} is missing or not {np.dtype(dtype).name}")
    demo = Demo(
        game=game,
        rom=rom,
        frame_skip=frame_skip,
        origin=origin,
        **{array: tensors[array] for array in _ARRAYS},
    )
    _check(demo, name)
    return demo


def refuse_packed(content: bytes, name: str) -> None:
    """Refuse a compressed file: nothing here unpacks one, so that none can be a bomb.

    Raises:
        UserError: it is one.
    """
    for kind, magic in _PACKED.items():
        if content.startswith(magic):
            raise UserError(f"{name}: received a {kind} file; unpack it first")


def _check(demo: Demo, name: str) -> None:
    frames = demo.actions.size
    if demo.actions.ndim != 1 or not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"{name}: actions must be a list of 1 to {MAX_FRAMES} frames")
    if demo.rewards.shape != (frames,) or demo.lives.shape != (frames,):
        raise UserError(
            f"{name}: rewards and lives must have one entry for each of {frames} actions"
        )
    worst = int(demo.actions.max())
    if worst >= len(ALL_ACTIONS):
        raise UserError(f"{name}: actions hold {worst}; the joystick's codes are 0 to 17")
    if demo.ram_hashes.shape != (frames // HASH_EVERY + 1,):
        raise UserError(f"{name}: ram_hashes must have one entry every {HASH_EVERY} frames")
    patches = demo.patches
    if patches.ndim != 2 or patches.shape[1] != 3:
        raise UserError(f"{name}: patches must be rows of frame, address, value")
    if int(demo.lives.min()) < UNKNOWN_LIVES:
        raise UserError(f"{name}: lives hold {int(demo.lives.min())}; a game has 0 or more")
    low, high = np.array([0, 0, 0]), np.array([frames + 1, RAM_BYTES, 256])
    if len(patches) and not ((patches >= low) & (patches < high)).all():
        raise UserError(f"{name}: a patch lies outside the demo or the RAM")
    if not 1 <= demo.frame_skip <= MAX_FRAMES:
        raise UserError(f"{name}: frame_skip is {demo.frame_skip}; it must be at least 1")
    try:
        rom = rom_md5(demo.game)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if demo.rom != rom:
        raise UserError(
            f"{name}: recorded on another ROM of {demo.game} (MD5 {demo.rom[:32]!a}; "
            f"ale-py {emulator_version()} has {rom!r})"
        )


def find(name: str) -> Path:
    """The file of a bundled demo.

    Raises:
        UserError: there is none of that name.
    """
    for folder in BUNDLED:
        path = folder / f"{name}{SUFFIX}"
        if path.exists():
            return path
    known = ", ".join(bundled()) or "none"
    raise UserError(f"spec.demo.name: no bundled demo {name!r}; there are: {known}")


def locate(name: str) -> Path:
    """The file that a person means: a bundled demo's name, or else a path.

    Raises:
        UserError: it is neither.
    """
    if name in bundled():
        return find(name)
    path = Path(name)
    if name and (name.endswith(SUFFIX) or os.sep in name or path.exists()):
        return path
    known = ", ".join(bundled()) or "none"
    raise UserError(
        f"{name or 'DEMO'}: no such file, and no bundled demo of that name; there are: {known}"
    )


def resolve(demo: Demo | Path | str) -> Demo:
    """The demo that a caller means: itself, a file of one, or as `locate` understands a name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if isinstance(demo, Demo):
        return demo
    return load(locate(demo) if isinstance(demo, str) else demo)


def bundled() -> list[str]:
    """Names of the bundled demos."""
    files = (path for folder in BUNDLED for path in folder.glob(f"*{SUFFIX}"))
    return sorted({path.name.removesuffix(SUFFIX) for path in files})


def ram_hash(ram: npt.NDArray[np.uint8]) -> int:
    """64 bits of the RAM's SHA-256."""
    return int.from_bytes(hashlib.sha256(ram.tobytes()).digest()[:8], "little")


def replay(demo: Demo, emulator: Emulator) -> Iterator[tuple[int, int]]:
    """Play the demo from the game's own start; yield (frame, reward) after each action.

    The emulator stands at frame + 1 when (frame, reward) is yielded; patches of the next frame are
    applied already, so that a state saved there continues exactly.
    """
    patches: dict[int, list[tuple[int, int]]] = {}
    for frame, address, value in demo.patches.tolist():
        patches.setdefault(frame, []).append((address, value))
    emulator.reset()
    for address, value in patches.get(0, ()):
        emulator.poke(address, value)
    act = emulator.act
    for frame, action in enumerate(demo.actions.tolist()):
        reward = act(action)
        for address, value in patches.get(frame + 1, ()):
            emulator.poke(address, value)
        yield frame, reward


@dataclass(frozen=True)
class Difference:
    """The first frame at which a replay and its recording differ."""

    frame: int
    what: str
    recorded: int
    replayed: int

    def __str__(self) -> str:
        return f"frame {self.frame}: {self.what} recorded {self.recorded}, replayed {self.replayed}"


def verify(demo: Demo, emulator: Emulator | None = None) -> Difference | None:
    """Replay every frame; return the first difference in reward, lives or RAM, or None."""
    return next(filter(None, compared(demo, emulator or Emulator(demo.game))), None)


def compared(demo: Demo, emulator: Emulator) -> Iterator[Difference | None]:
    """Replay the demo; yields with the emulator at each frame from 0 on, and in what it differs.

    Frame 0 is the game's own start, whatever the demo patches there.
    """
    emulator.reset()
    yield _compared_ram(demo, 0, emulator)
    lives = demo.lives.tolist()
    for frame, reward in replay(demo, emulator):
        if reward != demo.rewards[frame]:
            yield Difference(frame, "reward", int(demo.rewards[frame]), reward)
        elif lives[frame] not in (UNKNOWN_LIVES, emulator.lives()):
            yield Difference(frame, "lives", lives[frame], emulator.lives())
        else:
            yield _compared_ram(demo, frame + 1, emulator)


def _compared_ram(demo: Demo, frame: int, emulator: Emulator) -> Difference | None:
    if frame % HASH_EVERY:
        return None
    recorded, replayed = int(demo.ram_hashes[frame // HASH_EVERY]), ram_hash(emulator.ram())
    return Difference(frame, "RAM hash", recorded, replayed) if recorded != replayed else None


def record(
    game: str,
    actions: npt.NDArray[np.uint8],
    *,
    frame_skip: int,
    patches: npt.NDArray[np.int32] | None = None,
    origin: dict[str, str] | None = None,
) -> Demo:
    """Play the actions (one joystick code per frame) from the game's own start into a demo."""
    emulator = Emulator(game)
    demo = Demo(
        game=game,
        rom=rom_md5(game),
        frame_skip=frame_skip,
        actions=np.asarray(actions, dtype=np.uint8),
        rewards=np.zeros(len(actions), np.int32),
        lives=np.zeros(len(actions), np.int16),
        ram_hashes=np.zeros(len(actions) // HASH_EVERY + 1, np.uint64),
        patches=np.zeros((0, 3), np.int32) if patches is None else patches,
        origin=origin or {},
    )
    emulator.reset()
    demo.ram_hashes[0] = ram_hash(emulator.ram())
    for frame, reward in replay(demo, emulator):
        demo.rewards[frame] = reward
        demo.lives[frame] = emulator.lives()
        if (frame + 1) % HASH_EVERY == 0:
            demo.ram_hashes[(frame + 1) // HASH_EVERY] = ram_hash(emulator.ram())
    return demo
