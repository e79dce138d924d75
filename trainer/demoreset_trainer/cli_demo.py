"""`demoreset demo`: look at demonstrations, check, import, cut, find and film them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import ExitCode, UserError
from demoreset_trainer import cli_explore

if TYPE_CHECKING:
    from demoreset_trainer.demo import Demo

HELP = """A demo is one file: the action of every frame, rewards, lives, and hashes of the memory
along the way. DEMO is a file or the name of a bundled one.

  demoreset demo info montezuma-first-key
  demoreset demo import MontezumaRevenge.demo --out montezuma.demo.safetensors
  demoreset demo trim montezuma.demo.safetensors --end 764 --out two-rooms.demo.safetensors
  demoreset demo explore freeway --score 1 --grid 20x26x16 --out crossing.demo.safetensors
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "demo",
        help="info, verify, import, trim, explore, video, plot",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = kinds.add_parser("info", help="what is in a demo")
    info.set_defaults(func=show)
    check = kinds.add_parser("verify", help="replay every frame and compare")
    check.set_defaults(func=verify)
    cut = kinds.add_parser("trim", help="keep a beginning that ends at a reward")
    cut.add_argument("--end", type=int, required=True, metavar="FRAME")
    cut.set_defaults(func=trim)
    picture = kinds.add_parser("plot", help="score, rewards and lives as a PNG")
    picture.set_defaults(func=plot)
    movie = kinds.add_parser("video", help="film a demo: mp4 or GIF")
    movie.add_argument("--from", dest="start", type=int, default=0, metavar="FRAME")
    movie.add_argument("--to", dest="end", type=int, metavar="FRAME")
    movie.set_defaults(func=video)
    for kind in (info, check, cut, picture, movie):
        kind.add_argument("demo", metavar="DEMO")
    read = kinds.add_parser("import", help="read a demonstration that OpenAI published")
    read.add_argument("source", metavar="SOURCE", type=Path)
    read.add_argument("--game", help="as ale-py calls it; default by the file's name")
    read.set_defaults(func=import_)
    for kind in (cut, read):
        kind.add_argument("--out", type=Path, required=True, metavar="DEST")
    for kind in (picture, movie):
        kind.add_argument("--out", type=Path, metavar="DEST")
    for kind in (cut, read, picture, movie):
        kind.add_argument("--force", action="store_true", help="overwrite DEST")
    cli_explore.register(kinds)


def _load(name: str) -> "Demo":
    from demoreset_trainer import demo as demos

    return demos.load(Path(name) if Path(name).exists() or "/" in name else demos.find(name))


def _free(path: Path, force: bool) -> Path:
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; --force overwrites it")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.resolve().parent}")
    return path


def show(options: argparse.Namespace) -> int:
    """Print what is in a demo."""
    import numpy as np

    from demoreset_trainer.demo import UNKNOWN_LIVES

    demo = _load(options.demo)
    paid = np.flatnonzero(demo.rewards)
    known = demo.lives[demo.lives != UNKNOWN_LIVES]
    lost = int(np.maximum(0, -np.diff(known)).sum()) if len(known) else "not recorded"
    shown = ", ".join(f"{frame + 1}: {demo.scores[frame + 1]:,}" for frame in paid[:12].tolist())
    rows = {
        "game": demo.game,
        "frames": f"{len(demo):,} ({len(demo) / 60:.0f} s of play)",
        "score": f"{demo.scores[-1]:,} in {len(paid)} rewards",
        "score at frame": (shown or "never any") + (", ..." if len(paid) > 12 else ""),
        "lives lost": lost,
        "frame skip": demo.frame_skip,
        "patches": f"{len(demo.patches)} bytes of memory",
        "sha256": demo.sha256,
        "rom": f"{demo.rom} (MD5)",
        **demo.origin,
    }
    for name, value in rows.items():
        print(f"{name:22} {value}")
    return ExitCode.DONE


def verify(options: argparse.Namespace) -> int:
    """Replay a demo; 1 where it differs."""
    from demoreset_trainer import demo as demos

    demo = _load(options.demo)
    difference = demos.verify(demo)
    if difference is not None:
        print(f"{options.demo}: the replay differs: {difference}")
        return ExitCode.CRASH
    print(
        f"{options.demo}: exact: {len(demo):,} frames, every reward and life, "
        f"{len(demo.ram_hashes)} hashes of the memory"
    )
    return ExitCode.DONE


def trim(options: argparse.Namespace) -> int:
    """Write a demo's beginning."""
    import numpy as np

    out = _free(options.out, options.force)
    demo = _load(options.demo)
    if not 1 <= options.end <= len(demo):
        raise UserError(f"--end: received {options.end}; the demo has frames 1 to {len(demo)}")
    ends = np.flatnonzero(demo.rewards[: options.end] > 0) + 1
    if not len(ends):
        first = np.flatnonzero(demo.rewards > 0)
        where = f"the first comes at frame {first[0] + 1}" if len(first) else "it has none"
        raise UserError(f"--end: received {options.end}; no reward comes before it, {where}")
    end = int(ends[-1])
    demo.prefix(end).save(out)
    moved = "" if end == options.end else f" (the latest reward before {options.end})"
    print(f"written: {out}: {end:,} frames{moved}, score {demo.scores[end]:,}")
    return ExitCode.DONE


def import_(options: argparse.Namespace) -> int:
    """Write a published demonstration as a demo."""
    from demoreset_trainer import demo_import

    out = _free(options.out, options.force)
    demo = demo_import.read(options.source, options.game)
    demo.save(out)
    print(
        f"written: {out}: {len(demo):,} frames of {demo.game}, score {demo.scores[-1]:,}; every "
        f"reward and life as recorded, with {len(demo.patches)} bytes of memory put right"
    )
    return ExitCode.DONE


def plot(options: argparse.Namespace) -> int:
    """Draw a demo."""
    from demoreset_trainer import demo_plot

    demo = _load(options.demo)
    out = _free(options.out or Path(f"{_stem(options.demo)}.png"), options.force)
    if out.suffix != ".png":
        raise UserError(f"--out: received {out}; it must end in .png")
    demo_plot.plot(demo, _stem(options.demo), out)
    print(f"written: {out}")
    return ExitCode.DONE


def video(options: argparse.Namespace) -> int:
    """Film a demo."""
    from demoreset_trainer.demo import replay
    from demoreset_trainer.emulator import Emulator
    from demoreset_trainer.video import VideoWriter, caption

    demo = _load(options.demo)
    out = _free(options.out or Path(f"{_stem(options.demo)}.mp4"), options.force)
    end = len(demo) if options.end is None else options.end
    if not 0 <= options.start < end <= len(demo):
        raise UserError(
            f"--from {options.start} --to {end}: the demo has frames 0 to {len(demo)}, "
            "and --from comes before --to"
        )
    emulator = Emulator(demo.game)
    with VideoWriter(out, fps=30) as film:
        for frame, _ in replay(demo, emulator):
            if frame >= end:
                break
            if frame >= options.start and frame % 2 == 0:
                lines = [f"demo {_stem(options.demo)}"]
                lines.append(f"score {demo.scores[frame + 1]:,}   frame {frame:,} of {len(demo):,}")
                film.add(caption(emulator.rgb(), lines))
    print(f"written: {out}")
    return ExitCode.DONE


def _stem(name: str) -> str:
    from demoreset_trainer.demo import SUFFIX

    return Path(name).name.removesuffix(SUFFIX)
