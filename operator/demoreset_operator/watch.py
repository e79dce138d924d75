"""What kopf is used for: watches that feed the cache, and a key into the queue. Nothing else.

`on.event` alone: no finalizers, no annotations, nothing to miss while we are away. A watch that was
cut off may miss deletions, so everything is listed again from time to time. A heartbeat that must
come back through a watch tells that the watches have died; and what a list has shown each watch
must have told by the next one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import kopf

from demoreset_api.names import (
    GROUP,
    KIND,
    LABEL_MANAGED_BY,
    LABEL_RUN,
    OPERATOR_NAME,
    PLURAL,
    VERSION,
)
from demoreset_operator.api import PAGE, PATHS, Api, ApiError
from demoreset_operator.cache import Cache
from demoreset_operator.observation import Json

OURS = f"{LABEL_MANAGED_BY}={OPERATOR_NAME}"
CHILDREN = (
    "Pod",
    "Service",
    "ConfigMap",
    "PersistentVolumeClaim",
    "NetworkPolicy",
    "PodDisruptionBudget",
)
RESYNC_SECONDS = 300.0  # between two lists of everything
BEGUN_SECONDS = 2.0  # until the watches have begun, as a rule
SETTLE_SECONDS = 15.0  # until the watches have told all that there was
BEAT_SECONDS = 30.0  # between heartbeats
DEAF_SECONDS = 120.0  # without one that came back, until the watches count as dead
HEARTBEAT = "demoreset-operator-heartbeat"

log = logging.getLogger(__name__)


class _Unchanged(kopf.DiffBaseStorage):
    """Kopf copies every object to compare it with what it was; nobody here asks for that."""

    def build(self, **_: Any) -> Any:
        """Nothing of it."""
        return {}

    def fetch(self, **_: Any) -> None:
        """It was nothing."""

    def store(self, **_: Any) -> None:
        """Nothing is kept."""


class Watch:
    """All watches of the operator.

    Args:
        api: To list.
        cache: What is fed.
        changed: Told the run of every change.
        namespaces: That are watched; none: all.
        own: The operator's namespace; of the heartbeat, if it is watched.
        listen: Takes the signals back that kopf has taken.
    """

    def __init__(
        self,
        api: Api,
        cache: Cache,
        changed: Callable[[str], None],
        namespaces: Sequence[str],
        own: str,
        listen: Callable[[], None],
    ) -> None:
        self._api, self._cache, self._changed, self._listen = api, cache, changed, listen
        self.namespaces, self._own = list(namespaces), own
        self._heard = time.monotonic()
        self._kinds: set[str] = set()  # of which a watch has told
        self._versions: dict[str, int] = {}  # of each object, as a watch told it last; by UID
        self._listed: dict[str, tuple[str, int]] = {}  # by the latest list: kind and version
        self._filled = self._heard  # when that was
        self._away: set[str] = set()  # namespaces that could not be listed then
        self._awaited: dict[str, tuple[str, int]] = {}  # of the list before, not told by then

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until told to stop."""
        self._heard = time.monotonic()
        settings = kopf.OperatorSettings()
        settings.scanning.disabled = True  # a Role is enough
        settings.posting.enabled = False
        settings.watching.server_timeout, settings.watching.client_timeout = 300, 330
        settings.watching.chunk_size = PAGE
        settings.process.ultimate_exiting_timeout = 30
        # Kopf keeps a task for every object of which it has just heard: thousands at the start.
        settings.queueing.idle_timeout = 0.5
        settings.persistence.diffbase_storage = _Unchanged()
        registry = kopf.OperatorRegistry()
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry, id="run")(self._on_run)
        for kind in CHILDREN:
            base, plural = PATHS[kind]
            group, _, version = base.removeprefix("/apis/").removeprefix("/api/").rpartition("/")
            settings.watching.label_selectors[group, version, plural] = OURS
            kopf.on.event(group, version, plural, registry=registry, id=plural, param=kind)(
                self._on_child
            )
        for login in (kopf.login_with_service_account, kopf.login_with_kubeconfig):
            kopf.on.login(registry=registry)(login)
        some = {"namespaces": self._served or self.namespaces}
        where: Json = some if self.namespaces else {"clusterwide": True}
        where["identity"] = OPERATOR_NAME  # else it asks for the user's name, which need not exist
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=registry, settings=settings, standalone=True, stop_flag=stop, **where
        )
        self._listen()
        await kopf.run_tasks(tasks, ignored=others)  # else it waits for what is not its own

    async def _on_run(self, event: Any, **_: Any) -> None:
        gone = self._hear(KIND, event)
        if (uid := self._cache.put_run(dict(event["object"]), gone=gone)) is not None:
            self._changed(uid)

    async def _on_child(self, event: Any, param: Any = None, **_: Any) -> None:
        gone = self._hear(param, event)
        body = {**event["object"], "kind": param}
        meta = body["metadata"]
        if meta["name"] == HEARTBEAT:
            self._heard = time.monotonic()
        if (uid := self._cache.put(body, gone=gone)) is None:
            return
        self._changed(uid)
        if gone:  # a new run of the same name may have waited for this
            name = meta["labels"].get(LABEL_RUN, "")
            if (other := self._cache.named(meta["namespace"], name)) not in (None, uid):
                self._changed(str(other))

    def _hear(self, kind: str, event: Any) -> bool:
        """Note what a watch has told; whether the object is gone."""
        self._kinds.add(kind)
        gone: bool = event["type"] == "DELETED"
        meta = event["object"]["metadata"]
        if gone:
            self._versions.pop(meta["uid"], None)
        else:
            self._versions[meta["uid"]] = int(meta["resourceVersion"])
        return gone

    async def fill(self) -> None:
        """List everything, and note what each watch must have told by the next time."""
        self._heard = time.monotonic() if not self._listed else self._heard
        listed = await self._look()
        # Kopf looks once for what can be watched, and one watch of many may die. Soon after a list
        # a watch may be late: then it is enough that it has told of anything.
        late = time.monotonic() - self._filled > DEAF_SECONDS
        self._awaited = {
            uid: (kind, version)
            for uid, (kind, version) in self._missing(self._listed).items()
            if late or kind not in self._kinds
        }
        self._listed, self._filled = listed, time.monotonic()

    async def _look(self) -> dict[str, tuple[str, int]]:
        """List everything, as kind and version by UID: what is not there any more is forgotten.

        A namespace that we may not list, as one that was deleted, and our Role with it, is left as
        it is known: the others' runs need an operator, and it may come back.
        """
        known = self._cache.identities()
        listed: dict[str, tuple[str, int]] = {}
        away: set[str] = set()
        for namespace in self.namespaces or [""]:
            try:
                await self._list(namespace, listed)
            except ApiError as error:
                away.add(namespace)
                if error.code not in (403, 404) or len(away) == max(1, len(self.namespaces)):
                    raise
                if namespace not in self._away:
                    log.warning("namespace %s cannot be listed now: %s", namespace, error)
        self._away = away
        for uid in known - listed.keys() - self._cache.identities(away):
            self._versions.pop(uid, None)
            if (run := self._cache.forget(uid)) is not None:
                log.info("an object of run %s was gone, and no watch had told of it", run)
                self._changed(run)
        for run in self._cache.runs:  # all of them, in case anything was missed
            self._changed(run)
        return listed

    async def _list(self, namespace: str, listed: dict[str, tuple[str, int]]) -> None:
        known = set(self._cache.runs)  # of another one not all is known before the list has ended
        for kind in (KIND, *CHILDREN):
            selector = OURS if kind != KIND else ""
            async for body in self._api.list(kind, namespace, selector):
                meta = body["metadata"]
                listed[meta["uid"]] = kind, int(meta["resourceVersion"])
                put = self._cache.put_run if kind == KIND else self._cache.put
                if (run := put({**body, "kind": kind})) in known:
                    self._changed(run)

    def _missing(self, listed: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
        """What of a list is still there, and no watch has told of it as it was then, or later."""
        there = self._cache.identities()
        return {
            uid: (kind, version)
            for uid, (kind, version) in listed.items()
            if uid in there and self._versions.get(uid, -1) < version
        }

    async def refill(self) -> None:
        """List everything again and again.

        At first soon after the watches have begun: each begins with a list of its own, and what
        went between ours and that one no watch tells.
        """
        await self._again(self._look, BEGUN_SECONDS)
        await self._again(self.fill, SETTLE_SECONDS)
        while True:
            await self._again(self.fill, RESYNC_SECONDS)

    async def _again(self, look: Callable[[], Awaitable[object]], wait: float) -> None:
        while True:
            await asyncio.sleep(wait)
            try:
                await look()
                return
            except ApiError as error:
                log.warning("not everything could be listed: %s", error)
                wait = min(wait, SETTLE_SECONDS)  # of what it has found no watch tells again

    @property
    def _served(self) -> list[str]:
        """The namespaces that could be listed; none where all of the cluster's are."""
        return [one for one in self.namespaces if one not in self._away]

    async def beat(self) -> None:
        """Write a heartbeat that is to come back through a watch."""
        while True:
            served = self._served
            watched = not served or self._own in served
            body = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": HEARTBEAT,
                    "namespace": self._own if watched else served[0],
                    "labels": {LABEL_MANAGED_BY: OPERATOR_NAME},
                },
                "data": {"time": str(time.time())},
            }
            try:
                await self._api.apply(body)
            except ApiError as error:
                log.warning("no heartbeat: %s", error)
                # That is not a watch's fault.
                self._heard = max(self._heard, time.monotonic() - BEAT_SECONDS)
            await asyncio.sleep(BEAT_SECONDS)

    def deaf(self) -> str | None:
        """Why the watches count as dead; None while they live."""
        if kinds := {kind for kind, _ in self._missing(self._awaited).values()}:
            return f"no watch tells of {', '.join(sorted(kinds))}"
        silent = time.monotonic() - self._heard
        if silent <= DEAF_SECONDS:
            return None
        return f"no sign of life from the watches for {silent:.0f} s"
