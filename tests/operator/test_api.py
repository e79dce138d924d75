"""Requests to the API server: repeated where it was busy or away, and errors that say why."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from demoreset_operator import api as apis
from demoreset_operator.api import Api, ApiError

POD = {"kind": "Pod", "metadata": {"name": "p", "namespace": "ns"}}
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def served(answers: list[Any], use: Callable[[Api], Awaitable[Any]]) -> tuple[Any, list[str]]:
    """What a use of the Api brings, with a server that answers so, one after the other."""
    asked: list[str] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path_qs}")
        answer = answers.pop(0)
        if answer == "hang up":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        code, body, *headers = answer
        return web.json_response(body, status=code, headers=headers[0] if headers else None)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    counted: list[tuple[str, int]] = []
    api = Api(lambda verb, code: counted.append((verb, code)))
    api._client = client.ApiClient(
        client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    )
    try:
        return await use(api), asked
    finally:
        await api.close()
        await runner.cleanup()
        assert len(counted) == len(asked)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apis, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(apis, "LONGEST_WAIT", 0.01)


@pytest.mark.parametrize(
    "trouble",
    ["hang up", (429, {}, {"Retry-After": "1"}), (500, {"message": "etcd"}), (503, {})],
)
def test_a_server_that_is_busy_or_hangs_up_is_asked_again(trouble: Any) -> None:
    found, asked = asyncio.run(served([trouble, trouble, (200, POD)], lambda api: api.create(POD)))
    assert found == POD
    assert asked == ["POST /api/v1/namespaces/ns/pods?fieldValidation=Strict"] * 3


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "3"}, [3.0, 3.0]),
        ({"Retry-After": "3600"}, [5.0, 5.0]),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [0.2, 0.4]),
        ({}, [0.2, 0.4]),
    ],
)
def test_a_server_says_how_long_to_wait_and_is_believed_within_limits(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], waited: list[float]
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(apis, "FIRST_WAIT", 0.2)
    monkeypatch.setattr(apis, "LONGEST_WAIT", 5.0)
    monkeypatch.setattr(apis, "asyncio", SimpleNamespace(sleep=sleep))
    busy: Any = (429, {}, headers)
    asyncio.run(served([busy, busy, (200, POD)], lambda api: api.create(POD)))
    assert slept == pytest.approx(waited, rel=0.21), "a fifth is by chance"


def test_a_server_that_stays_away_is_an_error_of_ours() -> None:
    with pytest.raises(ApiError, match="not reached"):
        asyncio.run(served(["hang up"] * apis.TRIES, lambda api: api.create(POD)))


def test_a_refusal_is_not_repeated_and_says_why() -> None:
    with pytest.raises(ApiError, match="403: exceeded quota") as error:
        asyncio.run(served([(403, {"message": "exceeded quota"})], lambda api: api.create(POD)))
    assert error.value.code == 403


def test_what_is_there_already_is_no_error() -> None:
    conflict = (409, {"message": 'pods "p" already exists'})
    assert asyncio.run(served([conflict], lambda api: api.create(POD)))[0] is None


def test_what_is_gone_is_deleted() -> None:
    for code in (404, 409):
        asyncio.run(served([(code, {})], lambda api: api.delete("Pod", "ns", "p", "uid")))


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((), None),
        (("u-1",), {"uid": "u-1"}),
        (("u-1", "7"), {"uid": "u-1", "resourceVersion": "7"}),
    ],
)
def test_what_is_deleted_is_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], asked: Any
) -> None:
    bodies: list[Any] = []

    async def request(_: Any, _method: str, _path: str, body: Any) -> Any:
        bodies.append(body)
        return {}

    monkeypatch.setattr(Api, "_request", request)
    asyncio.run(Api().delete("Pod", "ns", "p", *given))
    assert bodies[0].get("preconditions") == asked


def test_long_lists_come_in_pages() -> None:
    async def everything(api: Api) -> list[str]:
        return [body["metadata"]["name"] async for body in api.list("Pod", "", "a=b")]

    def page(name: str, more: str) -> Any:
        return 200, {"metadata": {"continue": more}, "items": [{"metadata": {"name": name}}]}

    names, asked = asyncio.run(served([page("a", "next"), page("b", "")], everything))
    assert names == ["a", "b"]
    assert asked == [
        "GET /api/v1/pods?limit=100&labelSelector=a%3Db",
        "GET /api/v1/pods?limit=100&labelSelector=a%3Db&continue=next",
    ]
