"""`kubectl demoreset` where there is no cluster: what it asks kubectl for, and what it says."""

import argparse
import json
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


def read(world: World) -> None:
    with plugin._Reader(argparse.Namespace(namespace=None, context=None), world.run):
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
    assert "`kubectl demoreset resume key`" in str(error.value)
    assert "the claim key-data in a pod of your own: its folder there is key" in str(error.value)
    assert not made


def test_a_run_of_a_later_version_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    body = World(magic=1).run_body
    monkeypatch.setattr(plugin, "_kubectl", lambda *_: json.dumps(body))
    with pytest.raises(SystemExit, match=r"does not know what key says: spec\.magic: Extra inputs"):
        plugin.main(["why", "key"])
