"""`demoreset-operator`: watches DemoResetRuns, and keeps their pods as they are to be."""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from demoreset_api.names import LEASE, OPERATOR_PORT
from demoreset_operator.api import Api
from demoreset_operator.cache import Cache
from demoreset_operator.controller import Controller
from demoreset_operator.lease import Lease
from demoreset_operator.metrics import Metrics
from demoreset_operator.poll import Poll
from demoreset_operator.render import Settings
from demoreset_operator.serve import serve
from demoreset_operator.watch import Watch

# What the chart sets; flags of the same meaning win.
ENV_POD_NAME, ENV_POD_NAMESPACE = "POD_NAME", "POD_NAMESPACE"
ENV_NAMESPACES = "DEMORESET_NAMESPACES"  # that are watched, with commas; empty: all
ENV_TRAINER_IMAGE = "DEMORESET_TRAINER_IMAGE"  # of runs that name none
ENV_TRAINER_PULL_POLICY = "DEMORESET_TRAINER_PULL_POLICY"
ENV_LOG_FORMAT = "DEMORESET_LOG_FORMAT"  # json or text
DEPTH_SECONDS = 1.0  # between two measurements of the queue
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 1 << 17  # of malloc.h

log = logging.getLogger("demoreset_operator")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; each has its default in the environment, which the chart sets."""
    environment = os.environ
    parser = argparse.ArgumentParser(prog="demoreset-operator", description=__doc__)
    parser.add_argument(
        "--namespaces",
        default=environment.get(ENV_NAMESPACES, ""),
        help=f"that are watched, with commas; default ${ENV_NAMESPACES}, else all",
    )
    parser.add_argument(
        "--trainer-image",
        default=environment.get(ENV_TRAINER_IMAGE),
        help=f"of runs that name none; default ${ENV_TRAINER_IMAGE}",
    )
    parser.add_argument(
        "--trainer-pull-policy",
        default=environment.get(ENV_TRAINER_PULL_POLICY) or None,
        help=f"default ${ENV_TRAINER_PULL_POLICY}",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=OPERATOR_PORT,
        help=f"of /metrics, /healthz and /readyz; default {OPERATOR_PORT}",
    )
    parser.add_argument(
        "--log", choices=("text", "json"), default=environment.get(ENV_LOG_FORMAT, "text")
    )
    options = parser.parse_args(given)
    if not options.trainer_image:
        parser.error(f"--trainer-image: missing; or set {ENV_TRAINER_IMAGE}")
    options.namespaces = [name for name in options.namespaces.split(",") if name]
    return options


def main() -> None:
    """Run until a signal, or until the lease is lost."""
    options = arguments()
    _log(options.log)
    _return_freed_memory()
    sys.exit(asyncio.run(operate(options)))


def _log(form: str) -> None:
    handler = logging.StreamHandler()
    if form == "json":
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("kopf").setLevel(logging.WARNING)


def _return_freed_memory() -> None:
    """Large blocks, as answers are, return to the system when they are freed.

    By default glibc soon keeps them among the small ones, where the memory is never whole again.
    """
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):  # glibc's
            allocator.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


async def operate(options: argparse.Namespace) -> int:
    """Wait for the lease, then act; the exit code."""
    own = os.environ.get(ENV_POD_NAMESPACE, "default")
    # Outside a pod there may be two on one machine.
    identity = os.environ.get(ENV_POD_NAME) or f"{socket.gethostname()}-{os.getpid()}"
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

    listen()
    metrics, cache = Metrics(), Cache()
    api = Api(metrics.requested)
    await api.connect()
    settings = Settings(options.trainer_image, options.trainer_pull_policy, own)
    controller = Controller(api, cache, settings, metrics)
    watch = Watch(api, cache, controller.wake, options.namespaces, own, listen)
    poll = Poll(cache, controller.wake)
    post = Api(metrics.requested)  # its connection is its own: a renewal waits for nothing
    await post.connect()
    lease = Lease(post, own, LEASE, identity)
    runner = await serve(options.port, metrics, lambda: watch.deaf() if lease.held else None)

    async def look_after() -> None:
        """Nothing is decided before all is known that can be known soon."""
        await poll.begin()
        await _until(stop, controller.run(), poll.run())

    async def act() -> None:
        await watch.fill()
        log.info(
            "watching %s; %d runs",
            ", ".join(watch.namespaces) or "all namespaces",
            len(cache.runs),
        )
        # The watches begin at once: what goes between a list and a watch is not told of.
        await _until(
            stop,
            watch.run(stop),
            watch.refill(),
            watch.beat(),
            look_after(),
            _measure(controller, metrics),
        )

    try:
        await _until(stop, lease.acquire())
        if not lease.held:
            return 0
        metrics.leader.set(1)
        await _until(stop, lease.keep(), act())
        return 0 if stop.is_set() else 1
    finally:
        await lease.release()
        await runner.cleanup()
        await api.close()
        await post.close()


async def _measure(controller: Controller, metrics: Metrics) -> None:
    while True:
        metrics.depth.set(len(controller.queue))
        await asyncio.sleep(DEPTH_SECONDS)


async def _until(stop: asyncio.Event, *works: Coroutine[Any, Any, None]) -> None:
    """Until one of them ends, or we are told to stop; the first error is raised.

    When it returns, or is cancelled, none of them runs any more.
    """
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in works]
    tasks.append(asyncio.create_task(stop.wait()))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


if __name__ == "__main__":
    main()
