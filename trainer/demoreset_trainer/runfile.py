"""Run files: read, changed from the command line, checked; and the folder that a run lives in."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from demoreset_api import changes as changing
from demoreset_api.errors import TryAgain, UserError
from demoreset_api.spec import After, Collectives, DemoResetRun, RunSpec, Workers
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import Demo
from demoreset_trainer.disk import fault, write_whole
from demoreset_trainer.machine import gpus

MAX_BYTES = 1 << 20
RIGHT = {  # what would be right, where pydantic speaks of its own things
    "model_type": "it is a mapping of fields",
    "model_attributes_type": "it is a mapping of fields",
}
SPEC, DEMO = "run.json", "demo" + demos.SUFFIX  # in a run's folder


def read(path: Path, changes: Sequence[str] = ()) -> DemoResetRun:
    """Read a run file (YAML or JSON), with `spec.a.b=value` changes applied.

    Raises:
        UserError: names the file, the field, what was received and what would be right.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a run file (most: {MAX_BYTES} bytes)")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error.reason}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply for a run file") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
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
            shown = "" if isinstance(received, dict) else f"received {received!r}; "
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
        needed = [name for name, one in fields.items() if one.is_required()]
        return f"it holds {', '.join(needed or fields)}"
    description = str(field.description)
    return f"{description[:1].lower()}{description[1:].rstrip('.')}"


@contextmanager
def frozen(wanted: DemoResetRun, file: Path) -> Iterator[Path]:
    """A copy of the run file for members, which may be started hours after it was changed."""
    content = wanted.model_dump(mode="json", by_alias=True)
    if wanted.spec.demo.path is not None:
        content["spec"]["demo"]["path"] = str((file.parent / wanted.spec.demo.path).resolve())
    with TemporaryDirectory(prefix="demoreset-") as folder, _locked(folder):
        path = Path(folder) / SPEC
        write_json(path, content)
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
        UserError: it is missing, damaged, another one than the spec's hash, or pays nothing.
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
    if wanted < 1:
        raise UserError(f"--members: received {wanted}; it is 1 or more")
    if workers.collectives is Collectives.NCCL and wanted > there:
        raise UserError(
            f"spec.workers.collectives: Nccl needs a GPU for each of {wanted} members, and here "
            f"are {gpus()}; take --members {there}, or --set spec.workers.collectives=Gloo"
        )
    return wanted


# What must be the same for a checkpoint to be of use; all else may change between two lives.
_FIXED = (
    "demo.endFrame",
    "seed",
    "curriculum.mode",
    "policy.preset",
    "policy.recurrent",
    "environment.frameSkip",
    "environment.fullActionSpace",
    "environment.maxOverFrames",
    "environment.slots",
)


def check_same_run(state: dict[str, Any], spec: RunSpec, demo: Demo, folder: Path) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        UserError: names what differs.
    """
    advice = (
        "choose another --dir, or --fresh to begin anew (the old folder is kept); on a cluster, "
        "another name"
    )
    if state["demo"]["sha256"] != demo.sha256:
        theirs = state["demo"]
        raise UserError(
            f"{folder} belongs to another demo: its checkpoints are of {theirs['game']} "
            f"({theirs['sha256'][:12]}), the run file's demo is {demo.game} "
            f"({demo.sha256[:12]}); {advice}"
        )
    wanted = spec.model_dump(mode="json", by_alias=True)
    for field in _FIXED:
        before, now = _lookup(state["spec"], field), _lookup(wanted, field)
        if before != now:
            raise UserError(
                f"{folder}: its checkpoints have spec.{field} = {before}, the run file {now}; "
                f"{advice}"
            )


def met(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint's state says that this goal is met, and nothing is left to do."""
    same = not other_goal(state, spec) and not other_rules(state, spec)
    return bool(same and state["goal"]["met"] and spec.goal.after is After.STOP)


def other_goal(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint is of a run with another goal."""
    return _differs(state, spec, "goal")


def other_rules(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint's episodes were others: with other noise, or judged otherwise."""
    return _differs(state, spec, "environment") or _differs(state, spec, "curriculum")


def _differs(state: dict[str, Any], spec: RunSpec, topic: str) -> bool:
    wanted = spec.model_dump(mode="json", by_alias=True)
    return difference(state["spec"][topic], wanted[topic], topic) is not None


HOSTS_OWN = ("processes",)  # fields of a spec that are a machine's, and nothing that is learned


def difference(theirs: Any, ours: Any, path: str) -> str | None:
    """The first field in which two parts of a spec differ, if any; in words.

    Fields that only one of two versions knows are not compared.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        shared = (key for key in theirs if key in ours and key not in HOSTS_OWN)
        found = (difference(theirs[key], ours[key], f"{path}.{key}") for key in shared)
        return next((one for one in found if one is not None), None)
    return None if theirs == ours else f"{path} = {theirs}, this one {ours}"


def guided(spec: RunSpec) -> str:
    """Whether the guide was used, in the words that every result has beside it."""
    weight = spec.curriculum.guide_weight
    return f"guide {weight:g}" if weight else "pure reinforcement learning"


def _lookup(spec: dict[str, Any], field: str) -> Any:
    value: Any = spec
    for key in field.split("."):
        value = value.get(key)
    return value


def set_aside(folder: Path) -> Path | None:
    """Rename a run's folder, so that a new run can have its name; None if there is none.

    Raises:
        UserError: it cannot be renamed.
        TryAgain: not now.
    """
    if not folder.name:
        raise UserError(
            f"--fresh: {folder} has no name that could be changed; say --dir from outside of it"
        )
    number = 1
    try:
        if not folder.exists():
            return None
        while (old := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        return folder.rename(old)
    except OSError as error:
        raise fault(error)(
            f"--fresh: {folder} cannot be renamed: {error.strerror}; choose another --dir"
        ) from error


def make_folder(folder: Path) -> Path:
    """Make a run's folder; where its checkpoints are.

    Raises:
        UserError: it cannot be written.
        TryAgain: not now.
    """
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if not os.access(checkpoints, os.W_OK):
            read_only = os.statvfs(checkpoints).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number))
    except OSError as error:
        raise fault(error)(
            f"{folder}: the run's folder cannot be written: {error.strerror}; choose another --dir"
        ) from error
    return checkpoints


def keep(wanted: DemoResetRun, demo: Demo, folder: Path) -> None:
    """Write what is learned into the run's folder, beside what comes of it.

    Raises:
        TryAgain: the disk is full, read-only, or away.
    """
    write_json(folder / SPEC, wanted.model_dump(mode="json", by_alias=True))
    with suppress(OSError):
        if (folder / DEMO).read_bytes() == demo.to_bytes():
            return
    try:
        demo.save(folder / DEMO)
    except UserError as error:
        raise TryAgain(str(error)) from error


def write_json(path: Path, content: object) -> None:
    """Put a JSON file there, whole or not at all.

    Raises:
        TryAgain: the disk is full, read-only, or away.
    """
    try:
        # As it is, for YAML's sake: it does not know JSON's pairs of surrogates.
        text = json.dumps(content, indent=2, ensure_ascii=False)
        if path.exists() and not path.is_file():  # a device, or a pipe
            path.write_text(text + "\n", encoding="utf-8")
            return
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        raise TryAgain(f"{path}: cannot be written now: {error.strerror}") from error
