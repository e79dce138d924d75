"""A trained policy as one file: safetensors with a JSON card, for evaluation and for others.

The card says what is needed to use it: game, preprocessing, architecture, joystick codes; and where
it comes from: spec, demo's hash, results. It is in the file's header, and beside it as JSON.
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from demoreset_api.errors import UserError
from demoreset_api.spec import RunSpec
from demoreset_trainer import checkpoint, run_folder, runfile
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import SUFFIX as DEMO_SUFFIX
from demoreset_trainer.demo import Demo
from demoreset_trainer.disk import DAMAGE, write_all, writing
from demoreset_trainer.emulator import ALL_ACTIONS, Emulator, emulator_version, rom_md5
from demoreset_trainer.policy import Architecture, Policy, architecture
from demoreset_trainer.states import View

FORMAT = "demoreset-policy/1"
SUFFIX = ".policy.safetensors"
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Trained:
    """A policy with all that is known of it.

    demo: None where it is not at hand; then nothing can start inside it. folder: the run's.
    """

    policy: Policy
    codes: tuple[int, ...]
    card: dict[str, Any]
    demo: Demo | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        """What files about it are called."""
        return str(self.card["name"])

    @property
    def spec(self) -> RunSpec:
        """The spec that it was trained by."""
        return RunSpec.model_validate(self.card["spec"])

    @property
    def demo_score(self) -> int:
        """The score that ties the demo."""
        return int(self.card["demo"]["score"])


def load(source: str) -> Trained:
    """A policy from a run's folder, a checkpoint, an exported file, or a bundled one's name.

    The file `BEST` beside a run's checkpoints stands for the one that it names.

    Raises:
        UserError: there is none, or it is damaged or of another kind.
    """
    path = Path(source)
    if path.is_file() and path.name == checkpoint.BEST:
        best = checkpoint.best(path.parent)
        if best is None:
            raise UserError(
                f"{path}: the checkpoint that it names is not there; give another, or the run's "
                "folder"
            )
        return _load_checkpoint(best)
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_checkpoint(path)
    bundled = {name: file for name, file in _bundled()}
    if source in bundled:
        return _load_file(bundled[source])
    known = ", ".join(sorted(bundled)) or "none"
    raise UserError(
        f"{source}: not there; give a run's folder, a checkpoint, a file that "
        f"`demoreset export` wrote, or a bundled policy ({known})"
    )


def _bundled() -> list[tuple[str, Path]]:
    files = [path for folder in demos.BUNDLED for path in folder.glob(f"*{SUFFIX}")]
    return [(path.name.removesuffix(SUFFIX), path) for path in files]


def _load_checkpoint(path: Path) -> Trained:
    place = checkpoint.find(path)
    snapshot = checkpoint.read(place)
    folder = _run_of(place)
    demo = demos.load(folder / run_folder.DEMO)
    state = snapshot.state
    advice = "give another checkpoint, or that one in its own run's folder"
    run_folder.check_same_demo(state, demo, place, advice)
    try:
        spec = RunSpec.model_validate(state["spec"])
    except ValidationError as error:
        raise UserError(
            f"{place}: its spec is not one of this version of demoreset "
            f"({runfile.explain(error, RunSpec)}); use the version that wrote it"
        ) from error
    shape = architecture(spec.policy, spec.environment.max_over_frames)
    codes = _codes(demo.game, spec)
    counters = state["counters"]
    card = {
        "format": FORMAT,
        "name": folder.name,
        "game": demo.game,
        "rom": demo.rom,
        "actions": list(codes),
        "frameSkip": spec.environment.frame_skip,
        "view": asdict(shape.view),
        "architecture": {**asdict(shape), "view": None},
        "demo": {
            "name": spec.demo.name,
            "sha256": demo.sha256,
            "frames": len(demo),
            "score": int(demo.scores[-1]),
        },
        "training": {
            "frames": snapshot.frames,
            "updates": snapshot.update,
            "seconds": counters["seconds"],
            "goalMet": state["goal"]["met"],
            "checkpoint": place.name,
        },
        "spec": state["spec"],
        "version": version("demoreset"),
    }
    policy = Policy(shape, len(codes))
    try:
        policy.load_state_dict(snapshot.model)
    except RuntimeError as error:
        raise UserError(
            f"{place}: its network is not one of this version of demoreset; use the version that "
            "wrote it"
        ) from error
    return Trained(policy, codes, card, demo, folder)


def _run_of(place: Path) -> Path:
    """The folder of a checkpoint's run: where one went to it, unless that was by a link to it."""
    gone, real = (Path(path).parent.parent for path in (os.path.abspath(place), place.resolve()))
    return gone if (gone / run_folder.DEMO).exists() else real


def _load_file(path: Path) -> Trained:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: too large for a policy (most: {MAX_BYTES} bytes)")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if card["format"] != FORMAT:
            raise UserError(f"{path}: format {card['format']!r}; this version reads {FORMAT!r}")
        spec = RunSpec.model_validate(card["spec"])
        parts = card["architecture"]
        convolutions = tuple(tuple(layer) for layer in parts["convolutions"])
        shape = Architecture(
            View(**card["view"]),
            convolutions,
            parts["features"],
            parts["hidden"],
            parts["original"],
        )
        policy = Policy(shape, len(card["actions"]))
        policy.load_state_dict(tensors)
        checkpoint.check_finite(tensors)
        game, rom, sha256 = str(card["game"]), card["rom"], card["demo"]["sha256"]
        # What is asked for later must not be found missing then.
        int(card["frameSkip"]), int(card["demo"]["score"])
        name, codes = card["name"], tuple(card["actions"])
        if name in ("", "..") or Path(name).name != name or not name.isprintable():
            raise ValueError(f"its name {name!r} is not that of a file")
    except (*DAMAGE, SafetensorError, OSError, RuntimeError, ArithmeticError) as error:
        if path.name.endswith(DEMO_SUFFIX):
            raise UserError(
                f"{path}: this is a demo, not a policy; `demoreset demo info {path}`"
            ) from error
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a policy that `demoreset export` wrote, or damaged ({first})"
        ) from error
    if rom != rom_md5(game):
        raise UserError(f"{path}: trained on another ROM of {game} ({rom})")
    if codes != (known := _codes(game, spec)):
        raise UserError(
            f"{path}: its actions are the joystick codes {list(codes)}; ale-py "
            f"{emulator_version()} has {list(known)} in {game}"
        )
    return Trained(policy, codes, card, _find_demo(sha256, spec))


def _codes(game: str, spec: RunSpec) -> tuple[int, ...]:
    """The joystick code of every action, as environments of this spec have them."""
    return ALL_ACTIONS if spec.environment.full_action_space else Emulator(game).minimal_actions


def _find_demo(sha256: str, spec: RunSpec) -> Demo | None:
    """The bundled demo that a policy was trained on, if it is that."""
    if spec.demo.name is None or spec.demo.name not in demos.bundled():
        return None
    demo = demos.resolve(spec.demo.name)
    demo = demo.prefix(min(spec.demo.end_frame or len(demo), len(demo)))
    return demo if demo.sha256 == sha256 else None


def card_beside(path: Path) -> Path:
    """Where the card of a policy's file lies."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".json")


def save(trained: Trained, path: Path, results: dict[str, Any] | None = None) -> Sequence[Path]:
    """Write the file and its card; both whole or not at all.

    Raises:
        UserError: the place cannot be written to.
    """
    card = {**trained.card, "results": results}
    text = json.dumps(card, indent=2)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in trained.policy.state_dict().items()
    }
    contents = {
        path: save_tensors(tensors, metadata={"card": text}),
        card_beside(path): f"{text}\n".encode(),
    }
    with writing(path):
        write_all(contents)
    return list(contents)


def check_onnx() -> None:
    """Refuse to write ONNX where what it needs is not there, before anything is written.

    Raises:
        UserError: the packages for it are not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise UserError("--onnx needs two more packages: in the clone, pip install -e '.[onnx]'")


def export_onnx(trained: Trained, path: Path) -> None:
    """Write the network as ONNX: uint8 images and the state in; logits, values, state out."""
    policy = trained.policy.eval()
    view = policy.shape.view
    images = torch.zeros(2, *view.shape, dtype=torch.uint8)
    batch = torch.export.Dim("batch")
    policy.exact = True
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of what we do not need
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            policy,
            (images, policy.initial_state(2)),
            path,
            input_names=["images", "state"],
            output_names=["logits", "values", "next_state"],
            dynamic_shapes=({0: batch}, {0: batch}),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
