"""Asks the workers how it goes: trainers never call the operator, and hold no credentials."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import aiohttp

from demoreset_api.names import METRICS_PORT
from demoreset_operator.cache import Cache
from demoreset_operator.observation import Pod
from demoreset_operator.worker_status import read

MIN_ROUND_SECONDS = 5.0  # between two questions to a worker
MAX_PER_SECOND = 25.0  # questions; with more workers each is asked less often
AT_ONCE = 32  # questions
RUNS_TOGETHER = 10  # that are asked at the same moment: one by one they cost twice the CPU
TIMEOUT = aiohttp.ClientTimeout(total=3)
FIRST_ROUND_SECONDS = 5.0  # who has not answered by then is not known yet
MAX_BYTES = 1 << 18  # of an answer

log = logging.getLogger(__name__)


class Poll:
    """Asks all workers that run, round after round.

    Args:
        cache: Where they are, and where their answers go.
        changed: Told the run of every answer.
    """

    def __init__(self, cache: Cache, changed: Callable[[str], None]) -> None:
        self._cache, self._changed = cache, changed

    async def begin(self) -> None:
        """Ask all of them, and do not wait for those that do not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ROUND_SECONDS):
                await self.round()

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            begun = time.monotonic()
            count = await self.round(spread=True)
            await asyncio.sleep(max(0.0, begun + _seconds(count) - time.monotonic()))

    def _asked(self, uid: str) -> list[Pod]:
        """A run's pods that can answer."""
        return [
            pod
            for pod in self._cache.pods(uid)
            if pod.worker is not None and pod.live and pod.phase == "Running" and pod.ip
        ]

    async def round(self, *, spread: bool = False) -> int:
        """Ask all of them once; how many there were.

        Args:
            spread: Ask some runs at a time, over the whole round: what all have to tell at the same
                moment would keep one waiting that has lost a pod.
        """
        runs = {uid: pods for uid in list(self._cache.runs) if (pods := self._asked(uid))}
        count = sum(map(len, runs.values()))
        seconds = _seconds(count)
        # An answer holds for some rounds, also where many do not come.
        holds = timedelta(seconds=3 * seconds + 15)
        apart = seconds / len(runs) if spread and runs else 0.0
        begun = time.monotonic()
        left = (
            (begun + apart * (number - number % RUNS_TOGETHER), uid, pod)
            for number, (uid, pods) in enumerate(runs.items())
            for pod in pods
        )
        unheard = {uid: len(pods) for uid, pods in runs.items()}
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:

            async def ask() -> None:
                for moment, uid, pod in left:  # the same for all who ask
                    if (wait := moment - time.monotonic()) > 0:
                        await asyncio.sleep(wait)
                    if pod in self._cache.pods(uid):  # else its address may be another's by now
                        await self._ask(session, uid, pod, holds)
                    unheard[uid] -= 1
                    if not unheard[uid]:
                        self._changed(uid)

            await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        return count

    async def _ask(
        self, session: aiohttp.ClientSession, uid: str, pod: Pod, holds: timedelta
    ) -> None:
        host = f"[{pod.ip}]" if pod.ip and ":" in pod.ip else pod.ip
        url = f"http://{host}:{METRICS_PORT}/status"
        try:
            async with session.get(url, allow_redirects=False) as response:
                response.raise_for_status()
                status = read(await _body(response))
        except Exception as error:  # whatever a pod answers, the operator goes on
            log.debug("pod %s: no status: %r", pod.name, error)
            self._cache.missed(uid, pod.name)
        else:
            self._cache.answered(uid, pod.name, status, datetime.now(UTC), holds)


def _seconds(count: int) -> float:
    """How long a round of so many questions takes at least."""
    return max(MIN_ROUND_SECONDS, count / MAX_PER_SECOND)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body of an answer, if it is not too long for a status."""
    raw = b""
    async for part in response.content.iter_any():
        raw += part
        if len(raw) > MAX_BYTES:
            raise ValueError("too long for a status")
    return raw
