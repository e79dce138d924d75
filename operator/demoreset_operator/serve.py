"""The operator's port: /metrics, /healthz for the kubelet, /readyz."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from demoreset_operator.metrics import Metrics


async def serve(
    port: int, metrics: Metrics, alive: Callable[[], str | None], ready: Callable[[], str | None]
) -> web.AppRunner:
    """Serve until the returned runner is cleaned up.

    Args:
        port: Of all addresses.
        metrics: What /metrics shows.
        alive: Why the operator is to be restarted; None where it is well.
        ready: Why it is not ready; None where it is.
    """

    async def show(_request: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def probe(why: Callable[[], str | None]) -> Callable[[web.Request], object]:
        async def answer(_request: web.Request) -> web.Response:
            said = why()
            return web.Response(text=f"{said or 'ok'}\n", status=503 if said else 200)

        return answer

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", show),
            web.get("/healthz", probe(alive)),  # type: ignore[arg-type]
            web.get("/readyz", probe(ready)),  # type: ignore[arg-type]
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, None, port).start()
    return runner
