"""The archive of an exploration as a file: safetensors with a JSON header, whole or not there."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from demoreset_api.errors import UserError
from demoreset_trainer.disk import write_whole
from demoreset_trainer.emulator import emulator_version
from demoreset_trainer.explore import Archive, Cell, Grid

FORMAT = "demoreset-archive/1"
MAX_BYTES = 16 << 30


def write(archive: Archive, path: Path) -> None:
    """Write the archive."""
    cells = list(archive.cells.items())
    header = {
        "format": FORMAT,
        "emulator": emulator_version(),
        "game": archive.game,
        "seed": archive.seed,
        "wanted": archive.wanted,
        "grid": asdict(archive.grid),
        "rounds": archive.rounds,
        "decisions": archive.decisions,
        "first_at": archive.first_at,
    }
    facts = [(cell.score, cell.length, cell.node, cell.chosen) for _, cell in cells]
    tensors = {
        "facts": np.array(facts, np.int64).reshape(-1, 4),
        "parents": np.array([parent for parent, _ in archive.ways], np.int64),
    }
    lists = {
        "keys": [key for key, _ in cells],
        "states": [cell.state for _, cell in cells],
        "ways": [actions for _, actions in archive.ways],
        "candidates": archive.candidates,
    }
    for name, pieces in lists.items():
        tensors[name] = np.frombuffer(b"".join(pieces), np.uint8)
        tensors[f"{name}_ends"] = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    write_whole(path, save(tensors, metadata={"archive": json.dumps(header)}))


def read(path: Path) -> Archive:
    """Read an archive.

    Raises:
        UserError: it is damaged, or of another kind or emulator.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for an archive (most: {MAX_BYTES} bytes)")
        content = path.read_bytes()
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["archive"])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        if header["emulator"] != emulator_version():
            raise UserError(
                f"{path}: made with ale-py {header['emulator']}, this is {emulator_version()}: "
                "its states do not fit; choose another --archive"
            )
        lists = {}
        for name in ("keys", "states", "ways", "candidates"):
            ends = tensors[f"{name}_ends"].tolist()
            whole = tensors[name].tobytes()
            lists[name] = [whole[low:high] for low, high in zip([0, *ends][:-1], ends, strict=True)]
        archive = Archive(
            header["game"],
            int(header["seed"]),
            header["wanted"],
            Grid(**header["grid"]),
            rounds=int(header["rounds"]),
            decisions=int(header["decisions"]),
            candidates=lists["candidates"],
            first_at=header["first_at"],
        )
        archive.ways = list(zip(tensors["parents"].tolist(), lists["ways"], strict=True))
        facts = tensors["facts"].tolist()
        for key, state, (score, length, node, chosen) in zip(
            lists["keys"], lists["states"], facts, strict=True
        ):
            if not 0 <= node < len(archive.ways):
                raise ValueError("a cell's way is missing")
            archive.cells[key] = Cell(score, length, node, state, chosen)
        return archive
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not an archive of explore, or damaged ({error})") from error
