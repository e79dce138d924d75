"""`demoreset video`: watch a policy play."""

import argparse
from pathlib import Path

from demoreset_trainer.flags import chance, free, whole

HELP = """Film a policy: mp4, or GIF by the file's name, with the score and the demo's drawn in.

  demoreset video runs/NAME
  demoreset video runs/NAME --from 240 --act argmax --out from-240.gif
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "video",
        help="film a policy",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY", help="as in `demoreset evaluate`")
    parser.add_argument(
        "--from",
        dest="start",
        type=int,
        default=0,
        metavar="FRAME",
        help="begin at this frame of the demo; default 0, the game's own start",
    )
    parser.add_argument(
        "--frames", type=whole(1), default=3600, help="the longest film; default 3600"
    )
    parser.add_argument(
        "--act",
        choices=("sampled", "sharpened", "argmax"),
        default="sampled",
        help="how actions are chosen; default sampled",
    )
    parser.add_argument(
        "--sticky",
        type=chance,
        default=0.0,
        help="chance, at every frame, that the last action is repeated; default 0",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, help="default NAME.mp4, in the run's folder or here")
    parser.add_argument("--force", action="store_true", help="overwrite")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    import torch

    from demoreset_trainer import policy_file
    from demoreset_trainer.film import film
    from demoreset_trainer.machine import cores
    from demoreset_trainer.play import Act

    torch.set_num_threads(cores())
    trained = policy_file.load(options.policy)
    out = options.out or (trained.folder or Path()) / f"{trained.name}.mp4"
    free("--out", out, ".mp4", ".gif", force=options.force)
    filmed = film(
        trained,
        out,
        start=options.start,
        max_frames=options.frames,
        act=Act(options.act),
        sticky_probability=options.sticky,
        seed=options.seed,
    )
    cut = filmed.frames >= options.frames and not filmed.tied
    tie = "ties" if filmed.tied else "does not tie"
    print(
        f"written: {out} ({filmed.frames / 60:.0f} s of play, score {filmed.score:,}; "
        f"it {tie} the demo's {trained.demo_score:,}"
        f"{', and ends at --frames' if cut else ''})"
    )
    return 0
