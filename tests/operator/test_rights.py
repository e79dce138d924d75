"""The operator may do what it does, and nothing more."""

import asyncio
from pathlib import Path
from typing import Any

import yaml

from apiserver import Server
from demoreset_api.names import ANNOTATION_HASH, GROUP, KIND, LABEL_RUN_UID, LEASE, PLURAL
from demoreset_operator.api import PATHS
from demoreset_operator.cache import Cache
from demoreset_operator.controller import Controller
from demoreset_operator.lease import Lease
from demoreset_operator.metrics import Metrics
from demoreset_operator.watch import CHILDREN, Watch
from world import SETTINGS, World

RULES = Path(__file__).parents[2] / "manifests/base/rbac.yaml"
# What a request of ours is called in a rule, where it is called otherwise.
VERBS = {"apply": "patch", "apply status": "patch", "replace": "update"}

Right = tuple[str, str, str]  # group, resource, verb


def allowed() -> set[Right]:
    """All rights of the operator's account."""
    roles = ("demoreset-operator", "demoreset-operator-lease")
    return {
        (group, resource, verb)
        for one in yaml.safe_load_all(RULES.read_text())
        if one["kind"] in ("ClusterRole", "Role") and one["metadata"]["name"] in roles
        for rule in one["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right(request: str, kind: str) -> Right:
    """The right that a request needs."""
    base, plural = PATHS[kind]
    group = base.removeprefix("/apis/").removeprefix("/api/").rpartition("/")[0]
    resource = f"{plural}/status" if request == "apply status" else plural
    return group, resource, VERBS.get(request, request)


class Operator:
    """One that has just begun, and looks at a run when it is told to."""

    def __init__(self, server: Any) -> None:
        self.cache = Cache()
        self.controller = Controller(server, self.cache, SETTINGS, Metrics())
        self.watch = Watch(server, self.cache, lambda uid: None, (), "operators", lambda: None)

    async def look(self, times: int = 1, *, fill: bool = True) -> None:
        for _ in range(times):
            if fill:
                await self.watch.fill()
            await self.controller.reconcile("u-1")


async def life(server: Server) -> None:
    """A run whose operator has all to do that there is."""
    world = server.world
    lease = Lease(server, "operators", LEASE, "us")
    for _ in ("taken", "renewed"):
        await lease._try()
    await Operator(server).look()
    # Another one, whose watches have not told yet of what there is.
    blind = Operator(server)
    blind.cache.put_run(world.run_body)
    await blind.look(fill=False)
    # One of a later version, which makes its objects otherwise; and a volume of an earlier run.
    for body in world.children.values():
        body["metadata"]["annotations"][ANNOTATION_HASH] = "another"
    claim = world.children["PersistentVolumeClaim", "key-data"]
    claim["metadata"]["labels"][LABEL_RUN_UID] = "u-0"
    operator = Operator(server)
    await operator.look(2)
    # Something else to learn, fewer workers, and the end.
    world.change(budget={"frames": 7}, workers={"max": 1})
    await operator.look(3)
    world.start()
    for pod in world.workers():
        world.end(pod.name, 0)
    await operator.look(2)
    assert world.deleted


def test_the_operator_has_the_rights_that_it_uses_and_no_more() -> None:
    server = Server(World(workers={"max": 2}, ttlSecondsAfterFinished=0))
    asyncio.run(life(server))
    used = {right(request, kind) for request, kind in server.requests}
    used |= {right("watch", kind) for kind in (KIND, *CHILDREN)}  # by kopf
    used.add((GROUP, f"{PLURAL}/finalizers", "update"))  # to own what blocks its deletion
    assert used == allowed()
