"""`demoreset export`: a trained policy as a file for others."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demoreset_api.errors import UserError
from demoreset_trainer.flags import free

if TYPE_CHECKING:
    from demoreset_trainer.policy_file import Trained

HELP = """Write a policy as one file: safetensors with a JSON card (game, preprocessing, network,
spec, results), and the card beside it. `demoreset evaluate` and `video` take the file;
docs/policy.md shows a short script that does.

  demoreset export runs/NAME --out NAME.policy.safetensors
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a policy as a file for others",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY", help="a run's folder, or a checkpoint")
    parser.add_argument("--out", type=Path, help="default NAME.policy.safetensors")
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="write the network as ONNX, too; needs `pip install -e '.[onnx]'` in the clone",
    )
    parser.add_argument("--force", action="store_true", help="overwrite")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    from demoreset_trainer import policy_file
    from demoreset_trainer.disk import writing

    if options.onnx:
        policy_file.check_onnx()
    trained = policy_file.load(options.policy)
    out = options.out or Path(trained.name + policy_file.SUFFIX)
    free("--out", out, ".safetensors", force=options.force)
    free("--out", policy_file.card_beside(out), force=options.force)
    if options.onnx:
        free("--onnx", options.onnx, ".onnx", force=options.force)
    for path in policy_file.save(trained, out, _results(trained, options.policy)):
        print(f"written: {path} ({path.stat().st_size:,} bytes)")
    if options.onnx:
        with writing(options.onnx, "--onnx"):
            policy_file.export_onnx(trained, options.onnx)
        print(f"written: {options.onnx} ({options.onnx.stat().st_size:,} bytes)")
    return 0


def _results(trained: "Trained", policy: str) -> dict[str, Any] | None:
    """What `demoreset evaluate` measured on this very checkpoint, if it did."""
    if trained.folder is None:  # a file, which has them
        return trained.card.get("results")
    path = trained.folder / "evaluation.json"
    if not path.exists():
        return None
    again = f"`demoreset evaluate {policy}` first"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        measured = results.get("checkpoint")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read, or damaged ({error}); {again}") from error
    exported = trained.card["training"]["checkpoint"]
    if measured == exported:
        return results
    theirs = measured or "an unknown checkpoint"
    print(f"without results: {path} is of {theirs}, the policy is of {exported}; {again}")
    return None
