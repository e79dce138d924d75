"""`kubectl demoreset` where there is no cluster: what it asks kubectl for, and what it says."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from demoreset_api.errors import UserError
from demoreset_api.names import ANNOTATION_HASH, LABEL_RUN_UID
from demoreset_operator import plugin, pods, render, volume_reader
from demoreset_operator.kubectl import Kubectl
from demoreset_operator.render import Settings
from demoreset_operator.volume_reader import VolumeReader
from world import SETTINGS, World, training

Json = dict[str, Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Json]:
    """What is made by a kubectl that finds no pod but the one that was made."""
    bodies: list[Json] = []

    def kubectl(_: Any, *arguments: str, given: str | None = None) -> str:
        if given is not None:
            bodies.append(json.loads(given))
        return json.dumps({"items": [], "status": {"phase": "Running"}})

    monkeypatch.setattr(Kubectl, "run", kubectl)
    return bodies


def read(world: World, image: str | None = None) -> None:
    with VolumeReader(Kubectl(), world.run, image):
        pass


def running(world: World, name: str, claim: str | None = None) -> Json:
    """A worker's pod that runs, with its run's volume, or another one."""
    pod = pods.worker(world.run, SETTINGS, 0, 1)
    pod["metadata"]["name"] = name
    for volume in pod["spec"]["volumes"]:
        if claim is not None and volume["name"] == "data":
            volume["persistentVolumeClaim"]["claimName"] = claim
    return {**pod, "status": {"phase": "Running"}}


def test_a_volume_is_read_through_whoever_has_it_and_the_runs_own_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, branch = World(), World(checkpoint={"volume": {"claim": "key-data"}})
    branch.run_body["metadata"] |= {"name": "new", "uid": "u-2"}
    others = [running(branch, "other-worker-0-1", "other-data"), running(branch, "new-worker-0-1")]
    for own, wanted in (([], "new-worker-0-1"), (["key-worker-0-1"], "key-worker-0-1")):
        pods = {"items": [*others, *(running(world, name) for name in own)]}
        monkeypatch.setattr(Kubectl, "run", lambda *_, it=pods, **__: json.dumps(it))
        with VolumeReader(Kubectl(), world.run, None) as reader:
            assert not reader.made
            assert wanted in reader.command("ls")


def test_a_worker_of_a_run_that_is_over_is_about_to_end_and_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = training(1)
    world.end("key-worker-0-1", 0)
    world.settle()
    last = running(world, "key-worker-1-1")
    found = {"items": [last], "status": {"phase": "Running"}}
    monkeypatch.setattr(Kubectl, "run", lambda *_, **__: json.dumps(found))
    with VolumeReader(Kubectl(), world.run, None) as reader:
        assert reader.made


def test_a_character_that_stdout_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    monkeypatch.setattr(Kubectl, "run", lambda *_: "pulling …\n")
    plugin.main(["list"])
    assert printed.getvalue() == b"pulling ?\n"


def test_a_pod_of_somebody_elses_component_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    own = running(world, "key-worker-0-1")
    theirs = running(world, "shop-worker")
    del theirs["metadata"]["labels"][LABEL_RUN_UID]

    def kubectl(_: Any, *arguments: str) -> str:
        _, _, _, selector, *_ = arguments
        wanted = [one.partition("=") for one in selector.split(",")]
        found = [
            pod
            for pod in (theirs, own)
            if all(
                key in (its := pod["metadata"]["labels"]) and text in ("", its[key])
                for key, _, text in wanted
            )
        ]
        return json.dumps({"items": found})

    monkeypatch.setattr(Kubectl, "run", kubectl)
    with VolumeReader(Kubectl(), world.run, None) as reader:
        assert "key-worker-0-1" in reader.command("ls")


def test_the_volume_of_a_suspended_run_is_read_where_it_names_its_image(made: list[Json]) -> None:
    workers = {
        "image": "mine:1",
        "nodeSelector": {"disk": "fast"},
        "affinity": {"nodeAffinity": {"a": 1}, "podAntiAffinity": {"b": 1}},
        "labels": {"rank": "b"},
        "commonLabels": {"team": "a"},
    }
    read(World(suspend=True, workers=workers))
    (reader,) = made
    assert reader["spec"]["containers"][0]["image"] == "mine:1"
    assert reader["spec"]["nodeSelector"] == {"disk": "fast"}
    assert reader["spec"]["affinity"] == {"nodeAffinity": {"a": 1}}
    assert reader["metadata"]["labels"] == {"team": "a"}, "none by which it is a worker"
    assert {"claimName": "key-data"} in [
        volume.get("persistentVolumeClaim") for volume in reader["spec"]["volumes"]
    ]


def test_else_with_the_image_that_the_operator_wrote_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, made = World(suspend=True), []
    older, newer = (render.config_map(world.run, Settings(image)) for image in ("old:1", "new:2"))
    older["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    newer["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"

    def kubectl(_: Any, *arguments: str, given: str | None = None) -> str:
        if given is not None:
            made.append(json.loads(given))
        asks = "configmaps" in arguments and f"{LABEL_RUN_UID}={world.run.uid}" in arguments
        return json.dumps({"items": [newer, older] * asks, "status": {"phase": "Running"}})

    monkeypatch.setattr(Kubectl, "run", kubectl)
    read(world)
    assert made[0]["spec"]["containers"][0]["image"] == "new:2"


def test_another_image_is_written_down_in_the_same_run_file() -> None:
    one, other = (render.config_map(World().run, Settings(image)) for image in ("a:1", "b:1"))
    assert one["metadata"]["name"] == other["metadata"]["name"]
    assert one["data"] == other["data"]  # it is immutable
    assert (
        one["metadata"]["annotations"][ANNOTATION_HASH]
        != (other["metadata"]["annotations"][ANNOTATION_HASH])
    )


def test_else_it_says_where_the_files_are(made: list[Json]) -> None:
    with pytest.raises(UserError) as error:
        read(World(suspend=True))
    assert "name a trainer's with --image" in str(error.value)
    assert "the claim key-data in a pod of your own; its folder there is key" in str(error.value)
    assert not made
    read(World(), image="mine:2")
    assert made[0]["spec"]["containers"][0]["image"] == "mine:2"


def test_the_image_that_is_named_wins_over_the_runs_own(made: list[Json]) -> None:
    read(World(workers={"image": "mine:1"}), image="mine:2")
    assert made[0]["spec"]["containers"][0]["image"] == "mine:2"


def test_who_reads_fits_a_quota_and_has_hours_for_a_large_folder(made: list[Json]) -> None:
    read(World(), image="mine:1")
    spec = made[0]["spec"]
    resources = spec["containers"][0]["resources"]
    assert all(resources[kind].keys() == {"cpu", "memory"} for kind in ("requests", "limits"))
    assert 3600 < spec["activeDeadlineSeconds"] < 86_400
    assert spec["containers"][0]["command"] == ["sleep", str(spec["activeDeadlineSeconds"])]


def test_a_branch_with_other_lessons_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, made: list[Json]
) -> None:
    world = World()
    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))
    for change in ("seed=3", "demo.name=other", "curriculum.mode=Original", "environment.slots=8"):
        field = change.partition("=")[0].partition(".name")[0]
        with pytest.raises(SystemExit, match=rf"spec\.{field}: key's checkpoints are of no use"):
            plugin.main(["branch", "key", "new", "--set", change])
    for change in ("claim=other", "claim=null"):
        with pytest.raises(SystemExit, match="would begin from nothing"):
            plugin.main(["branch", "key", "new", "--set", f"checkpoint.volume.{change}"])
    assert not made


@pytest.mark.parametrize(("mode", "warned"), [("ReadWriteOnce", True), ("ReadWriteMany", False)])
def test_a_branch_of_a_run_that_trains_says_that_it_may_wait_for_the_volume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, warned: bool
) -> None:
    world = World()
    pods = {"items": [running(world, "key-worker-0-1")]}
    answers = {("get", "pods"): json.dumps(pods), ("get", "pvc"): json.dumps([mode])}
    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))
    monkeypatch.setattr(Kubectl, "run", lambda _, *words, **__: answers.get(words[:2], ""))
    monkeypatch.setattr(VolumeReader, "run", lambda *_: b"there")
    plugin.main(["branch", "key", "new"])
    warning = 'volume key-data is in use, and ["ReadWriteOnce"]: pods of new that come to'
    assert (warning in capsys.readouterr().err) is warned


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The run's, on a volume that is on this machine, with two checkpoints."""
    world = World()
    folder = tmp_path / "volume/key"
    for name in ("ckpt-l000001-u0000000001", "ckpt-l000001-u0000000002"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "MANIFEST.json").write_text("{}")
        (folder / "checkpoints" / name / "model.safetensors").write_bytes(b"1" * 50_000)
    for module in (plugin, volume_reader):
        monkeypatch.setattr(module, "DATA", str(folder.parent))
    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))
    monkeypatch.setattr(Kubectl, "run", lambda *_, **__: "")
    monkeypatch.setattr(VolumeReader, "__enter__", lambda reader: reader)
    monkeypatch.setattr(VolumeReader, "command", lambda _, *words: list(words))
    monkeypatch.setattr(plugin, "_warn_of_other_nodes", lambda *_: None)
    return folder


def test_a_branch_takes_what_is_whole_though_a_checkpoint_goes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    first, second = sorted((folder / "checkpoints").iterdir())
    goes = f"--sort=name --checkpoint=1 --checkpoint-action=exec='rm -rf {second}'"
    monkeypatch.setenv("TAR_OPTIONS", goes)
    plugin.main(["branch", "key", "new"])
    new = folder.with_name("new")
    assert [path.name for path in (new / "checkpoints").iterdir()] == [first.name]
    model = Path("checkpoints", first.name, "model.safetensors")
    assert (new / model).read_bytes() == (folder / model).read_bytes()
    monkeypatch.delenv("TAR_OPTIONS")
    with pytest.raises(SystemExit, match="new is on the volume already"):
        plugin.main(["branch", "key", "new"])


def test_a_branch_that_could_not_take_all_or_has_nothing_to_take_makes_no_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    tar = tmp_path / "tar"
    tar.write_text('#!/bin/sh\nPATH=${PATH#*:}; tar "$@"; case "$*" in *create*) exit 2; esac\n')
    tar.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    with pytest.raises(SystemExit, match="sh failed"):
        plugin.main(["branch", "key", "new"])
    monkeypatch.setenv("PATH", path)
    for model in folder.glob("checkpoints/*/MANIFEST.json"):
        model.unlink()
    with pytest.raises(SystemExit, match="key has no checkpoint yet"):
        plugin.main(["branch", "key", "new"])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key"], "room is given back"


def test_a_branch_takes_peoples_labels_and_its_queue_and_no_marks_of_tools(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    world = World()
    kept = {"team": "a", "kueue.x-k8s.io/queue-name": "gpus"}
    marks = {"app.kubernetes.io/instance": "an-application", "kapp.k14s.io/app": "1"}
    world.run_body["metadata"]["labels"] = {**kept, **marks}
    bodies: list[Json] = []

    def kubectl(_: Any, *words: str, given: str | None = None) -> str:
        if given is not None and "create" in words:
            bodies.append(json.loads(given))
        return '["ReadWriteMany"]'

    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))
    monkeypatch.setattr(Kubectl, "run", kubectl)
    plugin.main(["branch", "key", "new"])
    assert bodies[-1]["metadata"]["labels"] == kept


def test_a_fetch_that_was_cut_off_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    def cut_off(_: Any, *words: str) -> list[str]:
        return ["sh", "-c", '"$@" | head -c 70000', "sh", *words]

    out = tmp_path / "out"
    monkeypatch.setattr(VolumeReader, "command", cut_off)
    with pytest.raises(SystemExit, match=r"the stream was cut off: .*; what came is in .*\.out\.p"):
        plugin.main(["fetch", "key", "--out", str(out)])
    monkeypatch.setattr(plugin, "TAR", "true")
    with pytest.raises(SystemExit, match="nothing came"):
        plugin.main(["fetch", "key", "--out", str(out)])
    assert not out.exists()


def test_a_fetch_to_a_disk_that_takes_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(VolumeReader, "command", lambda _, *words: list(words))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/out cannot be written: .*; nothing came$"):
        plugin.main(["fetch", "key", "--out", str(tmp_path / "file/out")])


def test_the_status_of_a_run_that_nobody_has_looked_at_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(managedBy="somebody.else/x")
    monkeypatch.setattr(Kubectl, "read", lambda *_: ({}, world.run))
    plugin.main(["status", "key"])
    assert "It is somebody.else/x's to look after" in capsys.readouterr().out


def test_what_kubectl_says_beside_its_answer_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sh", "-c", "echo No resources found in games namespace. >&2"]
    monkeypatch.setattr(Kubectl, "command", lambda *_: words)
    plugin.main(["list"])
    assert capsys.readouterr() == ("", "No resources found in games namespace.\n")


@pytest.mark.parametrize("command", [["fetch"], ["fetch", "--best"], ["branch", "new"]])
def test_of_a_run_that_never_trained_it_says_that_there_is_no_checkpoint(
    capfd: pytest.CaptureFixture[str], folder: Path, command: list[str]
) -> None:
    folder.rename(folder.with_name("other"))
    with pytest.raises(SystemExit, match=r"key has no (best )?checkpoint yet"):
        plugin.main([command[0], "key", *command[1:]])
    assert capfd.readouterr().err == ""


UNSCHEDULED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({"conditions": [{**UNSCHEDULED, "message": "no room"}]}, 3),
        ({"conditions": [{**UNSCHEDULED, "message": 'persistentvolumeclaim "a" not found'}]}, 0),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, 0),
    ],
)
def test_who_waits_for_a_reader_is_told_why_and_not_kept_in_vain(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: Json,
    waits: int,
) -> None:
    waited: list[float] = []
    asked: list[str] = []

    def kubectl(_: Any, *words: str, **__: Any) -> str:
        asked.append(words[0])
        return json.dumps({"items": [], "status": {"phase": "Pending", **status}})

    monkeypatch.setattr(Kubectl, "run", kubectl)
    monkeypatch.setattr(time, "monotonic", lambda: 250.0 * len(waited))
    monkeypatch.setattr(time, "sleep", waited.append)
    why = status.get("message") or status["conditions"][0]["message"]
    with pytest.raises(UserError, match=f"does not begin: [a-zA-Z]+: {why}"):
        read(World(), image="mine:1")
    assert len(waited) == waits
    assert capsys.readouterr().err.count(f"it waits: Unschedulable: {why}") == min(waits, 1)
    assert asked[-1] == "delete"


@pytest.mark.parametrize("command", ["suspend", "resume"])
def test_a_run_that_is_over_is_neither_suspended_nor_resumed(
    monkeypatch: pytest.MonkeyPatch, made: list[Json], command: str
) -> None:
    world = training(1)

    def body(*_: Any) -> Json:
        return {"status": {"phase": world.run.status.phase, "later": 1}}

    monkeypatch.setattr(Kubectl, "body", body)
    plugin.main([command, "key"])
    world.end("key-worker-0-1", 2)
    world.settle()
    with pytest.raises(SystemExit, match=r"key is over \(Failed\): nothing changes"):
        plugin.main([command, "key"])


@pytest.mark.parametrize(("told", "old"), [(False, True), (True, False)])
def test_a_loss_that_nobody_tells_of_is_found_and_one_that_just_was_is_no_alarm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: bool, old: bool
) -> None:
    world = training(2)
    world.vanish("key-worker-1-1")
    monkeypatch.setattr(time, "sleep", lambda _: world.settle() if told else None)
    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))

    def kubectl(*_: Any) -> str:
        workers = (world.pods[pod.name] for pod in world.workers())
        return json.dumps({"items": list(workers)})

    monkeypatch.setattr(Kubectl, "run", kubectl)
    plugin.main(["why", "key"])
    assert ("That may be old: of its workers' pods 1 run now" in capsys.readouterr().out) is old


@pytest.mark.filterwarnings("ignore:Python 3.14")
def test_what_would_leave_the_folder_is_not_unpacked_by_an_old_python_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("run/summary.json", "../outside", "/outside", "run/link"):
            member = tarfile.TarInfo(name)
            if name.endswith("link"):
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(member)
    packed.seek(0)
    monkeypatch.delattr(tarfile, "data_filter")
    with tarfile.open(fileobj=packed, mode="r|") as archive:
        plugin._unpack(archive, tmp_path / "out")
    assert [one.relative_to(tmp_path) for one in tmp_path.rglob("*") if one.is_file()] == [
        Path("out/run/summary.json")
    ]


def test_a_pod_that_has_no_log_yet_does_not_end_those_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    asked: list[list[str]] = []

    def run(command: list[str]) -> Any:
        asked.append(command)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(Kubectl, "read", lambda *_: (world.run_body, world.run))
    monkeypatch.setattr(subprocess, "run", run)
    for words in ([], ["-f"], ["--pod", "key-worker-0-1"]):
        with pytest.raises(SystemExit):
            plugin.main(["logs", "key", *words])
    assert ["--ignore-errors" in command for command in asked] == [True, True, False]


@pytest.mark.parametrize("given", [["-n", "games", "why", "key"], ["why", "key", "-n", "games"]])
def test_the_namespace_is_named_before_or_after_the_command(
    monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="kubectl is not on the PATH"):
        plugin.main(given)
    assert asked[0][:3] == ["kubectl", "--namespace", "games"]


def test_a_run_of_a_later_version_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    body = World(magic=1).run_body
    monkeypatch.setattr(Kubectl, "run", lambda *_: json.dumps(body))
    with pytest.raises(SystemExit, match=r"does not know what key says: spec\.magic: Extra inputs"):
        plugin.main(["why", "key"])


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    script = (
        "import sys; from demoreset_operator import plugin; "
        "plugin._status = lambda *_: print('x' * 100_000); "
        "plugin.main(['status', 'key'])"
    )
    shell = f"'{sys.executable}' -c \"{script}\" | head -c 1"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("x", "")
