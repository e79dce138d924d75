"""`demoreset demo explore`: find a demonstration from nothing."""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import ExitCode, UserError
from demoreset_trainer.disk import not_now
from demoreset_trainer.flags import free, whole

if TYPE_CHECKING:
    from demoreset_trainer.explore import Archive, Grid

HELP = """Find a demonstration by restoring emulator states and acting at random from them.

It goes on after the first find, for shorter ways, until --decisions are spent; then the best ways
are cut shorter and smoothed, and the one that survives small disturbances best is written. The same
seed and number of decisions give the same demonstration, whatever the number of processes. Ctrl-C
keeps the archive; the same command goes on with it.

  demoreset demo explore montezuma_revenge --score 100 --out key.demo.safetensors
"""
SAVE_EVERY, TELL_EVERY = 60.0, 5.0  # seconds
GIVEN = {"game": "GAME", "seed": "--seed", "wanted": "--score", "grid": "--grid"}
POLISHED = 400  # decisions of all ways that are cut shorter; the work grows with their square


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explore",
        help="find a demonstration from nothing",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("game", metavar="GAME", help="as ale-py calls it: montezuma_revenge")
    parser.add_argument("--out", type=Path, required=True, metavar="DEMO")
    parser.add_argument("--score", type=whole(1), default=1, help="the score wanted; default 1")
    parser.add_argument(
        "--decisions", type=whole(1), default=200_000, help="how many to play; default 200000"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--grid",
        default="11x8x8",
        help="how screens are compared: width x height x grey levels; finer where sprites are "
        "small; default 11x8x8",
    )
    parser.add_argument("--processes", type=whole(1), help="default: the cores it may use")
    parser.add_argument("--archive", type=Path, help="default: DEMO.archive")
    parser.add_argument("--force", action="store_true", help="overwrite DEMO")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    from demoreset_trainer import explore_file
    from demoreset_trainer.emulator import rom_md5
    from demoreset_trainer.explore import Archive, damage, explore
    from demoreset_trainer.machine import cores
    from demoreset_trainer.signals import Signals

    rom_md5(options.game)  # an unknown game is told at once
    out = free("--out", options.out, force=options.force)
    grid = _grid(options.grid)
    place: Path = options.archive or out.with_name(f"{out.name}.archive")
    free("--archive", place, force=True)  # that of an earlier search is gone on with
    archive = Archive(options.game, options.seed, options.score, grid)
    if place.exists():
        archive = _same(explore_file.read(place), archive, place)
        if wrong := damage(archive):
            raise UserError(f"{place}: damaged: {wrong}; choose another --archive")
        print(f"going on with {place}: {archive.decisions:,} decisions", file=sys.stderr)
    # Rounds are played to their end; less than an archive's would not find the same again.
    a_round = archive.decisions / max(1, archive.rounds)
    enough = archive.decisions - options.decisions < a_round
    needed = options.decisions if enough else archive.decisions
    begun = told = saved = time.monotonic()
    with Signals() as stopping:
        rounds = explore(
            archive,
            decisions=options.decisions,
            processes=options.processes or cores(),
            stopping=stopping,
        )
        for _ in rounds:
            now = time.monotonic()
            if now - told >= TELL_EVERY:
                told = now
                print(_line(archive, options.decisions, now - begun), file=sys.stderr)
            if now - saved >= SAVE_EVERY:
                _keep(archive, place)
                saved = time.monotonic()
        _keep(archive, place)
        if received := stopping():
            print(f"stopped; the same command goes on with {place}", file=sys.stderr)
            return ExitCode.stopped_by(received)
    print(_line(archive, options.decisions, time.monotonic() - begun), file=sys.stderr)
    if not archive.candidates:
        print(
            f"demoreset: no score of {options.score} within {archive.decisions:,} decisions (best: "
            f"{archive.best.score}); go on with a larger --decisions: {place} is kept",
            file=sys.stderr,
        )
        return ExitCode.BUDGET_SPENT
    try:
        _write_demo(archive, options, needed)
    except KeyboardInterrupt:
        print(f"stopped; the same command cuts it shorter anew, from {place}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def _grid(text: str) -> "Grid":
    from demoreset_trainer.explore import Grid

    try:
        width, height, levels = (int(part) for part in text.split("x"))
    except ValueError:
        width = height = levels = 0
    if not (1 <= width <= 160 and 1 <= height <= 210 and 2 <= levels <= 256):
        raise UserError(f"--grid: received {text!r}; it looks like 11x8x8 (most 160x210x256)")
    return Grid(width, height, levels)


def _same(found: "Archive", wanted: "Archive", place: Path) -> "Archive":
    for name, flag in GIVEN.items():
        before, now = getattr(found, name), getattr(wanted, name)
        if before != now:
            raise UserError(
                f"{place}: made with {flag} {before}, not {now}; choose another --archive"
            )
    return found


def _keep(archive: "Archive", place: Path) -> None:
    from demoreset_trainer import explore_file

    try:
        explore_file.write(archive, place)
    except OSError as error:
        raise not_now(place, error) from error


def _line(archive: "Archive", decisions: int, seconds: float) -> str:
    found = f"{len(archive.candidates[0])} decisions" if archive.candidates else "not yet"
    return (
        f"{seconds:5.0f} s  {archive.decisions:,} of {decisions:,} decisions  "
        f"{len(archive.cells):,} cells  best score {archive.best.score:,}  "
        f"way to {archive.wanted}: {found}"
    )


def _write_demo(archive: "Archive", options: argparse.Namespace, decisions: int) -> None:
    import numpy as np

    from demoreset_trainer.demo import record
    from demoreset_trainer.emulator import Emulator
    from demoreset_trainer.explore import FRAME_SKIP
    from demoreset_trainer.shorten import TRIED, Course, choose

    print("cutting it shorter and smoothing it; a long way takes minutes", file=sys.stderr)
    course = Course(archive.game, options.score)
    ways = [list(way) for way in archive.candidates if course.walk(way) is not None]
    if not ways:
        raise UserError("--archive: damaged: none of its ways reaches the score; choose another")
    ways = ways[: max(1, POLISHED // len(ways[0]))]
    told = time.monotonic()

    def watch(place: int, length: int, share: float) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY:
            told = time.monotonic()
            print(
                f"way {place + 1} of {min(len(ways), TRIED)}: {length} decisions; {share:.0%} of a "
                "pass (the last is the one that finds nothing)",
                file=sys.stderr,
            )

    way, survival = choose(course, ways, watch)
    codes = np.array(Emulator(archive.game).minimal_actions, np.uint8)
    command = (
        f"demoreset demo explore {archive.game} --score {options.score} "
        f"--decisions {decisions} --seed {archive.seed} --grid {options.grid}"
    )
    demo = record(
        archive.game,
        codes[np.array(way)].repeat(FRAME_SKIP),
        frame_skip=FRAME_SKIP,
        origin={"command": command, "found_after_decisions": str(archive.first_at)},
    )
    demo.save(options.out)
    print(
        f"written: {options.out}: score {demo.scores[-1]:,} in {len(demo)} frames "
        f"({len(way)} decisions); survives {survival:.0%} of small disturbances.\n"
        f"Next: demoreset demo info {shlex.quote(str(options.out))}"
    )
