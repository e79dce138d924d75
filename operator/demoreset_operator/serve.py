"""The operator's port: /metrics, /healthz for the kubelet, /readyz."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from demoreset_operator.metrics import Metrics


async def serve(port: int, metrics: Metrics, alive: Callable[[], str | None]) -> web.AppRunner:
    """Serve until the returned runner is cleaned up.

    Args:
        port: Of all addresses.
        metrics: What /metrics shows.
        alive: Why the operator is to be restarted; None where it is well.
    """

    async def show(_request: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(_request: web.Request) -> web.Response:
        trouble = alive()
        return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)

    async def ready(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # who waits for the lease is as ready as can be

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", show),
            web.get("/healthz", health),
            web.get("/readyz", ready),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, None, port).start()
    return runner
