"""Checkpoints on disk: whole or not there, whatever happens while they are written.

A checkpoint is a folder `ckpt-l{life}-u{update}` with `model.safetensors`, `optimizer.safetensors`,
`state.json`, and, written last, `MANIFEST.json` with the size and SHA-256 of the others and of
itself. It is made under a hidden name, every file and the folder are flushed to the disk, then it
is renamed. No pickle anywhere. `lives` order the checkpoints of a run whose members died and came
back.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from demoreset_api.errors import DemoResetError, NoValidCheckpoint, TryAgain, UserError
from demoreset_trainer import lives
from demoreset_trainer.disk import (
    DAMAGE,
    flush_folder,
    not_now,
    sweep,
    write_flushed,
    write_whole,
)

SCHEMA = 1
MANIFEST, BEST = "MANIFEST.json", "BEST"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_FILES = (MODEL, OPTIMIZER, STATE)
_PARTIAL, _BROKEN = ".partial-", "broken-"
_MAX_MANIFEST_BYTES = 1 << 16
_MAX_BYTES = 1 << 30  # of any other file: a hundred times what the largest policy needs
_DEAD_WRITER = 5.0  # seconds
_NEXT = 2.0  # seconds from the end of one that was in flight to the beginning of the last

_log = logging.getLogger(__name__)


class Damaged(DemoResetError):
    """A checkpoint that does not verify."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that is needed to go on: weights, the optimiser's moments, and the rest as JSON."""

    life: int
    update: int
    frames: int
    members: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return lives.checkpoint_name(self.life, self.update)

    def copy(self) -> "Snapshot":
        """One that does not change when training goes on; on the CPU."""
        return replace(
            self,
            model=_copy(self.model),
            optimizer=_copy(self.optimizer),
            state=deepcopy(self.state),
        )


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = torch.contiguous_format  # the only one that safetensors knows
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=layout)
        for name, tensor in tensors.items()
    }


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint into `folder`; it is there as a whole when this returns.

    Raises:
        ValueError: a value is not finite: it must not push out good checkpoints.
        TakenOver: a later life owns the folder, or has come to own it meanwhile; then this one is
            there, and nothing may follow from it.
        OSError: the disk is full, read-only, or away; what was there before is as it was.
    """
    check_finite(snapshot.model | snapshot.optimizer)
    lives.check(folder, snapshot.life)
    target = folder / snapshot.name
    if target.exists():  # the same update of the same life is the same state
        return target
    files = _files(snapshot)
    manifest = {
        "schema": SCHEMA,
        "life": snapshot.life,
        "update": snapshot.update,
        "frames": snapshot.frames,
        "members": snapshot.members,
        "files": {name: _facts(content) for name, content in files.items()},
    }
    sealed = json.dumps(manifest | {"sha256": _seal(manifest)}, indent=2)
    partial = folder / f"{_PARTIAL}{uuid4().hex}"
    try:
        partial.mkdir()
        for name, content in files.items():
            write_flushed(partial / name, content)
        write_flushed(partial / MANIFEST, sealed.encode())
        flush_folder(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
            shutil.rmtree(partial, ignore_errors=True)  # another member wrote the same meanwhile
        flush_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    lives.check(folder, snapshot.life)  # this process may have been frozen for long
    return target


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse what nothing can be learned from, nor played by.

    Raises:
        ValueError: names a tensor that has a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")


def pack(snapshot: Snapshot, extra: dict[str, Any]) -> bytes:
    """A snapshot, and JSON beside it, as bytes for another member: the files in a row."""
    files = _files(snapshot.copy())
    header = {name: getattr(snapshot, name) for name in ("life", "update", "frames", "members")} | {
        "sizes": [len(content) for content in files.values()],
        "extra": extra,
    }
    encoded = json.dumps(header).encode()
    return b"".join([len(encoded).to_bytes(8, "big"), encoded, *files.values()])


def unpack(content: bytes) -> tuple[Snapshot, dict[str, Any]]:
    """What `pack` was given."""
    behind = 8 + int.from_bytes(content[:8], "big")
    header = json.loads(content[8:behind])
    sizes, extra = header.pop("sizes"), header.pop("extra")
    bounds = [behind, *(behind + end for end in itertools.accumulate(sizes))]
    model, optimizer, state = (content[low:high] for low, high in itertools.pairwise(bounds))
    return Snapshot(
        model=load_tensors(model),
        optimizer=load_tensors(optimizer),
        state=json.loads(state),
        **header,
    ), extra


def _files(snapshot: Snapshot) -> dict[str, bytes]:
    return {
        MODEL: save_tensors(snapshot.model),
        OPTIMIZER: save_tensors(snapshot.optimizer),
        STATE: json.dumps(snapshot.state).encode(),
    }


def _facts(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest: a flipped bit in its counters would load without a word."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Snapshot:
    """Read a checkpoint that verifies, onto the CPU.

    Raises:
        UserError: it is not a checkpoint, damaged, or of another version.
        TryAgain: the disk does not answer.
    """
    try:
        return _read(path)
    except Damaged as error:
        raise UserError(f"{path}: {error}; give another checkpoint, or the run's folder") from error


def _read(path: Path) -> Snapshot:
    manifest = _manifest(path)
    try:
        contents = {name: _verified(path / name, manifest["files"][name]) for name in _FILES}
        snapshot = Snapshot(
            life=int(manifest["life"]),
            update=int(manifest["update"]),
            frames=int(manifest["frames"]),
            members=int(manifest["members"]),
            model=load_tensors(contents[MODEL]),
            optimizer=load_tensors(contents[OPTIMIZER]),
            state=json.loads(contents[STATE]),
        )
        check_finite(snapshot.model | snapshot.optimizer)
        return snapshot
    except (*DAMAGE, SafetensorError) as error:
        raise Damaged(f"damaged checkpoint ({error})") from error


def _manifest(path: Path) -> dict[str, Any]:
    content = _content(path / MANIFEST, most=_MAX_MANIFEST_BYTES)
    try:
        manifest: dict[str, Any] = json.loads(content)
        seal, schema = manifest.pop("sha256"), manifest["schema"]
    except DAMAGE as error:
        raise Damaged(f"not a checkpoint, or torn: {MANIFEST} cannot be parsed") from error
    if seal != _seal(manifest):
        raise Damaged(f"{MANIFEST} is torn or was changed: its hash is another")
    if schema != SCHEMA:  # whole, but not ours: nothing that may be set aside as broken
        raise UserError(
            f"{path}: written by another version of demoreset (schema {schema}; this version "
            f"reads {SCHEMA}); go on with that version"
        )
    return manifest


def _verified(path: Path, facts: dict[str, Any]) -> bytes:
    if facts["bytes"] > _MAX_BYTES:
        raise Damaged(f"{path.name} has more bytes than any policy needs")
    content = _content(path, most=facts["bytes"])
    if _facts(content) != facts:
        raise Damaged(f"{path.name} is torn or was changed: its size or hash is another")
    return content


def _content(path: Path, most: int) -> bytes:
    """A file's bytes, one more than `most` at most."""
    try:
        with path.open("rb") as file:
            # Memory is taken for what is there, not for what a manifest claims.
            return file.read(max(0, min(os.fstat(file.fileno()).st_size, most)) + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"not a checkpoint, or torn: {path.name} is missing") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    except OSError as error:  # a disk that is away says nothing about what is on it
        raise TryAgain(f"{path}: cannot be read now: {error.strerror}") from error


def _listed(folder: Path) -> list[tuple[int, int, Path]]:
    """(life, update, path) of all that is called a checkpoint, oldest first."""
    both = ((lives.named(path), path) for path in folder.iterdir())
    return sorted((*name, path) for name, path in both if name is not None)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; None where there never was one.

    Damaged ones that are newer are renamed to `broken-...` and kept for a person to look at; where
    none verifies, all stay as they are. Only the run's owner may call this, others `find`.

    Raises:
        NoValidCheckpoint: there are some, and none verifies.
        UserError: the newest is of another version.
        TryAgain: the disk does not answer.
    """
    found, damaged = _search(folder)
    for path, reason in damaged.items():
        _log.warning("%s does not verify and is set aside: %s", path, reason)
        with suppress(OSError):  # a read-only disk: it is passed over again next time
            path.rename(path.with_name(_BROKEN + path.name))
    return found


def _search(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and what is wrong with those that are newer."""
    damaged: dict[Path, str] = {}
    try:
        listed = _listed(folder) if folder.is_dir() else []
    except OSError as error:
        raise TryAgain(f"{folder}: cannot be read now: {error.strerror}") from error
    for _, _, path in reversed(listed):
        try:
            if _read(path).name == path.name:
                return path, damaged
            damaged[path] = "it is a copy of another checkpoint"
        except Damaged as error:
            if path.exists():  # else it was pruned while we looked
                damaged[path] = str(error)
    broken = sorted(path.name for path in folder.glob(_BROKEN + "*"))
    if damaged or broken:
        reasons = [f"{path.name}: {reason}" for path, reason in damaged.items()]
        raise NoValidCheckpoint(
            f"{folder}: no checkpoint there verifies ({'; '.join(reasons + broken)}); restore one "
            "from a backup, or begin anew with --fresh"
        )
    return None, damaged


def find(path: Path) -> Path:
    """A checkpoint from what a person names: itself, the folder of all, or the run's folder.

    Raises:
        UserError: there is none.
        NoValidCheckpoint: there are some, and none verifies.
    """
    if (path / MANIFEST).exists() or lives.named(path):
        return path
    for folder in (path / "checkpoints", path):
        found, _ = _search(folder)
        if found is not None:
            return found
    raise UserError(
        f"{path}: no checkpoint there; give a run's folder (runs/NAME) or one of its checkpoints"
    )


def settle(folder: Path, patience: float, dead: float = _DEAD_WRITER) -> None:
    """Wait while somebody writes a checkpoint there, `patience` seconds at most.

    A member that leaves saves after the others have gone on without it, and on a slow volume for
    longer than its successor needs to come: who reads before that loses what was learned since.
    One that does not grow for `dead` seconds was left by a writer that was killed. After one that
    was finished another may follow: what was due when its writer was told to leave, and then all.
    """
    begun = moved = time.monotonic()
    before = _unfinished(folder)
    if not before:
        return
    while time.monotonic() < min(begun + patience, moved + (dead if before else _NEXT)):
        time.sleep(0.1)
        if (now := _unfinished(folder)) != before:
            before, moved = now, time.monotonic()


def _unfinished(folder: Path) -> dict[str, list[int]]:
    """Checkpoints that are being written, or were when their writer died: their files' sizes."""
    found = {}
    for partial in folder.glob(_PARTIAL + "*"):
        with suppress(OSError):  # it is whole now, or gone
            found[partial.name] = [file.stat().st_size for file in sorted(partial.iterdir())]
    return found


def next_life(folder: Path) -> int:
    """Take the next life of a run whose state is read from here, and clear away what others left.

    Raises:
        TryAgain: the disk is full, read-only, or away.
    """
    try:
        for partial in folder.glob(_PARTIAL + "*"):
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise not_now(folder, error) from error
    return lives.take(folder)


def mark_best(folder: Path, path: Path) -> None:
    """Remember a checkpoint as the best, so that it is not pruned.

    Raises:
        TakenOver: a later life owns the folder, and knows better.
    """
    named = lives.named(path)
    assert named is not None
    lives.check(folder, named[0])
    write_whole(folder / BEST, f"{path.name}\n".encode())


def best(folder: Path) -> Path | None:
    """The checkpoint that was marked as the best, if it is there."""
    try:
        return _best(folder)
    except OSError:
        return None


def best_state(folder: Path) -> dict[str, Any] | None:
    """The state in the checkpoint that was marked as the best; None where there is none.

    Raises:
        OSError, TryAgain: it cannot be told now.
    """
    if (path := _best(folder)) is None:
        return None
    try:
        return dict(json.loads(_content(path / STATE, most=_MAX_BYTES)))
    except (Damaged, *DAMAGE):
        return None


def _best(folder: Path) -> Path | None:
    try:
        path = folder / (folder / BEST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return path if lives.named(path) and path.is_dir() else None


def _first_of_each(listed: list[tuple[int, int, Path]], every: int) -> set[Path | None]:
    """Of the checkpoints within every so many updates the first; it stays the first."""
    first: dict[int, Path] = {}
    for _, update, path in listed:
        first.setdefault(update // every, path)
    return set(first.values())


def prune(folder: Path, keep: int, every: int | None = None) -> None:
    """Delete all but some, if the newest verifies.

    Args:
        folder: Of the checkpoints.
        keep: How many of the newest stay, at least 1; the best stays, too.
        every: So does the first of every so many updates.
    """
    found = _listed(folder)
    if not found:
        return
    listed = [path for _, _, path in found]
    try:
        _read(listed[-1])
    except Damaged:
        return  # an older one may be the only one left
    protected = {_best(folder)} | (_first_of_each(found, every) if every else set())
    for path in listed[: -max(keep, 1)]:
        if path not in protected:
            # Renamed first: half a deletion must not look like a checkpoint.
            doomed = path.with_name(f"{_PARTIAL}{uuid4().hex}")
            with suppress(FileNotFoundError):  # another member did it
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    now = listed[-1].stat().st_mtime  # by the disk's own clock: writers' clocks differ
    sweep(folder.glob(_PARTIAL + "*"), now)
