"""Workers are asked how it goes, and whatever answers cannot harm the operator."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import ClientSession, web

from demoreset_api.names import LABEL_RUN_UID
from demoreset_operator import poll as polls
from demoreset_operator.cache import Cache
from demoreset_operator.metrics import Metrics
from demoreset_operator.poll import Poll
from demoreset_operator.serve import serve
from demoreset_operator.worker_status import Answer
from world import World, worker_status


async def asked(
    answer: Any, monkeypatch: pytest.MonkeyPatch, status: int = 200
) -> tuple[Cache, list[str]]:
    """A worker that answers so, asked once."""

    async def respond(_request: web.Request) -> web.Response:
        if isinstance(answer, bytes):
            return web.Response(body=answer, status=status)
        return web.json_response(answer, status=status)

    app = web.Application()
    app.add_routes([web.get("/status", respond)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    (address,) = runner.addresses
    monkeypatch.setattr(polls, "METRICS_PORT", address[1])
    world = World()
    world.settle()
    world.start()
    cache, changed = Cache(), list[str]()
    cache.put_run(world.run_body)
    for body in world.pods.values():
        body["status"]["podIP"] = "127.0.0.1"
        cache.put(body)
    task = asyncio.create_task(Poll(cache, changed.append).run())
    while not changed:
        await asyncio.sleep(0.01)
    task.cancel()
    await runner.cleanup()
    return cache, changed


def answers(cache: Cache) -> dict[str, Answer]:
    """What is known of the run's workers."""
    return cache.observe(World().run).answers


def test_an_answer_is_kept_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, changed = asyncio.run(asked(worker_status(7, 1), monkeypatch))
    assert changed == ["u-1"]
    kept = answers(cache)["key-worker-0-1"]
    assert kept.status.update == 7
    assert (datetime.now(UTC) - kept.at).total_seconds() < 60


def test_all_are_asked_once_a_round_and_not_all_at_the_same_time() -> None:
    world, cache = World(), Cache()
    world.settle()
    world.start()
    cache.put_run(world.run_body)
    (body,) = (one for name, one in world.pods.items() if "worker" in name)
    for number in range(100):
        meta = body["metadata"] | {"name": f"pod-{number}", "uid": f"pod-{number}"}
        cache.put({**body, "metadata": meta, "status": body["status"] | {"podIP": "10.0.0.1"}})
    heard: list[str] = []
    busy: set[str] = set()
    most = 0

    class Asks(Poll):
        async def _ask(self, _session: Any, _uid: str, pod: Any, _holds: Any) -> None:
            nonlocal most
            busy.add(pod.name)
            most = max(most, len(busy))
            await asyncio.sleep(0)
            busy.remove(pod.name)
            heard.append(pod.name)

    assert asyncio.run(Asks(cache, lambda uid: None).round()) == 100
    assert sorted(heard) == sorted(f"pod-{number}" for number in range(100))
    assert most == polls.AT_ONCE


def test_runs_are_asked_in_turn_and_each_is_looked_at_when_its_workers_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(polls, "RUNS_TOGETHER", 1)
    monkeypatch.setattr(polls, "MIN_ROUND_SECONDS", 1.0)
    world, cache = World(workers={"max": 2}), Cache()
    world.settle()
    world.start()
    for number in range(5):
        run = f"u-{number}"
        cache.put_run({**world.run_body, "metadata": world.run_body["metadata"] | {"uid": run}})
        for name, body in world.pods.items():
            meta = body["metadata"] | {"uid": f"{run}-{name}", "ownerReferences": [{"uid": run}]}
            meta["labels"] = meta["labels"] | {LABEL_RUN_UID: run}
            cache.put({**body, "metadata": meta, "status": body["status"] | {"podIP": "10.0.0.1"}})
    order: list[str] = []

    class Asks(Poll):
        async def _ask(self, _session: Any, uid: str, pod: Any, _holds: Any) -> None:
            await asyncio.sleep(0.01 * pod.worker)
            order.append(uid)

    asyncio.run(Asks(cache, lambda uid: order.append(f"{uid} changed")).round(spread=True))
    assert order == [
        word for number in range(5) for word in [f"u-{number}"] * 2 + [f"u-{number} changed"]
    ]


def test_who_does_not_answer_does_not_keep_the_operator_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, cache = World(workers={"max": 3}), Cache()
    world.settle()
    world.start()
    cache.put_run(world.run_body)
    for body in world.pods.values():
        cache.put(body)
    heard: list[str] = []

    class Asks(Poll):
        async def _ask(self, _session: Any, _uid: str, pod: Any, _holds: Any) -> None:
            if pod.worker == 0:
                await asyncio.sleep(3600)
            heard.append(pod.name)

    monkeypatch.setattr(polls, "FIRST_ROUND_SECONDS", 0.05)
    asyncio.run(asyncio.wait_for(Asks(cache, lambda uid: None).begin(), 10))
    assert heard == ["key-worker-1-1", "key-worker-2-1"]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"[" * 100_000, 200),
        (b" " * 300_000, 200),
        (b"\xff\xfe not JSON", 200),
        ([1, 2], 200),
        ({"hello": "world"}, 200),
        ({"worldSize": 1, "update": 3}, 200),
        ({"worldSize": 1}, 500),
    ],
)
def test_what_is_no_status_is_passed_over_and_the_run_looked_at(
    answer: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, changed = asyncio.run(asked(answer, monkeypatch, status))
    assert changed == ["u-1"]
    assert not answers(cache)


def test_the_operators_port_tells_metrics_and_health() -> None:
    sick: list[str] = []

    async def ask() -> list[tuple[int, str]]:
        metrics = Metrics()
        runner = await serve(0, metrics, lambda: next(iter(sick), None))
        port = next(address[1] for address in runner.addresses if address[0] == "0.0.0.0")
        found = []
        async with ClientSession(f"http://127.0.0.1:{port}") as session:
            for path in ("/healthz", "/readyz", "/metrics"):
                async with session.get(path) as response:
                    found.append((response.status, await response.text()))
            sick.append("deaf")
            async with session.get("/healthz") as response:
                found.append((response.status, await response.text()))
        await runner.cleanup()
        return found

    well, ready, metrics, ill = asyncio.run(ask())
    assert well == ready == (200, "ok\n")
    assert "demoreset_operator_queue_depth 0.0" in metrics[1]
    assert ill == (503, "deaf\n")
