"""The operator's life: nothing acts when the lease is gone."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from apiport import Port, only_here
from apiserver import Server
from demoreset_api.names import LEASE
from demoreset_operator import lease as leases
from demoreset_operator import main as mains
from demoreset_operator import watch as watches
from demoreset_operator.main import _until, arguments, operate
from demoreset_operator.metrics import Metrics
from demoreset_operator.poll import Poll
from demoreset_operator.serve import serve
from world import Json, World


class Work:
    def __init__(self) -> None:
        self.steps = 0

    async def run(self) -> None:
        while True:
            self.steps += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize("by_signal", [True, False])
def test_nothing_works_on_when_it_is_over(by_signal: bool) -> None:
    async def life() -> tuple[int, int]:
        stop, work = asyncio.Event(), Work()

        async def end() -> None:
            await asyncio.sleep(0.01)
            if by_signal:
                stop.set()
                await asyncio.sleep(60)

        async def act() -> None:
            await _until(stop, work.run())

        await _until(stop, end(), act())
        at_end = work.steps
        await asyncio.sleep(0.02)
        return at_end, work.steps

    at_end, later = asyncio.run(asyncio.wait_for(life(), 10))
    assert later == at_end > 0


def test_an_error_ends_it() -> None:
    async def fail() -> None:
        raise RuntimeError("no luck")

    async def life() -> None:
        await _until(asyncio.Event(), fail(), Work().run())

    with pytest.raises(RuntimeError, match="no luck"):
        asyncio.run(asyncio.wait_for(life(), 10))


class Operator:
    """All of it, against an API server in this process; now: what its watches take for the time."""

    def __init__(self) -> None:
        self.world = World()
        self.server = Server(self.world)
        self.port = Port(self.server)
        self.now = 0.0
        self.time = itertools.count().__next__  # a heartbeat is other than the last one
        self.served: list[web.AppRunner] = []
        self.ending: asyncio.Task[int]

    def monotonic(self) -> float:
        return self.now

    async def serve(
        self, port: int, metrics: Metrics, alive: Callable[[], str | None]
    ) -> web.AppRunner:
        self.served.append(await serve(port, metrics, alive))
        return self.served[-1]

    @property
    def lease(self) -> Json:
        return self.server.others["Lease", "games", LEASE]["spec"]  # type: ignore[no-any-return]

    def give_lease(self, holder: str) -> None:
        """Somebody has the lease; "" is nobody."""
        meta = {"name": LEASE, "namespace": "games", "uid": "lease"}
        spec = {"holderIdentity": holder, "leaseDurationSeconds": 3600}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        self.server.others["Lease", "games", LEASE] = {**body, "metadata": meta}
        self.server.notice()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert not self.ending.done(), "the operator has ended"
            await asyncio.sleep(0.01)

    async def acts(self) -> None:
        """Wait until it does its work, and kopf watches."""
        await self.until(lambda: "key-worker-0-1" in self.world.pods)
        await self.until(lambda: all(self.port.asked["WATCH", one] for one in self.port.known))

    async def beats(self, count: int) -> None:
        before = self.port.asked["PATCH", "ConfigMap"]
        await self.until(lambda: self.port.asked["PATCH", "ConfigMap"] > before + count)

    async def health(self) -> tuple[int, str]:
        """What the kubelet hears."""
        (port,) = (its[1] for its in self.served[0].addresses if len(its) == 2)  # IPv4's
        url = f"http://127.0.0.1:{port}/healthz"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status, (await answer.text()).strip()


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    """One that finds its server, whatever machine this is, and looks often."""
    made = Operator()
    only_here(monkeypatch, tmp_path / "kubeconfig")
    monkeypatch.setenv("POD_NAMESPACE", "games")
    monkeypatch.setenv("POD_NAME", "us")
    monkeypatch.setattr(mains, "serve", made.serve)
    monkeypatch.setattr(watches, "time", made)
    monkeypatch.setattr(watches, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(leases, "RENEW", 0.01)
    monkeypatch.setattr(leases, "RETRY", 0.01)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # else pytest dies of a test that fails
    yield made
    signal.signal(signal.SIGTERM, before)


@asynccontextmanager
async def operating(it: Operator) -> AsyncIterator[None]:
    """It lives; in the end it was told to stop, or has ended, and asked for nothing wrong."""
    await it.port.open(Path(os.environ["KUBECONFIG"]))
    it.ending = asyncio.create_task(operate(arguments(["--trainer-image", "x:1", "--port", "0"])))
    try:
        async with asyncio.timeout(30):
            await it.until(lambda: it.served)
            yield
    finally:
        if not it.ending.done():
            it.ending.cancel()
        await asyncio.gather(it.ending, return_exceptions=True)
        await it.port.close()
    assert it.port.refused == []


def test_who_loses_the_lease_stops_with_an_error_and_leaves_it_to_its_new_holder(
    operator: Operator,
) -> None:
    async def story() -> None:
        async with operating(operator):
            await operator.acts()
            assert operator.lease["holderIdentity"] == "us"
            operator.give_lease("another")
            assert await operator.ending == 1
            assert operator.lease["holderIdentity"] == "another"

    asyncio.run(story())


def test_who_is_told_to_stop_gives_the_lease_back_and_ends_well(operator: Operator) -> None:
    async def story() -> None:
        async with operating(operator):
            await operator.acts()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await operator.ending == 0
            assert operator.lease["holderIdentity"] == ""

    asyncio.run(story())


@pytest.mark.parametrize("name", [None, ""])
def test_two_outside_a_pod_on_one_machine_are_not_the_same(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.delenv("POD_NAME")
    if name is not None:
        monkeypatch.setenv("POD_NAME", name)

    async def story() -> None:
        async with operating(operator):
            await operator.acts()
            assert operator.lease["holderIdentity"].endswith(f"-{os.getpid()}")

    asyncio.run(story())


def test_who_is_told_to_stop_while_it_waits_takes_nothing(operator: Operator) -> None:
    async def story() -> None:
        operator.give_lease("another")
        async with operating(operator):
            await operator.until(lambda: operator.port.asked["GET", "Lease"] > 1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await operator.ending == 0
            assert operator.lease["holderIdentity"] == "another"
            assert not operator.world.pods

    asyncio.run(story())


def test_who_waits_for_the_lease_is_well_and_who_holds_it_must_hear(operator: Operator) -> None:
    async def story() -> None:
        operator.give_lease("another")
        async with operating(operator):
            operator.now += watches.DEAF_SECONDS + 1
            assert await operator.health() == (200, "ok"), "it has no watches that could tell"
            operator.give_lease("")
            await operator.acts()
            await operator.beats(1)
            assert await operator.health() == (200, "ok")
            operator.port.deaf.add("ConfigMap")
            await operator.beats(5)  # what was told before is heard by then
            operator.now += watches.DEAF_SECONDS + 1
            code, words = await operator.health()
            assert (code, words.startswith("no sign of life")) == (503, True)

    asyncio.run(story())


def test_nothing_is_decided_while_workers_are_asked_and_all_that_happens_is_heard(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        answered = asyncio.Event()

        async def begin(_: object) -> None:
            await answered.wait()

        monkeypatch.setattr(Poll, "begin", begin)
        async with operating(operator):
            asked = operator.port.asked
            await operator.until(lambda: all(asked["WATCH", one] for one in operator.port.known))
            assert not operator.world.pods
            answered.set()
            await operator.acts()

    asyncio.run(story())
