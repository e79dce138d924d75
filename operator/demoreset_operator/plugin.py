"""`kubectl demoreset`: a run's story, its log, its files. It uses kubectl, with your rights."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from demoreset_api import changes
from demoreset_api.errors import UserError
from demoreset_api.spec import AccessMode, ApiModel, RunSpec
from demoreset_api.status import Phase
from demoreset_api.stdout import lenient
from demoreset_operator.kubectl import RESOURCE, Kubectl, runs
from demoreset_operator.observation import Json, Run
from demoreset_operator.pods import QUEUE
from demoreset_operator.render import DATA, claim_name, selector
from demoreset_operator.volume_reader import VolumeReader
from demoreset_operator.why import stale, why

REACTION_SECONDS = 5.0  # from a loss until an operator has said so
CHECKPOINTS = """
import sys, pathlib
for path in sorted(pathlib.Path(sys.argv[1]).glob("checkpoints/ckpt-*")):
    whole = (path / "MANIFEST.json").exists()
    size = sum(part.stat().st_size for part in path.iterdir())
    print(path.name, f"{size / 1e6:.1f} MB", "" if whole else "broken", sep="\\t")
"""
# A run that trains writes meanwhile: tar then ends with 1, and all that is whole has come.
TAR = 'tar --create --warning=no-file-changed --exclude .reserve --directory "$0" . ; test $? -le 1'
TAR_BEST = """
cd "$0" && best=$(cat checkpoints/BEST) || exit 2
set -- $(ls -A | grep -vx checkpoints) checkpoints/BEST "checkpoints/$best"
tar --create --warning=no-file-changed "$@" ; test $? -le 1
"""
# Of a pipe sh has the last code only; that of the first tar comes through 3.
COPY = """
if test -e "$1"; then echo "$1 is on the volume already; choose another name" >&2; exit 1; fi
trap 'rm -rf "$1.partial"' EXIT
rm -rf "$1.partial" && mkdir "$1.partial" || exit 1
code=$({
    { tar --create --warning=no-file-changed --exclude .reserve --directory "$0" .; echo $? >&3; } |
        tar --extract --directory "$1.partial"
} 3>&1) && test "$code" -le 1 || exit 1
if ! ls "$1.partial"/checkpoints/ckpt-*/MANIFEST.json > /dev/null 2>&1; then
    echo "no checkpoint stayed as long as copying took; try again" >&2; exit 1
fi
mv "$1.partial" "$1"
"""


def main(given: Sequence[str] | None = None) -> None:
    """Run the plugin."""
    lenient()
    options = _parser().parse_args(given)
    try:
        options.func(Kubectl(options.namespace, options.context), options)
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"kubectl demoreset: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `kubectl demoreset status RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kubectl demoreset", description=__doc__)
    parser.add_argument("-n", "--namespace", help="default: kubectl's")
    parser.add_argument("--context", help="default: kubectl's")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, func: Any, text: str, *, run: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        for flag in (("-n", "--namespace"), ("--context",)):  # as kubectl, before and after
            made.add_argument(*flag, default=argparse.SUPPRESS, help="default: kubectl's")
        if run:
            made.add_argument("run", metavar="RUN", help="the run's name")
        made.set_defaults(func=func)
        return made

    command("list", _list, "all runs", run=False).add_argument(
        "-A", "--all-namespaces", action="store_true"
    )
    command("status", _status, "a run's figures and its latest losses")
    command("why", _why, "explain what is happening, and what to do about it")
    logs = command("logs", _logs, "what a run's workers say")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--pod", help="of this pod alone, also of one that has ended")
    command("suspend", _suspend, "save a checkpoint and delete all pods")
    command("resume", _resume, "continue a suspended run")
    checkpoints = command("checkpoints", _checkpoints, "list the checkpoints on a run's volume")
    fetch = command(
        "fetch", _fetch, "copy a run's folder to this machine, for `demoreset evaluate`"
    )
    fetch.add_argument("--out", type=Path, help="a new folder; default runs/RUN")
    fetch.add_argument("--best", action="store_true", help="of its checkpoints bring only the best")
    branch = command("branch", _branch, "start a new run from the latest checkpoint of another")
    branch.add_argument("new", metavar="NEW", help="the new run's name")
    for reads in (checkpoints, fetch, branch):
        reads.add_argument(
            "--image",
            help="a trainer's, for a pod that reads the volume; default: as the run has it",
        )
    branch.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the new run, as spec.ppo.learningRate=1e-4; repeatable",
    )
    return parser


# Commands


def _list(kubectl: Kubectl, options: argparse.Namespace) -> None:
    more = ["--all-namespaces"] if options.all_namespaces else []
    print(kubectl.run("get", RESOURCE, "-o", "wide", *more), end="")


def _status(kubectl: Kubectl, options: argparse.Namespace) -> None:
    body, run = kubectl.read(options.run)
    status = body.get("status") or {}
    if not status:  # another manages it, or nobody has looked at it yet
        print(why(run, datetime.now(UTC)))
        return
    shown = {key: value for key, value in status.items() if key not in ("places", "attempts")}
    print(yaml.safe_dump(shown, sort_keys=False), end="")
    for one in status.get("attempts", [])[-5:]:
        print("  ".join([one["ended"], one["pod"], one["cause"], *_after(one)]))


def _after(attempt: Json) -> list[str]:
    """How the run went on, and the worker's last words, as far as they are known."""
    after = ""
    if "recoverySeconds" in attempt:
        after = f"learned again {attempt['recoverySeconds']:.1f} s later"
    if "resumedFrom" in attempt:
        after += f" from update {attempt['resumedFrom']}, {attempt['lostFrames']:,} frames back"
    return list(filter(None, (after, attempt.get("message"))))


def _why(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _, run = kubectl.read(options.run)
    running = _running(kubectl, run)
    if running is not None and stale(run.status, running):  # a loss: it may be being told of
        time.sleep(REACTION_SECONDS)
        _, run = kubectl.read(options.run)
        running = _running(kubectl, run)
    print(why(run, datetime.now(UTC), running=running))


def _running(kubectl: Kubectl, run: Run) -> int | None:
    """How many of a run's workers have a pod that runs; None for who may not see pods."""
    try:
        found = kubectl.get("pods", "-l", selector(run))
    except UserError:
        return None
    return sum(map(runs, found["items"]))


def _logs(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _, run = kubectl.read(options.run)
    which = [options.pod]
    if not options.pod:
        which = ["-l", selector(run), "--prefix", "--tail=100", "--max-log-requests=64"]
        which.append("--ignore-errors")  # of a pod that has no log yet, or whose node is gone
    command = kubectl.command("logs", "-c", "worker", *which, *(["-f"] if options.follow else []))
    sys.exit(subprocess.run(command).returncode)


def _suspend(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _set_suspend(kubectl, options.run, True)


def _resume(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _set_suspend(kubectl, options.run, False)


def _set_suspend(kubectl: Kubectl, name: str, suspend: bool) -> None:
    body = kubectl.body(name)  # whatever else it says: also of a run of a later version
    phase = (body.get("status") or {}).get("phase")
    if phase in (Phase.COMPLETE, Phase.FAILED):
        raise UserError(f"{name} is over ({phase}): nothing changes")
    patch = json.dumps({"spec": {"suspend": suspend}})
    print(kubectl.run("patch", RESOURCE, name, "--type=merge", "-p", patch), end="")


def _checkpoints(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _, run = kubectl.read(options.run)
    with VolumeReader(kubectl, run, options.image) as reader:
        output = reader.run("python", "-c", CHECKPOINTS, f"{DATA}/{run.name}")
    print(output.decode() or f"{run.name} has no checkpoint yet\n", end="")


def _fetch(kubectl: Kubectl, options: argparse.Namespace) -> None:
    _, run = kubectl.read(options.run)
    out: Path = options.out or Path("runs") / run.name
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    with VolumeReader(kubectl, run, options.image) as reader:
        reader.needs("checkpoints/BEST" if options.best else "")
        pack = TAR_BEST if options.best else TAR
        command = reader.command("sh", "-c", pack, f"{DATA}/{run.name}")
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    _unpack(archive, partial)
            except (tarfile.TarError, OSError) as error:
                what = f"{out} cannot be written: {error}"
                if isinstance(error, tarfile.TarError):
                    what = f"the stream was cut off: {error}"
                came = f"what came is in {partial}" if partial.exists() else "nothing came"
                raise UserError(f"{what}; {came}") from error
            process.stdout.read()
        if process.returncode:
            raise UserError(f"not all was fetched; what came is in {partial}")
        partial.rename(out)
    print(f"{out}\nNext: demoreset evaluate {out}; demoreset video {out}")


def _unpack(archive: tarfile.TarFile, into: Path) -> None:
    """Unpack what stays inside a folder."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(into, filter="data")
    else:  # before Python 3.11.4, as in Debian 12
        archive.extractall(into, members=(one for one in archive if _stays_inside(one)))


def _stays_inside(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return (member.isfile() or member.isdir()) and not path.is_absolute() and ".." not in path.parts


def _branch(kubectl: Kubectl, options: argparse.Namespace) -> None:
    body, run = kubectl.read(options.run)
    volume = run.spec.checkpoint.volume
    if volume.leaves:
        raise UserError(
            f"{run.name}'s volume goes with it (spec.checkpoint.volume.retention: Delete), and the "
            "new run would lose it, too"
        )
    spec = {key: value for key, value in body["spec"].items() if key != "suspend"}
    shared = {"claim": claim_name(run)}
    spec["checkpoint"] = {**spec.get("checkpoint", {}), "volume": shared}
    labels = _copied(body["metadata"].get("labels") or {})
    made = {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {"name": options.new, "namespace": run.namespace, "labels": labels},
        "spec": spec,
    }
    for change in options.set:
        changes.apply(made, f"spec.{change.removeprefix('spec.')}")
    _same_to_learn(run, made)
    text = json.dumps(made)
    kubectl.run("create", "--dry-run=server", "-f", "-", given=text)
    with VolumeReader(kubectl, run, options.image) as reader:
        reader.needs("checkpoints/ckpt-*/MANIFEST.json")
        if not reader.made:
            _warn_of_other_nodes(kubectl, run, options.new)
        old, new = f"{DATA}/{run.name}", f"{DATA}/{options.new}"
        reader.run("sh", "-c", COPY, old, new)
    print(kubectl.run("create", "-f", "-", given=text), end="")


def _copied(labels: dict[str, str]) -> dict[str, str]:
    """The labels that a new run takes over: people's own, and that of its queue.

    By theirs, tools know what they have applied, and delete what is not in their source any more.
    """
    return {key: its for key, its in labels.items() if "/" not in key or key == QUEUE}


def _same_to_learn(run: Run, made: Json) -> None:
    """Refuse a new run that the old one's checkpoints are of no use to."""
    try:
        new = RunSpec.model_validate(made["spec"])
    except ValidationError:
        return  # the API server says it better
    for field in _changed(run.spec, new, "spec"):
        if field not in ("spec.managedBy", "spec.checkpoint.volume"):
            raise UserError(
                f"{field}: {run.name}'s checkpoints are of no use with another one; make a new run "
                "with `kubectl apply`"
            )
    if new.checkpoint.volume.claim != claim_name(run):
        raise UserError(
            f"spec.checkpoint.volume: {run.name}'s checkpoints are copied on their own claim, "
            f"{claim_name(run)}; on another one the new run would begin from nothing: leave it out"
        )


def _warn_of_other_nodes(kubectl: Kubectl, run: Run, new: str) -> None:
    """Say where the new run may have to wait for the old one, which runs."""
    claim = claim_name(run)
    modes = kubectl.run("get", "pvc", claim, "-o", "jsonpath={.spec.accessModes}")
    if AccessMode.MANY.value not in modes:
        print(
            f"kubectl demoreset: {run.name}'s volume {claim} is in use, and {modes}: pods of "
            f"{new} that come to another node wait for it; `kubectl demoreset suspend` "
            "lets it go",
            file=sys.stderr,
        )


def _changed(old: ApiModel, new: ApiModel, place: str) -> Iterator[str]:
    """Fields that never change in a run, and differ."""
    for name, field in type(old).model_fields.items():
        before, now, shown = getattr(old, name), getattr(new, name), field.alias or name
        if shown in old.fixed and before != now:
            yield f"{place}.{shown}"
        elif isinstance(before, ApiModel):
            yield from _changed(before, now, f"{place}.{shown}")


if __name__ == "__main__":
    main()
