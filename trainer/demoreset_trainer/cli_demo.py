"""`demoreset demo`: look at demonstrations, check, import, cut, find, draw and film them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import ExitCode, UserError
from demoreset_trainer import cli_explore
from demoreset_trainer.flags import free

if TYPE_CHECKING:
    from demoreset_trainer.demo import Demo

HELP = """A demo is one file: the action of every frame, rewards, lives, and hashes of the console's
memory along the way. DEMO is the name of a bundled one, or a file.

  demoreset demo info montezuma-first-key
  demoreset demo import MontezumaRevenge.demo --out montezuma.demo.safetensors
  demoreset demo verify montezuma.demo.safetensors
  demoreset demo trim montezuma.demo.safetensors --end 764 --out two-rooms.demo.safetensors
  demoreset demo video montezuma.demo.safetensors --to 764 --out two-rooms.gif
  demoreset demo explore freeway --score 1 --grid 20x26x16 --out crossing.demo.safetensors
"""
VERIFY = """Replay every frame from the game's own start and compare: rewards, lives, memory.
Ends with 1 and names the first difference if the replay differs."""
IMPORT = """Read a demonstration as OpenAI published them (a pickle, read without running it) and
replay it until every reward and life is as recorded; where the old emulator began otherwise, bytes
of the console's memory are put right from the recording's own checkpoints."""
TRIM = """Keep a demo's beginning, up to its last gain of score at or before FRAME: what comes after
the last reward would be no part of what is learned."""
SHOWN = 12  # rewards that `info` lists


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "demo",
        help="info, verify, import, trim, explore, video, plot",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = kinds.add_parser("info", help="what is in a demo", description="What is in a demo.")
    info.set_defaults(func=show)
    check = kinds.add_parser("verify", help="replay every frame and compare", description=VERIFY)
    check.set_defaults(func=verify)
    read = kinds.add_parser("import", help="read a published demonstration", description=IMPORT)
    read.add_argument("source", metavar="SOURCE", type=Path, help="a .demo of atari-reset")
    read.add_argument("--game", help="montezuma_revenge, ...; default: the file's name says it")
    read.set_defaults(func=import_)
    cut = kinds.add_parser("trim", help="keep a beginning that ends at a reward", description=TRIM)
    cut.add_argument(
        "--end",
        type=int,
        required=True,
        metavar="FRAME",
        help="the last frame to keep; the cut is at the last gain of score up to there",
    )
    cut.set_defaults(func=trim)
    cli_explore.register(kinds)
    text = "Score, rewards and lives over a demo's frames, as PNG."
    picture = kinds.add_parser("plot", help="score, rewards and lives as PNG", description=text)
    picture.set_defaults(func=plot)
    text = "Film a demo: mp4, or GIF by the file's name, with score and position drawn in."
    movie = kinds.add_parser("video", help="film a demo: mp4 or GIF", description=text)
    movie.add_argument("--from", dest="start", type=int, default=0, metavar="FRAME")
    movie.add_argument("--to", dest="end", type=int, metavar="FRAME", help="default: its end")
    movie.set_defaults(func=video)
    for kind in (info, check, cut, picture, movie):
        kind.add_argument("demo", metavar="DEMO", help="a bundled demo's name, or a file")
    for kind in (read, cut):
        kind.add_argument("--out", type=Path, required=True, metavar="DEST")
    picture.add_argument("--out", type=Path, metavar="PNG", help="default: DEMO.png, here")
    movie.add_argument("--out", type=Path, metavar="MP4|GIF", help="default: DEMO.mp4, here")
    for kind in (read, cut, picture, movie):
        kind.add_argument("--force", action="store_true", help="overwrite what is there")


def show(options: argparse.Namespace) -> int:
    """Print what is in a demo."""
    import numpy as np

    from demoreset_trainer.demo import UNKNOWN_LIVES

    demo = _load(options.demo)
    paid = np.flatnonzero(demo.rewards) + 1
    known = demo.lives[demo.lives != UNKNOWN_LIVES].astype(np.int64)
    lost = int(np.maximum(0, -np.diff(known)).sum()) if len(known) else "not recorded"
    gaps = np.diff(np.concatenate([[0], paid]))
    rows = {
        "game": demo.game,
        "frames": f"{len(demo):,} ({_time(len(demo))} of play)",
        "score": f"{demo.scores[-1]:,} in {len(paid)} reward{'s' * (len(paid) != 1)}",
        "lives lost": lost,
        "recorded with": f"{demo.frame_skip} frames per action",
        "longest way": f"{gaps.max(initial=0):,} frames to a reward",
        "memory": f"{len(demo.patches):,} bytes put right on the way",
        "ROM": f"MD5 {demo.rom}",
        "SHA-256": _sha256(options.demo, demo),
        **{_words(key): _printable(value) for key, value in demo.origin.items()},
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    if len(paid):
        print("\n   frame    reward     score   (`trim --end FRAME` cuts at a gain)")
    for frame in paid[:SHOWN].tolist():
        print(f"{frame:8,} {demo.rewards[frame - 1]:+9,} {demo.scores[frame]:9,}")
    if len(paid) > SHOWN:
        print(f"     ... {len(paid) - SHOWN} more; `demoreset demo plot` draws all")
    return ExitCode.DONE


def verify(options: argparse.Namespace) -> int:
    """Replay a demo; 1 where it differs."""
    from demoreset_trainer import demo as demos
    from demoreset_trainer.emulator import emulator_version

    demo = _load(options.demo)
    print(f"file      whole; SHA-256 {_sha256(options.demo, demo)}")
    print(f"ROM       {demo.game}'s of ale-py {emulator_version()}, MD5 {demo.rom}")
    difference = demos.verify(demo)
    if difference is not None:
        print(f"replay    differs at {difference}")
        return ExitCode.CRASH
    recorded = int((demo.lives != demos.UNKNOWN_LIVES).sum())
    print(f"rewards   equal in {len(demo):,} of {len(demo):,} frames; score {demo.scores[-1]:,}")
    print(f"lives     equal in {recorded:,} frames" if recorded else "lives     not recorded")
    print(
        f"memory    equal at {len(demo.ram_hashes):,} places; {len(demo.patches)} bytes put right"
    )
    print("The replay is exact.")
    return ExitCode.DONE


def import_(options: argparse.Namespace) -> int:
    """Write a published demonstration as a demo."""
    from demoreset_trainer import demo_import

    out = free("--out", options.out, force=options.force)
    demo = demo_import.read(options.source, options.game)
    demo.save(out)
    places = len(set(demo.patches[:, 0].tolist()))
    at = f"{places} frame{'s' * (places != 1)}"
    repaired = f"{len(demo.patches):,} bytes of memory put right at {at}"
    print(
        f"written: {out}: {demo.game}, {len(demo):,} frames, score {demo.scores[-1]:,}; every "
        f"reward and life as recorded, {repaired if places else 'nothing had to be put right'}"
    )
    return ExitCode.DONE


def trim(options: argparse.Namespace) -> int:
    """Write a demo's beginning."""
    from dataclasses import replace

    out = free("--out", options.out, force=options.force)
    demo = _load(options.demo)
    end = last_gain(demo, options.end)
    of = f"the first {end} of {len(demo)} frames"
    replace(demo.prefix(end), origin={**demo.origin, "trimmed": of}).save(out)
    if end != options.end:
        print(f"frame {options.end:,} is not right after a gain; the last one before is {end:,}")
    print(f"written: {out}: {end:,} frames, score {demo.scores[end]:,}")
    return ExitCode.DONE


def last_gain(demo: "Demo", end: int) -> int:
    """The last frame, at or before `end`, that comes right after a gain of score.

    Raises:
        UserError: `end` is not in the demo, or nothing is gained before it.
    """
    import numpy as np

    if not 1 <= end <= len(demo):
        raise UserError(f"--end: received {end}; the demo has frames 1 to {len(demo)}")
    gains = np.flatnonzero(demo.rewards > 0) + 1
    if not len(gains):
        raise UserError(f"--end: received {end}; this demo never gains any score")
    if gains[0] > end:
        raise UserError(f"--end: received {end}; the first gain of score ends at frame {gains[0]}")
    return int(gains[gains <= end][-1])


def plot(options: argparse.Namespace) -> int:
    """Draw a demo."""
    out = options.out or Path(f"{_stem(options.demo)}.png")
    free("--out", out, ".png", force=options.force)
    demo = _load(options.demo)
    from demoreset_trainer import demo_plot

    demo_plot.plot(demo, _stem(options.demo), out)
    print(f"written: {out}")
    return ExitCode.DONE


def video(options: argparse.Namespace) -> int:
    """Film a demo."""
    out = options.out or Path(f"{_stem(options.demo)}.mp4")
    free("--out", out, ".mp4", ".gif", force=options.force)
    demo = _load(options.demo)
    end = len(demo) if options.end is None else options.end
    last = len(demo) - 1
    if not 0 <= options.start <= last:
        raise UserError(f"--from: received {options.start}; the demo has the frames 0 to {last}")
    if not options.start < end <= len(demo):
        first = options.start + 1
        raise UserError(f"--to: received {end}; behind --from there are {first} to {len(demo)}")
    pictures = _film(demo, _stem(options.demo), out, options.start, end)
    print(f"written: {out} ({pictures:,} pictures, {_time(end - options.start)} of play)")
    return ExitCode.DONE


def _film(demo: "Demo", title: str, out: Path, start: int, end: int) -> int:
    """Film frames start .. end - 1; the number of pictures."""
    import numpy as np

    from demoreset_trainer.demo import replay
    from demoreset_trainer.emulator import Emulator
    from demoreset_trainer.video import VideoWriter, caption

    every = 4 if out.suffix == ".gif" else 2  # 15 and 30 pictures a second
    emulator = Emulator(demo.game)
    pictures = 0
    with VideoWriter(out, fps=60 / every) as film:
        before = np.zeros((emulator.height, emulator.width, 3), np.uint8)
        for frame, _ in replay(demo, emulator):
            if frame >= end:
                break
            if frame < start:
                continue
            screen = emulator.rgb()
            if (frame - start) % every == every - 1 or frame == end - 1:
                lines = [
                    f"{title}: score {demo.scores[frame + 1]:,} of {demo.scores[-1]:,}",
                    f"frame {frame + 1:,} of {len(demo):,}   {_time(frame + 1)}",
                ]
                # Some sprites are drawn in every second frame only: hence the maximum.
                film.add(caption(np.maximum(screen, before), lines))
                pictures += 1
            before = screen
    return pictures


def _load(name: str) -> "Demo":
    from demoreset_trainer.demo import resolve

    return resolve(name)


def _sha256(name: str, demo: "Demo") -> str:
    """The hash by which runs know a demo, and whether that is the file's own."""
    from demoreset_trainer.demo import locate

    own = locate(name).read_bytes() == demo.to_bytes()
    return demo.sha256 + ("" if own else " of the demo as demoreset writes it, not of this file")


def _stem(name: str) -> str:
    from demoreset_trainer.demo import SUFFIX

    return Path(name).name.removesuffix(SUFFIX)


def _time(frames: int) -> str:
    return f"{frames // 3600}:{frames // 60 % 60:02d}"


def _words(key: str) -> str:
    """A field's name in a file, as it is shown."""
    return _printable(key).replace("_", " ")


def _printable(text: str) -> str:
    """A text of a stranger's file, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:500])
