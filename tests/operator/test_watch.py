"""Kopf's watches, against an API server in this process that refuses what nobody should ask."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from apiport import Port, only_here
from apiserver import Server, key
from demoreset_api.names import KIND, LABEL_MANAGED_BY
from demoreset_operator import api as apis
from demoreset_operator import watch as watches
from demoreset_operator.api import Api, ApiError
from demoreset_operator.cache import Cache
from demoreset_operator.controller import Controller
from demoreset_operator.metrics import Metrics
from demoreset_operator.watch import DEAF_SECONDS, OURS, RESYNC_SECONDS, SETTLE_SECONDS, Watch
from world import SETTINGS, Json, World

UID = "u-1"


@pytest.fixture(autouse=True)
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    only_here(monkeypatch, path)
    return path


class Clock:
    """What the watches take for the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.time = itertools.count().__next__  # a heartbeat is other than the last one

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watches, "time", made)
    monkeypatch.setattr(watches, "BEAT_SECONDS", 0.01)
    return made


class Watched:
    """A run with two workers, its API server, and what the operator's watches make of it."""

    def __init__(self, *namespaces: str) -> None:
        self.world = World(workers={"min": 1, "max": 2})
        self.world.settle()
        self.server = Server(self.world)
        self.port = Port(self.server, *namespaces)
        self.api, self.cache = Api(), Cache()
        self.controller = Controller(self.api, self.cache, SETTINGS, Metrics())
        self.changed: list[str] = []
        self.signals = 0  # how often they were taken back
        self.watch = Watch(
            self.api, self.cache, self._change, namespaces, "games", self._take_signals
        )
        self.stop = asyncio.Event()
        self.running: asyncio.Task[None]

    def _change(self, uid: str) -> None:
        self.changed.append(uid)
        self.controller.wake(uid)

    def _take_signals(self) -> None:
        self.signals += 1

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert not self.running.done(), "the watches have ended"
            await asyncio.sleep(0.01)

    async def begun(self) -> None:
        """Wait until kopf has listed all that it knows of, and watches it."""
        await self.until(lambda: all(self.port.asked["WATCH", one] for one in self.port.known))
        await self.until(self.all_is_known)

    def all_is_known(self) -> bool:
        there = {
            body["metadata"]["uid"]
            for kind in self.port.known
            for body in self.server.found(kind, "", OURS if kind != KIND else "")
        }
        return self.cache.identities() == there

    def pods(self, phase: str = "") -> set[str]:
        """The names of those that are known."""
        return {pod.name for pod in self.cache.pods(UID) if phase in ("", pod.phase)}


@asynccontextmanager
async def watching(
    kubeconfig: Path, *namespaces: str, given: Callable[[Watched], object] = lambda _: None
) -> AsyncIterator[Watched]:
    """The watches run; in the end nothing was asked that should not be."""
    it = Watched(*namespaces)
    given(it)
    await it.port.open(kubeconfig)
    await it.api.connect()
    it.running = asyncio.create_task(it.watch.run(it.stop))
    try:
        async with asyncio.timeout(20):
            await it.begun()
            yield it
    finally:
        await it.api.close()  # kopf waits for all that began after it, a server's connections too
        it.stop.set()
        await it.running
        await it.port.close()
    assert it.port.refused == []


def test_what_is_there_is_told_and_what_becomes_of_it(kubeconfig: Path) -> None:
    async def story() -> None:
        async with watching(kubeconfig) as it:
            assert list(it.cache.runs) == [UID]
            it.world.start()
            await it.until(lambda: it.pods("Running") == set(it.world.pods))
            it.changed.clear()
            it.world.change(workers={"min": 1, "max": 3})
            it.world.settle()
            await it.until(it.all_is_known)
            it.world.vanish("key-worker-0-1")
            await it.until(lambda: "key-worker-0-1" not in it.pods())
            assert set(it.changed) == {UID}
            it.world.deleted = True
            await it.until(lambda: not it.cache.runs)
            assert it.signals == 1, "kopf takes them"

    asyncio.run(story())


def test_long_lists_are_told_whole(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "PAGE", 2)
    monkeypatch.setattr(apis, "PAGE", 2)

    async def story() -> None:
        async with watching(kubeconfig) as it:
            assert it.port.asked["GET", "Pod"] == 2, "three pods"
            await it.watch.fill()
            assert it.port.asked["GET", "Pod"] == 4
            assert it.all_is_known()

    asyncio.run(story())


def test_a_watch_that_is_cut_off_goes_on_where_it_was(kubeconfig: Path) -> None:
    async def story() -> None:
        async with watching(kubeconfig) as it:
            it.port.asked.clear()
            it.port.cut("Pod")
            it.world.start()
            it.world.vanish("key-worker-0-1")
            await it.until(lambda: it.pods() == it.pods("Running") == set(it.world.pods))
            assert it.port.asked == {("WATCH", "Pod"): 1}

    asyncio.run(story())


def test_a_watch_that_comes_too_late_begins_anew_and_a_list_finds_what_went(
    kubeconfig: Path,
) -> None:
    async def story() -> None:
        async with watching(kubeconfig) as it:
            it.port.asked.clear()
            it.port.cut("Pod")
            it.world.start()
            it.world.vanish("key-worker-0-1")
            it.port.forget()
            await it.until(lambda: it.pods("Running") == set(it.world.pods))
            assert it.port.asked["GET", "Pod"] == 1
            assert "key-worker-0-1" in it.pods(), "nobody has told"
            it.changed.clear()
            await it.watch.fill()
            assert it.pods() == set(it.world.pods)
            assert it.changed[-1] == UID
            it.world.vanish()
            it.world.deleted = True
            await it.until(lambda: not it.cache.runs)

    asyncio.run(story())


class Listed(Api):
    """Lists a world's run and pods, and the first time of some kinds nothing."""

    def __init__(self, world: World, *away: str) -> None:
        super().__init__()
        self._world, self._away = world, set(away)

    async def list(self, kind: str, namespace: str, selector: str) -> AsyncIterator[Json]:
        if kind in self._away:
            self._away.remove(kind)
            raise ApiError(503, "etcd is away")
        pods = [*self._world.pods.values()]
        for body in {KIND: [self._world.run_body], "Pod": pods}.get(kind, []):
            yield {**body, "metadata": {**body["metadata"], "resourceVersion": "1"}}


def test_of_a_run_that_a_list_has_found_all_is_known_before_it_is_looked_at() -> None:
    """Else its pods would be taken for lost."""
    world, cache = World(), Cache()
    world.settle()
    known: list[int] = []
    watch = Watch(
        Listed(world),
        cache,
        lambda uid: known.append(len(cache.pods(uid))),
        [],
        "games",
        lambda: None,
    )
    asyncio.run(watch.fill())
    assert known == [len(world.pods)]


def test_a_list_that_breaks_off_is_made_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has found is news to no watch."""
    slept: list[float] = []
    changed: list[str] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    watch = Watch(Listed(World(), "Pod"), Cache(), changed.append, [], "games", lambda: None)
    asyncio.run(watch._again(watch.fill, RESYNC_SECONDS))
    assert slept == [RESYNC_SECONDS, SETTLE_SECONDS]
    assert changed == [UID]


def test_what_went_while_the_watches_began_is_found_soon(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "BEGUN_SECONDS", 0.01)

    async def story() -> None:
        async with watching(kubeconfig) as it:
            it.port.cut("Pod")
            it.world.vanish("key-worker-0-1")
            it.port.forget()  # between two lists
            looking = asyncio.create_task(it.watch.refill())
            await it.until(lambda: it.pods() == set(it.world.pods))
            assert it.changed[-1] == UID
            looking.cancel()

    asyncio.run(story())


def another(kind: str, namespace: str, name: str, **labels: str) -> Callable[[Watched], object]:
    """Somebody else's object is there, too."""
    meta = {"namespace": namespace, "name": name, "uid": f"of {name}", "labels": labels}
    body: Json = {"apiVersion": "v1", "kind": kind, "metadata": meta, "spec": {}}
    return lambda it: it.server.others.update({key(body): body})


def test_what_is_not_ours_is_not_asked_for(kubeconfig: Path) -> None:
    """The port refuses a list and a watch of all pods."""
    given = another("Pod", "games", "shop", **{LABEL_MANAGED_BY: "Helm"})

    async def story() -> None:
        async with watching(kubeconfig, given=given) as it:
            await it.watch.fill()
            assert it.port.asked["GET", "Pod"] == 2
            assert "of shop" not in it.cache.identities()

    asyncio.run(story())


def test_an_operator_of_some_namespaces_asks_for_nothing_else(kubeconfig: Path) -> None:
    given = another(KIND, "arcade", "other")

    async def story() -> None:
        async with watching(kubeconfig, "games", "arcade", given=given) as it:
            assert set(it.cache.runs) == {UID, "of other"}
            await it.watch.fill()
            assert it.port.asked["GET", "Pod"] == 4

    asyncio.run(story())


def test_a_namespace_that_was_deleted_does_not_cost_the_others_their_operator(
    kubeconfig: Path,
) -> None:
    async def story() -> None:
        given = another(KIND, "arcade", "other")
        async with watching(kubeconfig, "games", "arcade", given=given) as it:
            it.port.forbidden.add("arcade")
            await it.watch.fill()
            assert set(it.cache.runs) == {UID, "of other"}, "it may come back: its pods may live"
            it.world.vanish("key-worker-0-1")
            it.port.forbidden.add("games")
            with pytest.raises(ApiError):  # that is another trouble
                await it.watch.fill()
            it.port.forbidden.clear()
            await it.watch.fill()
            assert set(it.cache.runs) == {UID, "of other"}

    asyncio.run(story())


def test_a_run_that_waits_for_a_name_is_told_when_it_is_free(kubeconfig: Path) -> None:
    """The pods are those of a run that was deleted; another one has its name by now."""

    async def story() -> None:
        given = dict.__setitem__
        async with watching(
            kubeconfig, given=lambda it: given(it.world.run_body["metadata"], "uid", "u-2")
        ) as it:
            it.changed.clear()
            it.world.vanish("key-worker-0-1")
            await it.until(lambda: "u-2" in it.changed)

    asyncio.run(story())


def test_a_heartbeat_comes_back_while_the_watches_live(kubeconfig: Path, clock: Clock) -> None:
    async def story() -> None:
        async with watching(kubeconfig) as it:
            beating = asyncio.create_task(it.watch.beat())

            async def beats(count: int) -> None:
                before = it.port.asked["PATCH", "ConfigMap"]
                await it.until(lambda: it.port.asked["PATCH", "ConfigMap"] > before + count)

            clock.now += DEAF_SECONDS + 1
            await it.until(lambda: it.watch.deaf() is None)
            it.port.deaf.add("ConfigMap")
            await beats(5)  # what was told before is heard by then
            clock.now += DEAF_SECONDS
            assert it.watch.deaf() is None
            clock.now += 1
            silent = f"{DEAF_SECONDS + 1:.0f} s"
            assert it.watch.deaf() == f"no sign of life from the watches for {silent}"
            it.port.away = "no more of these"
            await it.until(lambda: it.watch.deaf() is None)  # that is not the watches' fault
            it.port.away = ""
            clock.now += DEAF_SECONDS
            await beats(2)
            assert it.watch.deaf() is not None
            it.port.deaf.clear()
            await it.until(lambda: it.watch.deaf() is None)
            beating.cancel()

    asyncio.run(story())


def test_a_kind_that_kopf_did_not_find_is_told(kubeconfig: Path, clock: Clock) -> None:
    """It looks once, when it begins: a CRD may come later."""

    async def story() -> None:
        async with watching(
            kubeconfig, given=lambda it: it.port.known.discard("NetworkPolicy")
        ) as it:
            await it.watch.fill()
            assert it.watch.deaf() is None, "what was not there before may be told soon"
            clock.now += SETTLE_SECONDS
            await it.watch.fill()
            assert it.watch.deaf() == "no watch tells of NetworkPolicy"

    asyncio.run(story())


@pytest.mark.parametrize("kind", [KIND, "Pod"])
def test_a_watch_that_has_died_alone_is_told(kubeconfig: Path, clock: Clock, kind: str) -> None:
    async def story() -> None:
        async with watching(kubeconfig) as it:
            for _ in range(3):
                await it.watch.fill()
                clock.now += RESYNC_SECONDS
            assert "no watch" not in str(it.watch.deaf()), "they live"
            await it.watch.fill()
            it.port.deaf.add(kind)
            it.world.start()
            it.world.change(seed=7)
            await it.watch.fill()
            clock.now += SETTLE_SECONDS
            await it.watch.fill()
            assert "no watch" not in str(it.watch.deaf()), "it may be late"
            clock.now += RESYNC_SECONDS
            await it.watch.fill()
            assert it.watch.deaf() == f"no watch tells of {kind}"
            it.port.deaf.clear()
            await it.until(lambda: "no watch" not in str(it.watch.deaf()))

    asyncio.run(story())


def test_what_is_applied_and_what_befalls_it_is_answered(kubeconfig: Path) -> None:
    """The whole way: kopf, cache, queue, decision, requests, and back."""

    async def story() -> None:
        async with watching(kubeconfig) as it:
            world = it.world
            world.now = datetime.now(UTC)
            working = asyncio.create_task(it.controller.run())
            world.change(workers={"min": 1, "max": 3})
            await it.until(lambda: "key-worker-2-1" in world.pods)
            world.start()
            world.end("key-worker-1-1", 1)
            await it.until(lambda: "key-worker-1-2" in world.pods)
            assert world.status.restarts.counted == 1
            world.change(suspend=True)
            await it.until(lambda: not world.live())
            world.vanish()
            await it.until(lambda: not world.coordinators())
            world.deleted = True
            it.server.collect()
            await it.until(lambda: not it.cache.runs)
            working.cancel()

    asyncio.run(story())
