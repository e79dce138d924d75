"""Run files: read, changed from the command line, checked; what they name is loaded."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from demoreset_api import changes as changing
from demoreset_api.errors import TryAgain, UserError
from demoreset_api.spec import (
    MAX_EPISODE_FRAMES,
    MAX_MEMBERS,
    Collectives,
    DemoResetRun,
    RunSpec,
    Workers,
)
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import Demo
from demoreset_trainer.machine import gpus
from demoreset_trainer.run_folder import SPEC, write_json

MAX_BYTES = 1 << 20
RIGHT = {  # what would be right, where pydantic speaks of its own things
    "model_type": "it is a mapping of fields",
    "model_attributes_type": "it is a mapping of fields",
    "list_type": "it is a list, which --set takes as a whole: FIELD=[A, B]",
}


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping says a key twice: of two values the first would be lost silently.

    Raises:
        UserError: names the file, the key and its lines.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            same, line = (key.tag, key.value), key.start_mark.line + 1
            if same in lines:
                raise UserError(
                    f"{self.name}: {key.value}: said twice, in line {lines[same]} and in line "
                    f"{line}; say it once"
                )
            lines[same] = line
        return node


def read(path: Path, changes: Sequence[str] = ()) -> DemoResetRun:
    """Read a run file (YAML or JSON), with `spec.a.b=value` changes applied.

    Raises:
        UserError: names the file, the field, what was received and what would be right.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a run file (most: {MAX_BYTES} bytes)")
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error.reason}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply for a run file") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise UserError(f"{path}: the file is empty; a run file is a mapping")
    if not isinstance(content, dict):
        raise UserError(f"{path}: received {type(content).__name__}; a run file is a mapping")
    for change in changes:
        changing.apply(content, change)
    try:
        return DemoResetRun.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError, model: type[BaseModel] = DemoResetRun) -> str:
    """Each mistake in a `model`: its field, what was received, what would be right."""
    lines = []
    for mistake in error.errors(include_url=False, include_context=False):
        place = [str(part) for part in mistake["loc"]]
        field = ".".join(place) or "the run file"
        if mistake["type"] == "extra_forbidden":
            known = list(_fields(model, place[:-1]))
            close = get_close_matches(place[-1], known, 1)
            right = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            lines.append(f"{field}: unknown field; {right}")
        elif mistake["type"] == "missing":
            lines.append(f"{field}: missing; {_needed(_fields(model, place[:-1])[place[-1]])}")
        else:
            received = mistake["input"]
            rule = mistake["type"] == "value_error" and isinstance(received, dict)
            shown = "" if rule else f"received {received!r}; "  # a rule tells what it is about
            message = RIGHT.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
            lines.append(f"{field}: {shown}{message[:1].lower()}{message[1:]}")
    return "; ".join(lines)


def _fields(model: Any, place: Sequence[str]) -> dict[str, FieldInfo]:
    """The fields at a place in a model, by their names on the wire."""
    for key in place:
        model = _fields(model, ())[key].annotation
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _needed(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return f"it is always {get_args(kind)[0]}"
    if issubclass(kind, BaseModel):
        fields = _fields(kind, ())
        needed = [f"{name} ({_needed(one)})" for name, one in fields.items() if one.is_required()]
        if not needed and kind.rules:
            return str(kind.rules[0].message)
        return f"it holds {', '.join(needed or fields)}"
    description = str(field.description)
    return f"{description[:1].lower()}{description[1:].rstrip('.')}"


@contextmanager
def frozen(wanted: DemoResetRun, file: Path) -> Iterator[Path]:
    """A copy of the run file for members, which may be started hours after it was changed.

    Raises:
        TryAgain: no folder for temporary files takes it.
    """
    content = wanted.model_dump(mode="json", by_alias=True)
    if wanted.spec.demo.path is not None:
        content["spec"]["demo"]["path"] = str((file.parent / wanted.spec.demo.path).resolve())
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(TemporaryDirectory(prefix="demoreset-"))
            path = Path(folder) / SPEC
            write_json(path, content)
        except OSError as error:  # of which ENOENT says that all of them were tried
            raise TryAgain(
                f"no temporary folder can be written now ({error.strerror}); make room in /tmp, or "
                "name another folder in TMPDIR, and give the same command again"
            ) from error
        stack.enter_context(_locked(folder))
        yield path


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keeps systemd-tmpfiles from an old temporary folder: systemd.io/TEMPORARY_DIRECTORIES."""
    import fcntl  # only groups come here, and they need Linux

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def load_demo(spec: RunSpec, run_file: Path) -> Demo:
    """The demonstration of a run, cut to what is learned.

    Raises:
        UserError: it is missing, damaged, another one than the spec's hash, longer than an
            episode, or pays nothing.
    """
    reference = spec.demo
    if reference.name is not None:
        path = demos.find(reference.name)
    else:
        path = run_file.parent / str(reference.path)
    demo = demos.load(path)
    if reference.sha256 not in (None, demo.sha256):
        raise UserError(
            f"spec.demo.sha256: {path} has {demo.sha256}, the spec wants {reference.sha256}"
        )
    if reference.end_frame is not None:
        demo = demo.prefix(reference.end_frame)
    if len(demo) > MAX_EPISODE_FRAMES:
        raise UserError(
            f"{path}: {len(demo):,} frames, and an episode ends after {MAX_EPISODE_FRAMES:,}: its "
            "end can never be reached; choose spec.demo.endFrame after an earlier reward "
            "(`demoreset demo info`)"
        )
    if demo.scores[-1] <= demo.scores[0]:
        raise UserError(
            f"{path}: its score at frame {len(demo)} is {demo.scores[-1]}, no more than at its "
            "beginning: nothing to learn; choose spec.demo.endFrame after a reward "
            "(`demoreset demo info`)"
        )
    return demo


def members(flag: int | None, workers: Workers) -> int:
    """How many processes train in one worker: the flag, else the file, else one per GPU, or one.

    Raises:
        UserError: none is wanted, or more than NCCL can do with the GPUs that are here.
    """
    wanted = flag if flag is not None else workers.members_per_worker
    there = max(1, gpus())
    if wanted is None:
        wanted = there
    if not 1 <= wanted <= MAX_MEMBERS:
        raise UserError(f"--members: received {wanted}; it is 1 to {MAX_MEMBERS}")
    if workers.collectives is Collectives.NCCL and wanted > there:
        raise UserError(
            f"spec.workers.collectives: Nccl needs a GPU for each of {wanted} members, and here "
            f"are {gpus()}; take --members {there}, or --set spec.workers.collectives=Gloo"
        )
    return wanted


def guided(spec: RunSpec) -> str:
    """Whether the guide was used, in the words that every result has beside it."""
    weight = spec.curriculum.in_force.guide
    return f"guide {weight:g}" if weight else "pure reinforcement learning"
