"""`demoreset plot`: the graph of a run."""

import argparse
from pathlib import Path

from demoreset_trainer.flags import free

HELP = """Draw a run, while it goes on or afterwards; several are drawn into one graph.

  demoreset plot runs/NAME
  demoreset plot runs/seed-0 runs/seed-1 --out seeds.png
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plot",
        help="draw the graph of a run",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        help="a PNG; default RUN/plot.png, of several runs comparison.png in the first one, which "
        "are drawn anew each time",
    )
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    from demoreset_trainer import plot

    several = len(options.runs) > 1
    out = options.out or options.runs[0] / ("comparison.png" if several else "plot.png")
    if options.out:
        free("--out", out, ".png", force=options.force)
    plot.plot(options.runs, out)
    print(f"written: {out}")
    return 0
