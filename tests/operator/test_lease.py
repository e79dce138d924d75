"""One operator acts: the one that holds the Lease."""

import asyncio
from typing import Any

import pytest

from demoreset_operator import lease as leases
from demoreset_operator.api import ApiError
from demoreset_operator.lease import Lease

Json = dict[str, Any]
RETRY = leases.RETRY  # as it is, before these tests have less of it


class Server:
    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0
        self.away = False

    def _reached(self) -> None:
        if self.away:
            raise ApiError(0, "away")

    def _put(self, body: Json) -> Json:
        self.version += 1
        meta = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**body, "metadata": meta}
        return self.lease

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        self._reached()
        return self.lease and {**self.lease, "spec": dict(self.lease["spec"])}

    async def create(self, body: Json) -> Json | None:
        self._reached()
        return None if self.lease else self._put(body)

    async def replace(self, body: Json) -> Json:
        self._reached()
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified")
        return self._put(body)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW", 0.01)
    monkeypatch.setattr(leases, "RETRY", 0.01)


def test_the_limits_keep_what_the_docs_promise() -> None:
    """A second one acts 20 s after a loss, and in less than 3 s where the Lease is given back."""
    assert leases.SECONDS + RETRY < 18
    assert RETRY + leases.FAREWELL <= 3


def test_the_first_takes_it_and_a_second_waits() -> None:
    server, clock = Server(), Clock()
    first, second = (Lease(server, "ns", "lease", name, clock) for name in "ab")
    asyncio.run(first.acquire())
    assert first.held
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(second.acquire(), 0.1))
    assert not second.held


def test_a_lease_that_does_not_change_is_taken_over_whatever_its_times_say() -> None:
    server, clock = Server(), Clock()
    first, second = (Lease(server, "ns", "lease", name, clock) for name in "ab")
    asyncio.run(first.acquire())
    assert server.lease is not None
    server.lease["spec"]["renewTime"] = "2999-01-01T00:00:00.000000Z"
    assert not asyncio.run(second._try())
    clock.now += leases.SECONDS - 1
    assert not asyncio.run(second._try())
    clock.now += 2
    assert asyncio.run(second._try())
    assert server.lease["spec"]["holderIdentity"] == "b"
    assert server.lease["spec"]["leaseTransitions"] == 1
    assert not asyncio.run(first._try())


def test_a_lease_that_is_renewed_is_never_taken() -> None:
    server, clock = Server(), Clock()
    first, second = (Lease(server, "ns", "lease", name, clock) for name in "ab")
    asyncio.run(first.acquire())
    for _ in range(10):
        clock.now += leases.SECONDS - 1
        assert not asyncio.run(second._try())
        assert asyncio.run(first._try())


def test_one_that_was_given_back_is_taken_at_once() -> None:
    server, clock = Server(), Clock()
    first, second = (Lease(server, "ns", "lease", name, clock) for name in "ab")
    asyncio.run(first.acquire())
    asyncio.run(first.release())
    assert not first.held
    asyncio.run(asyncio.wait_for(second.acquire(), 1))
    assert second.held


def test_a_holder_that_cannot_renew_stops_before_another_may_begin() -> None:
    server, clock = Server(), Clock()
    first = Lease(server, "ns", "lease", "a", clock)
    asyncio.run(first.acquire())
    server.away = True

    async def pass_time() -> None:
        while first.held:
            clock.now += 1
            await asyncio.sleep(0.01)

    async def both() -> None:
        await asyncio.gather(first.keep(), pass_time())

    begun = clock.now
    asyncio.run(asyncio.wait_for(both(), 10))
    assert not first.held
    assert leases.DEADLINE <= clock.now - begun < leases.SECONDS


def test_a_word_that_is_missed_is_no_loss() -> None:
    server, clock = Server(), Clock()
    first, second = (Lease(server, "ns", "lease", name, clock) for name in "ab")
    asyncio.run(first.acquire())
    assert not asyncio.run(second._try())
    clock.now += leases.SECONDS + 1
    asyncio.run(second.acquire())

    async def keep_a_while() -> None:
        keeping = asyncio.create_task(second.keep())
        server.away = True
        await asyncio.sleep(0.05)
        server.away = False
        await asyncio.sleep(0.05)
        assert not keeping.done()
        keeping.cancel()

    asyncio.run(keep_a_while())
    assert second.held


def test_a_holder_whose_lease_was_taken_stops() -> None:
    server, clock = Server(), Clock()
    first = Lease(server, "ns", "lease", "a", clock)
    asyncio.run(first.acquire())
    assert server.lease is not None
    server.lease["spec"]["holderIdentity"] = "b"
    asyncio.run(asyncio.wait_for(first.keep(), 5))
    assert not first.held
