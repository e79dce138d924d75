"""The folder that a run lives in: made, kept, and whether what is there belongs to a run file."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demoreset_api.errors import UserError
from demoreset_api.spec import After, CurriculumSpec, DemoResetRun, PolicySpec, RunSpec
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import Demo
from demoreset_trainer.disk import fault, free_name, not_now, write_whole

if TYPE_CHECKING:
    from demoreset_trainer.checkpoint import Snapshot

SPEC, DEMO = "run.json", "demo" + demos.SUFFIX
HOSTS_OWN = ("processes",)  # fields of a spec that are a machine's, and nothing that is learned
_JUDGED = ("mode", "lagFrames", "extraFrames", "horizonFrames")  # what a success depends on
# What must be the same for a checkpoint to be of use; all else may change between two lives.
_FIXED = (
    "seed",
    "curriculum.mode",
    "policy.preset",
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
    check_same_demo(state, demo, folder, advice)
    wanted = spec.model_dump(mode="json", by_alias=True)
    for field in _FIXED:
        before, now = _lookup(state["spec"], field), _lookup(wanted, field)
        if before != now:
            raise UserError(
                f"{folder}: its checkpoints have spec.{field} = {before}, the run file {now}; "
                f"{advice}"
            )
    network = {key: state["spec"]["policy"][key] for key in ("preset", "recurrent")}
    if PolicySpec.model_validate(network).memory != spec.policy.memory:
        raise UserError(
            f"{folder}: its checkpoints are of a policy with{'out' * spec.policy.memory} memory, "
            f"the run file's is one with{'out' * (not spec.policy.memory)} "
            f"(spec.policy.recurrent); {advice}"
        )


def check_same_demo(state: dict[str, Any], demo: Demo, place: Path, advice: str) -> None:
    """Refuse a checkpoint that was learned from another demo than the run's.

    Raises:
        UserError: names both demos.
    """
    theirs = state["demo"]
    if theirs["sha256"] != demo.sha256:
        raise UserError(
            f"{place} belongs to another demo: what was learned there is of {theirs['game']} "
            f"({theirs['sha256'][:12]}), the run's demo is of {demo.game} ({demo.sha256[:12]}); "
            f"{advice}"
        )


def goal_met(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint's state says that this goal is met, and nothing is left to do."""
    same = not other_goal(state, spec) and not other_rules(state, spec)
    return bool(same and state["goal"]["met"] and spec.goal.after is After.STOP)


def other_goal(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint is of a run with another goal, whatever was to follow it."""
    return _differs(state, spec, "goal.successRate", "goal.episodes")


def other_rules(state: dict[str, Any], spec: RunSpec) -> bool:
    """Whether a checkpoint's episodes were others: with other noise, or judged otherwise."""
    told = state["spec"]["curriculum"]
    theirs = CurriculumSpec.model_validate({key: told[key] for key in _JUDGED if key in told})
    return _judged(theirs) != _judged(spec.curriculum) or _differs(state, spec, "environment")


def _judged(curriculum: CurriculumSpec) -> tuple[int | None, ...]:
    """By what a curriculum has episodes judged, whether it says so or leaves it to its mode."""
    in_force = curriculum.in_force
    return in_force.lag_frames, in_force.extra_frames, curriculum.horizon_frames


def going_on(checkpoints: Path, snapshot: "Snapshot", spec: RunSpec) -> str:
    """What is told of a checkpoint that a run goes on from."""
    words = f"going on from {checkpoints / snapshot.name} ({snapshot.frames:,} frames)"
    if other_rules(snapshot.state, spec):
        return f"{words}; its episodes were played or judged otherwise: the goal is confirmed anew"
    return words


def _differs(state: dict[str, Any], spec: RunSpec, *fields: str) -> bool:
    wanted = spec.model_dump(mode="json", by_alias=True)
    pairs = [(_lookup(state["spec"], one), _lookup(wanted, one), one) for one in fields]
    return any(difference(*pair) is not None for pair in pairs)


def difference(theirs: Any, ours: Any, path: str) -> str | None:
    """The first field in which two parts of a spec differ, if any; in words.

    Fields that only one of two versions knows are not compared.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        shared = (key for key in theirs if key in ours and key not in HOSTS_OWN)
        found = (difference(theirs[key], ours[key], f"{path}.{key}") for key in shared)
        return next((one for one in found if one is not None), None)
    return None if theirs == ours else f"{path} = {theirs}, this one {ours}"


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
    try:
        return folder.rename(free_name(folder)) if folder.exists() else None
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
    path, content = folder / DEMO, demo.to_bytes()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    try:
        write_whole(path, content)
    except OSError as error:
        raise not_now(path, error) from error


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
        raise not_now(path, error) from error
