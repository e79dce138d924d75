"""`demoreset evaluate`: how well a policy plays from the game's own start."""

import argparse
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from demoreset_api.errors import TryAgain, UserError
from demoreset_trainer.disk import free_name
from demoreset_trainer.flags import whole, writable

if TYPE_CHECKING:
    from demoreset_trainer.evaluate import Cell
    from demoreset_trainer.policy_file import Trained

PROFILE_EPISODES = 20  # of a start, at most
HELP = """Play a policy from the game's own start, without the demo, and measure.

POLICY is a run's folder (its newest checkpoint), a checkpoint, RUN/checkpoints/BEST (the best so
far), a file that `demoreset export` wrote, or the name of a bundled policy. Each kind of noise is
played with each way to act: a table, and JSON beside the run.

  demoreset evaluate montezuma-first-key --noise none,sticky --act sampled --max-frames 3600
  demoreset evaluate runs/NAME --profile 4
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="how well a policy plays from the game's own start",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY")
    parser.add_argument(
        "--episodes",
        type=whole(1),
        default=100,
        help="per cell; default 100 (1 where nothing is random)",
    )
    parser.add_argument(
        "--noise",
        default="none,no-ops,sticky,sticky+no-ops,epsilon",
        help="which of none, no-ops (up to 30), sticky (0.25), sticky+no-ops, epsilon (0.01); "
        "default all",
    )
    parser.add_argument(
        "--act",
        default="sampled,sharpened,argmax",
        help="which of sampled, sharpened (logits doubled), argmax; default all",
    )
    parser.add_argument(
        "--max-frames",
        type=whole(1),
        default=108_000,
        help="longest episode; default 108000 (30 minutes of play)",
    )
    parser.add_argument(
        "--profile",
        type=whole(1),
        metavar="K",
        help="first measure the success from every K-th decision of the demo, in at most "
        f"{PROFILE_EPISODES} episodes each that are played as in the training: sampled, with the "
        "run's own noise and limits, whatever --act, --noise and --max-frames say",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--processes", type=whole(1), help="default: the cores it may use")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="JSON",
        help="default evaluation.json in the run's folder; of a bundled policy or an exported file "
        "JSON is written only with --out",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    import torch

    from demoreset_trainer import evaluate, policy_file, run_folder
    from demoreset_trainer.machine import cores
    from demoreset_trainer.play import Act

    torch.set_num_threads(cores())
    noises = _choice("--noise", options.noise, list(evaluate.NOISES))
    acts = [Act(name) for name in _choice("--act", options.act, [str(act) for act in Act])]
    trained = policy_file.load(options.policy)
    out = options.out or (trained.folder / "evaluation.json" if trained.folder else None)
    if out is not None:
        writable("--out", out)
    processes = options.processes or cores()
    watch = _Counter()
    rates, per_start = None, min(options.episodes, PROFILE_EPISODES)
    cells: list[Cell] = []
    kept = False

    def keep() -> None:
        nonlocal kept
        if out is not None:
            if not kept:
                watch.close()  # or what is said stands behind its line
                _put_aside(out)
            kept = True
            measured = evaluate.as_json(
                trained, cells, rates, seed=options.seed, max_frames=options.max_frames
            )
            if rates is not None:
                measured["profileEpisodes"] = per_start
            run_folder.write_json(out, measured)

    if options.profile:  # first: where the demo is not at hand, it says so
        rates = evaluate.profile(
            trained,
            every=options.profile,
            episodes=per_start,
            seed=options.seed,
            processes=processes,
            watch=watch,
        )
        with suppress(TryAgain):  # a disk that is full now may not be at the end
            keep()
    try:
        for cell in evaluate.evaluate(
            trained,
            noises=noises,
            acts=acts,
            episodes=options.episodes,
            max_frames=options.max_frames,
            seed=options.seed,
            processes=processes,
            watch=watch,
        ):
            cells.append(cell)
            with suppress(TryAgain):
                keep()  # what took an hour is not lost by whatever comes in the next one
    finally:
        watch.close()
        if cells or rates:
            _show(trained, cells, rates, options.profile)
            if out is not None:
                keep()
                print(f"written: {out} ({len(cells)} of {len(noises) * len(acts)} cells)")
    return 0


def _put_aside(out: Path) -> None:
    """Give an earlier evaluation, which may have taken hours, another name."""
    if out.is_file():
        with suppress(OSError):
            print(f"the evaluation that was there is now {out.rename(free_name(out))}")


def _choice(flag: str, received: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in received.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: received {name!r}; known are {', '.join(known)}")
    if not names:
        raise UserError(f"{flag}: received nothing; known are {', '.join(known)}")
    return list(dict.fromkeys(names))  # each is played once


class _Counter:
    """One line on stderr that counts the episodes: rewritten on a terminal, rare elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()

    def __call__(self, cell: str, done: int, total: int) -> None:
        now = time.monotonic()
        last = self._terminal and done == total
        if now - self._shown < (0.2 if self._terminal else 10) and not last:
            return
        self._shown = now
        line = f"{cell}: {done} of {total} episodes"
        if self._terminal:  # a line that wraps cannot be rewritten
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}" if self._terminal else line, end="", file=sys.stderr, flush=True)
        if not self._terminal:
            print(file=sys.stderr)

    def close(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show(
    trained: "Trained", cells: "list[Cell]", rates: dict[int, float] | None, every: int | None
) -> None:
    from rich.console import Console

    from demoreset_trainer import evaluation_table
    from demoreset_trainer.runfile import guided

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 100)
    table = evaluation_table.fitting(cells, console) if terminal else evaluation_table.full(cells)
    table.title = (
        f"{trained.name} ({guided(trained.spec)}) from the game's own start; "
        f"the demo scores {trained.demo_score:,}"
    )
    console.print(table)
    if rates:
        skip = trained.spec.environment.frame_skip
        console.print(
            f"Success from frames of the demo, every {every} decisions of {skip} frames, played as "
            "in the training: sampled, with the run's own noise and limits"
        )
        longest = min(40, console.width - 16)
        for frame, rate in rates.items():
            console.print(f"{frame:8} {rate:5.0%} {'#' * round(longest * rate)}")
