"""`kubectl demoreset`: a run's story, its log, its files. It uses kubectl, with your rights."""

import argparse
import json
import os
import secrets
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
from demoreset_api.names import COMPONENT_WORKER, GROUP, LABEL_COMPONENT, LABEL_RUN_UID, PLURAL
from demoreset_api.spec import AccessMode, ApiModel, RunSpec
from demoreset_api.status import Phase
from demoreset_operator import render
from demoreset_operator.observation import Json, Run, not_understood, parse_run, trouble
from demoreset_operator.render import DATA, QUEUE, Settings, claim_name, selector
from demoreset_operator.why import missing_claim, stale, why

RESOURCE = f"{PLURAL}.{GROUP}"
READER_SECONDS = 4 * 3600  # that a pod which reads a volume lives at most
READER_WAIT = 600.0  # for it to begin
POLL_SECONDS = 2.0
REACTION_SECONDS = 5.0  # from a loss until an operator has said so
READER_RESOURCES = {  # all four: a quota refuses pods that lack one which it counts
    "requests": {"cpu": "100m", "memory": "64Mi"},
    "limits": {"cpu": "1", "memory": "256Mi"},
}
# What matches a pattern; nothing where there is none.
FIND = "ls -d $0 2> /dev/null || true"
CHECKPOINTS = """
import sys, pathlib
for path in sorted(pathlib.Path(sys.argv[1]).glob("checkpoints/ckpt-*")):
    whole = (path / "MANIFEST.json").exists()
    size = sum(part.stat().st_size for part in path.iterdir())
    print(path.name, f"{size / 1e6:.1f} MB", "" if whole else "broken", sep="\\t")
"""
# A run that trains writes meanwhile: tar then ends with 1, and all that is whole has come.
TAR = 'tar --create --directory "$0" . ; test $? -le 1'
TAR_BEST = """
cd "$0" && best=$(cat checkpoints/BEST) || exit 2
tar --create $(ls -A | grep -vx checkpoints) checkpoints/BEST "checkpoints/$best" ; test $? -le 1
"""
# Of a pipe sh has the last code only; that of the first tar comes through 3.
COPY = """
if test -e "$1"; then echo "$1 is on the volume already; choose another name" >&2; exit 1; fi
trap 'rm -rf "$1.partial"' EXIT
rm -rf "$1.partial" && mkdir "$1.partial" || exit 1
code=$({
    { tar --create --directory "$0" .; echo $? >&3; } | tar --extract --directory "$1.partial"
} 3>&1) && test "$code" -le 1 || exit 1
if ! ls "$1.partial"/checkpoints/ckpt-*/MANIFEST.json > /dev/null 2>&1; then
    echo "no checkpoint stayed as long as copying took; try again" >&2; exit 1
fi
mv "$1.partial" "$1"
"""


class PluginError(Exception):
    """What a person is told."""


def main(given: Sequence[str] | None = None) -> None:
    """Run the plugin."""
    options = _parser().parse_args(given)
    try:
        options.func(options)
        sys.stdout.flush()
    except (PluginError, UserError) as error:
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
    command(
        "suspend", lambda options: _suspend(options, True), "save a checkpoint and delete all pods"
    )
    command("resume", lambda options: _suspend(options, False), "continue a suspended run")
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
            help="a trainer's, for a pod that reads the volume; needed if the run has no pod left",
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


def _list(options: argparse.Namespace) -> None:
    more = ["--all-namespaces"] if options.all_namespaces else []
    print(_kubectl(options, "get", RESOURCE, "-o", "wide", *more), end="")


def _status(options: argparse.Namespace) -> None:
    status = _read(options)[0].get("status") or {}
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


def _why(options: argparse.Namespace) -> None:
    _, run = _read(options)
    running = _running(options, run)
    if running is not None and stale(run.status, running):  # a loss: it may be being told of
        time.sleep(REACTION_SECONDS)
        _, run = _read(options)
        running = _running(options, run)
    print(why(run, datetime.now(UTC), running=running))


def _running(options: argparse.Namespace, run: Run) -> int | None:
    """How many of a run's workers have a pod that runs; None for who may not see pods."""
    try:
        found = _get(options, "pods", "-l", selector(run))
    except PluginError:
        return None
    return sum(map(_runs, found["items"]))


def _runs(pod: Json) -> bool:
    """Whether a pod runs, and is to go on running."""
    gone = "deletionTimestamp" in pod["metadata"]
    return pod["status"].get("phase") == "Running" and not gone


def _logs(options: argparse.Namespace) -> None:
    _, run = _read(options)
    which = [options.pod]
    if not options.pod:
        which = ["-l", selector(run), "--prefix", "--tail=100", "--max-log-requests=64"]
        which.append("--ignore-errors")  # of a pod that has no log yet, or whose node is gone
    command = _command(options, "logs", "-c", "worker", *which, *(["-f"] if options.follow else []))
    sys.exit(subprocess.run(command).returncode)


def _suspend(options: argparse.Namespace, suspend: bool) -> None:
    body = _body(options)  # whatever else it says: also a run of a later version can be suspended
    phase = (body.get("status") or {}).get("phase")
    if phase in (Phase.COMPLETE, Phase.FAILED):
        raise PluginError(f"{options.run} is over ({phase}): nothing changes")
    patch = json.dumps({"spec": {"suspend": suspend}})
    print(_kubectl(options, "patch", RESOURCE, options.run, "--type=merge", "-p", patch), end="")


def _checkpoints(options: argparse.Namespace) -> None:
    _, run = _read(options)
    with _Reader(options, run) as reader:
        output = reader.run("python", "-c", CHECKPOINTS, f"{DATA}/{run.name}")
    print(output.decode() or f"{run.name} has no checkpoint yet\n", end="")


def _fetch(options: argparse.Namespace) -> None:
    _, run = _read(options)
    out: Path = options.out or Path("runs") / run.name
    if out.exists():
        raise PluginError(f"{out} is there already; choose another --out")
    with _Reader(options, run) as reader:
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
            except tarfile.TarError as error:
                message = "nothing came"
                if partial.exists():
                    message = f"the stream was cut off; what came is in {partial}"
                raise PluginError(f"{message}: {error}") from error
            process.stdout.read()
        if process.returncode:
            raise PluginError(f"not all was fetched; what came is in {partial}")
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


def _branch(options: argparse.Namespace) -> None:
    body, run = _read(options)
    volume = run.spec.checkpoint.volume
    if volume.leaves:
        raise PluginError(
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
    _kubectl(options, "create", "--dry-run=server", "-f", "-", given=text)
    with _Reader(options, run) as reader:
        reader.needs("checkpoints/ckpt-*/MANIFEST.json")
        if not reader.made:
            _warn_of_other_nodes(options, run)
        old, new = f"{DATA}/{run.name}", f"{DATA}/{options.new}"
        reader.run("sh", "-c", COPY, old, new)
    print(_kubectl(options, "create", "-f", "-", given=text), end="")


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
            raise PluginError(
                f"{field}: {run.name}'s checkpoints are of no use with another one; make a new run "
                "with `kubectl apply`"
            )
    if new.checkpoint.volume.claim != claim_name(run):
        raise PluginError(
            f"spec.checkpoint.volume: {run.name}'s checkpoints are copied on their own claim, "
            f"{claim_name(run)}; on another one the new run would begin from nothing: leave it out"
        )


def _warn_of_other_nodes(options: argparse.Namespace, run: Run) -> None:
    """Say where the new run may have to wait for the old one, which runs."""
    claim = claim_name(run)
    modes = _kubectl(options, "get", "pvc", claim, "-o", "jsonpath={.spec.accessModes}")
    if AccessMode.MANY.value not in modes:
        print(
            f"kubectl demoreset: {run.name}'s volume {claim} is in use, and {modes}: pods of "
            f"{options.new} that come to another node wait for it; `kubectl demoreset suspend` "
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


# Reaching what there is


def _command(options: argparse.Namespace, *arguments: str) -> list[str]:
    where = ["--namespace", options.namespace] if options.namespace else []
    where += ["--context", options.context] if options.context else []
    return ["kubectl", *where, *arguments]


def _kubectl(options: argparse.Namespace, *arguments: str, given: str | None = None) -> str:
    command = _command(options, *arguments)
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PluginError("kubectl is not on the PATH") from error
    if done.returncode:
        raise PluginError(done.stderr.strip())
    return done.stdout


def _get(options: argparse.Namespace, *what: str) -> Json:
    """What the API server has: an object, or a list of them."""
    return dict(json.loads(_kubectl(options, "get", *what, "-o", "json")))


def _body(options: argparse.Namespace) -> Json:
    return _get(options, RESOURCE, options.run)


def _read(options: argparse.Namespace) -> tuple[Json, Run]:
    body = _body(options)
    try:
        return body, parse_run(body)
    except ValidationError as error:
        raise PluginError(
            f"this version does not know what {options.run} says: {not_understood(error)}; "
            "upgrade the plugin, or see `kubectl describe`"
        ) from error


class _Reader:
    """A pod that sees the run's volume: a worker that runs, else one that is made for it.

    Also a worker of another run, as of a branch: its node may be the only one that can have it.
    """

    def __init__(self, options: argparse.Namespace, run: Run) -> None:
        self._options, self._run = options, run
        self._pod, self.made, self._container = "", False, "worker"

    def __enter__(self) -> "_Reader":
        found = _get(self._options, "pods", "-l", f"{LABEL_COMPONENT}={COMPONENT_WORKER}")
        sees = [body for body in found["items"] if claim_name(self._run) in _claims(body)]
        pods = [body for body in sees if body["metadata"]["labels"][LABEL_RUN_UID] == self._run.uid]
        for body in (*pods, *sees):
            if _runs(body):
                self._pod = body["metadata"]["name"]
                return self
        image = self._options.image or self._run.spec.workers.image
        if image is not None and (self._options.image or not pods):
            pods = [render.worker(self._run, Settings(image), 0, 0)]
            pods[0]["spec"]["containers"][0]["image"] = image  # also of a run that names its own
        if not pods:
            raise PluginError(
                f"{self._run.name} has no pod now, and so no image is known that could read its "
                f"volume: name a trainer's with --image, or mount the claim "
                f"{claim_name(self._run)} in a pod of your own; its folder there is "
                f"{self._run.name}"
            )
        self._pod, self.made = f"{self._run.name}-reader-{secrets.token_hex(3)}", True
        self._container = "reader"
        _kubectl(self._options, "create", "-f", "-", given=json.dumps(_reader(self._pod, pods[-1])))
        print(f"kubectl demoreset: waiting for the pod {self._pod}", file=sys.stderr)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        """Wait until the pod that was made has begun, and say what it waits for."""
        until, said = time.monotonic() + READER_WAIT, ""
        while True:
            status = _get(self._options, "pod", self._pod).get("status") or {}
            if status.get("phase") == "Running":
                return
            words = ": ".join(filter(None, trouble(status, self._container)))
            over = status.get("phase") in ("Succeeded", "Failed") or time.monotonic() > until
            if over or missing_claim(words):
                words = words or status.get("phase", "Pending")
                raise PluginError(f"the pod {self._pod} does not begin: {words}")
            if words and words != said:
                print(f"kubectl demoreset: it waits: {words}", file=sys.stderr)
                said = words
            time.sleep(POLL_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self.made:
            _kubectl(self._options, "delete", "pod", self._pod, "--wait=false")

    def command(self, *arguments: str) -> list[str]:
        """A command that runs in the pod."""
        return _command(self._options, "exec", self._pod, "-c", self._container, "--", *arguments)

    def needs(self, what: str) -> None:
        """Refuse to go on where the run's folder has no such file: nothing was saved yet."""
        if not self.run("sh", "-c", FIND, f"{DATA}/{self._run.name}/{what}"):
            best = "best " if what.endswith("BEST") else ""
            raise PluginError(f"{self._run.name} has no {best}checkpoint yet")

    def run(self, *arguments: str) -> bytes:
        """What a command in the pod says."""
        done = subprocess.run(self.command(*arguments), capture_output=True)
        if done.returncode:
            raise PluginError(done.stderr.decode().strip() or f"{arguments[0]} failed")
        return done.stdout


def _claims(pod: Json) -> list[str]:
    """The claims whose volumes a pod sees."""
    volumes = (one.get("persistentVolumeClaim", {}) for one in pod["spec"].get("volumes", []))
    return [one["claimName"] for one in volumes if one]


def _reader(name: str, worker: Json) -> Json:
    """A pod like a worker's, that only waits."""
    spec = worker["spec"]
    container = next(one for one in spec["containers"] if one["name"] == "worker")
    kept = ("image", "imagePullPolicy", "securityContext")
    seen = ("data", "tmp")  # its run file may be gone
    wait: Json = {
        "command": ["sleep", str(READER_SECONDS)],
        "name": "reader",
        "resources": READER_RESOURCES,
        "volumeMounts": [one for one in container["volumeMounts"] if one["name"] in seen],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": worker["metadata"]["namespace"]},
        "spec": {
            "containers": [{**{key: container[key] for key in kept if key in container}, **wait}],
            "volumes": [one for one in spec["volumes"] if one["name"] in seen],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "activeDeadlineSeconds": READER_SECONDS,
            **{
                key: spec[key]
                for key in (
                    *("securityContext", "imagePullSecrets", "nodeSelector"),
                    *("tolerations", "automountServiceAccountToken"),
                )
                if key in spec
            },
        },
    }


if __name__ == "__main__":
    main()
