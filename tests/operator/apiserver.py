"""The API server of a world, in this process: it takes requests, and has a log for watches.

Strict where the operator must be right: a pod that was made is never changed, a version that was
read counts, and whose owner is gone is collected.
"""

import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

from demoreset_api.names import KIND, LABEL_RUN_UID
from demoreset_api.status import RunStatus
from demoreset_operator.api import ApiError
from world import Crash, Json, World

T = TypeVar("T")
Key = tuple[str, str, str]


def key(body: Json) -> Key:
    """Kind, namespace and name."""
    return body["kind"], body["metadata"]["namespace"], body["metadata"]["name"]


def fits(body: Json, kind: str, namespace: str, selector: str) -> bool:
    """Whether an object is among those that are asked for; "" is any namespace."""
    wanted = dict(one.split("=") for one in selector.split(",") if one)
    labels = body["metadata"].get("labels") or {}
    here = namespace in ("", body["metadata"]["namespace"])
    return here and body["kind"] == kind and wanted.items() <= labels.items()


def as_wanted(body: Json, uid: str, version: str) -> bool:
    """Whether an object fulfils a deletion's preconditions; "" is any."""
    meta = body["metadata"]
    return uid in ("", meta["uid"]) and version in ("", meta["resourceVersion"])


def copied(content: T) -> T:
    """What comes over the wire is nobody else's."""
    made: T = json.loads(json.dumps(content))
    return made


class Server:
    """Takes requests as the operator's Api does.

    others: objects of no run, or of another one. log: all changes, the oldest first. fate: of the
    next requests, "" where nothing befalls them; `befalls` has what else may happen just then.
    dead: the operator is, and asks for nothing more.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.others: dict[Key, Json] = {}
        self.log: list[tuple[str, Json]] = []
        self.version = 0
        self.fate: Iterator[str] = iter(())
        self.befalls: dict[str, Callable[[], Awaitable[None]]] = {}
        self.dead = False
        self.requests: list[tuple[str, str]] = []
        self._known: dict[str, Json] = {}
        self._uids = itertools.count()
        self.notice()

    def objects(self) -> dict[Key, Json]:
        run = [] if self.world.deleted else [self.world.run_body]
        found = [*run, *self.world.pods.values(), *self.world.children.values()]
        return {key(body): body for body in found} | self.others

    def found(self, kind: str, namespace: str, selector: str) -> list[Json]:
        return [body for body in self.objects().values() if fits(body, kind, namespace, selector)]

    def notice(self) -> None:
        """Give what has changed a new version, of which the watches are to tell."""
        now = {body["metadata"]["uid"]: body for body in self.objects().values()}
        for uid in [uid for uid in self._known if uid not in now]:
            body = self._known.pop(uid)
            meta = {**body["metadata"], "resourceVersion": self._next()}
            self.log.append(("DELETED", {**body, "metadata": meta}))
        for uid, body in now.items():
            if body != self._known.get(uid):
                body["metadata"]["resourceVersion"] = self._next()
                change = "MODIFIED" if uid in self._known else "ADDED"
                self._known[uid] = copied(body)
                self.log.append((change, self._known[uid]))

    def _next(self) -> str:
        self.version += 1
        return str(self.version)

    def collect(self) -> None:
        """The garbage collector: whose owner is gone goes, too."""
        here = {body["metadata"]["uid"] for body in self.objects().values()}
        for where, body in self.objects().items():
            owners = {one["uid"] for one in body["metadata"].get("ownerReferences", ())}
            if owners and not owners & here:
                self._drop(where)
        self.notice()

    # Requests

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        return await self._serve("get", kind, lambda: self.objects().get((kind, namespace, name)))

    async def list(self, kind: str, namespace: str, selector: str) -> AsyncIterator[Json]:
        for body in await self._serve("list", kind, lambda: self.found(kind, namespace, selector)):
            yield body

    async def create(self, body: Json, *, dry_run: bool = False) -> Json | None:
        there = key(body)

        def take() -> Json | None:
            if there in self.objects():
                return None
            return body if dry_run else self._keep(body)

        return await self._serve("create", body["kind"], take)

    async def apply(self, body: Json) -> Json:
        assert body["kind"] != "Pod", "a pod is made once, and never changed"
        return await self._serve("apply", body["kind"], lambda: self._keep(body))

    async def replace(self, body: Json) -> Json:
        assert body["kind"] == "Lease", "nothing else is written whole"

        def take() -> Json:
            version = self._there(key(body))["metadata"]["resourceVersion"]
            if body["metadata"]["resourceVersion"] != version:
                raise ApiError(409, "another resourceVersion")
            return self._keep(body)

        return await self._serve("replace", "Lease", take)

    async def patch(self, kind: str, namespace: str, name: str, change: Json) -> Json:
        assert kind == "PersistentVolumeClaim", "nothing else is changed in part"

        def take() -> Json:
            body = self._there((kind, namespace, name))
            return self._keep({**body, "metadata": {**body["metadata"], **change["metadata"]}})

        return await self._serve("patch", kind, take)

    async def apply_status(self, body: Json) -> Json:
        def take() -> Json:
            run = self._there(key(body))
            for field in ("uid", "resourceVersion"):
                if body["metadata"][field] != run["metadata"][field]:
                    raise ApiError(409, f"another {field}")
            self.world.write(RunStatus.model_validate(body["status"]))
            return self.world.run_body

        return await self._serve("apply status", body["kind"], take)

    async def delete(
        self, kind: str, namespace: str, name: str, uid: str = "", version: str = ""
    ) -> Json | None:
        assert kind != KIND or version, "a run goes as it was when that was decided"

        def take() -> Json | None:
            self.notice()  # of what somebody has just changed, or else it has its old version
            body = self.objects().get((kind, namespace, name))
            if body is not None and as_wanted(body, uid, version):
                self._drop((kind, namespace, name))
            self.notice()
            left = self.objects().get((kind, namespace, name))
            ends = left is not None and "deletionTimestamp" in left["metadata"]
            return copied(left) if left is not None and ends else None

        return await self._serve("delete", kind, take)

    async def _serve(self, verb: str, kind: str, take: Callable[[], T]) -> T:
        fate = next(self.fate, "")
        self.dead = self.dead or fate == "die"
        if self.dead:
            raise Crash
        self.requests.append((verb, kind))
        if fate == "refused":
            raise ApiError(500, "no luck")
        if fate in self.befalls:
            await self.befalls[fate]()
        answer = take()
        self.notice()
        if fate == "answer lost":
            raise ApiError(0, "no answer")
        return copied(answer)

    def _there(self, where: Key) -> Json:
        if (body := self.objects().get(where)) is None:
            raise ApiError(404, "not found")
        return body

    def _keep(self, body: Json) -> Json:
        kind, _, name = where = key(body)
        if kind == "Event":
            return body
        if kind == "Pod":
            self.world.create(body)
            return self.world.pods[name]
        old = self.objects().get(where) or {"metadata": {"uid": f"o-{next(self._uids)}"}}
        if old.get("immutable") and old["data"] != body["data"]:
            raise ApiError(422, "field is immutable")
        made = {**copied(body), "metadata": {**old["metadata"], **body["metadata"]}}
        if LABEL_RUN_UID in made["metadata"].get("labels", ()):
            self.world.children[kind, name] = made
        else:
            self.others[where] = made
        return made

    def _drop(self, where: Key) -> None:
        kind, _, name = where
        if where in self.others:
            del self.others[where]
        elif kind == "Pod":
            self.world.delete(name)
        elif kind == KIND:
            self.world.deleted = True
        else:
            del self.world.children[kind, name]
