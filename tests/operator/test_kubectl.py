"""`kubectl demoreset` where there is no cluster: what it asks kubectl for, and what it says."""

import argparse
import json
import subprocess
from typing import Any

import pytest

from demoreset_operator import plugin
from world import World

Json = dict[str, Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Json]:
    """What is made by a kubectl that finds no pod."""
    bodies: list[Json] = []

    def kubectl(_options: Any, *arguments: str, given: str | None = None) -> str:
        if given is not None:
            bodies.append(json.loads(given))
        return json.dumps({"items": []}) if arguments[0] == "get" else ""

    monkeypatch.setattr(plugin, "_kubectl", kubectl)
    return bodies


def read(world: World, image: str | None = None) -> None:
    options = argparse.Namespace(namespace=None, context=None, image=image)
    with plugin._Reader(options, world.run):
        pass


def test_the_volume_of_a_suspended_run_is_read_where_it_names_its_image(made: list[Json]) -> None:
    read(World(suspend=True, workers={"image": "mine:1", "nodeSelector": {"disk": "fast"}}))
    (reader,) = made
    assert reader["spec"]["containers"][0]["image"] == "mine:1"
    assert reader["spec"]["nodeSelector"] == {"disk": "fast"}
    assert {"claimName": "key-data"} in [
        volume.get("persistentVolumeClaim") for volume in reader["spec"]["volumes"]
    ]


def test_else_it_says_where_the_files_are(made: list[Json]) -> None:
    with pytest.raises(plugin.PluginError) as error:
        read(World(suspend=True))
    assert "name a trainer's with --image" in str(error.value)
    assert "the claim key-data in a pod of your own; its folder there is key" in str(error.value)
    assert not made
    read(World(), image="mine:2")
    assert made[0]["spec"]["containers"][0]["image"] == "mine:2"


def test_a_branch_with_other_lessons_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, made: list[Json]
) -> None:
    world = World()
    monkeypatch.setattr(plugin, "_read", lambda _options: (world.run_body, world.run))
    for change in ("seed=3", "demo.name=other", "curriculum.mode=Original", "environment.slots=8"):
        field = change.partition("=")[0].partition(".name")[0]
        with pytest.raises(SystemExit, match=rf"spec\.{field}: key's checkpoints are of no use"):
            plugin.main(["branch", "key", "new", "--set", change])
    assert not made


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
    monkeypatch.setattr(plugin, "_kubectl", lambda *_: json.dumps(body))
    with pytest.raises(SystemExit, match=r"does not know what key says: spec\.magic: Extra inputs"):
        plugin.main(["why", "key"])
