"""Asks the workers how it goes: trainers never call the operator, and hold no credentials."""

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime

import aiohttp

from demoreset_api.names import METRICS_PORT
from demoreset_operator.cache import Cache
from demoreset_operator.observation import Pod

EVERY = 5.0  # seconds between two questions to a worker
MOST_PER_SECOND = 50.0  # questions: with more workers each is asked less often
AT_ONCE = 32
PATIENCE = aiohttp.ClientTimeout(total=3)
MOST_BYTES = 1 << 18

log = logging.getLogger(__name__)


class Poll:
    """Asks all workers that run, round after round.

    Args:
        cache: Where they are, and where their answers go.
        changed: Told the run of every answer.
    """

    def __init__(self, cache: Cache, changed: Callable[[str], None]) -> None:
        self._cache, self._changed = cache, changed
        self._free = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Ask until cancelled."""
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            while True:
                asked = [
                    (uid, pod)
                    for uid in list(self._cache.runs)
                    for pod in self._cache.pods(uid)
                    if pod.worker is not None and pod.live and pod.phase == "Running" and pod.ip
                ]
                pause = asyncio.sleep(max(EVERY, len(asked) / MOST_PER_SECOND))
                await asyncio.gather(pause, *(self._ask(session, *one) for one in asked))

    async def _ask(self, session: aiohttp.ClientSession, uid: str, pod: Pod) -> None:
        host = f"[{pod.ip}]" if pod.ip and ":" in pod.ip else pod.ip
        try:
            async with (
                self._free,
                session.get(f"http://{host}:{METRICS_PORT}/status") as response,
            ):
                response.raise_for_status()
                raw = await response.content.read(MOST_BYTES)
            content = _checked(raw)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("pod %s: no status: %s", pod.name, error or type(error).__name__)
        else:
            self._cache.tell(uid, pod.name, datetime.now(UTC), content)
        self._changed(uid)


def _checked(raw: bytes) -> dict[str, object]:
    content = json.loads(raw)
    if not isinstance(content, dict) or "worldSize" not in content:
        raise ValueError("not a worker's status")
    if "update" in content and not all(
        isinstance(content.get(part), dict) for part in ("curriculum", "training", "checkpoint")
    ):
        raise ValueError("not a worker's status")
    return content
