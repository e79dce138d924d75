"""Which of several operators acts: the one that holds the Lease.

Times are compared by this machine's own monotonic clock alone: a Lease that has not changed for its
whole duration is taken over, whatever the clock of its holder says (as client-go does it).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from demoreset_operator.api import ApiError
from demoreset_operator.observation import Json

SECONDS = 15  # without a renewal, until another one may take it
RENEW = 3.0  # between two renewals
TRY = 5.0  # that one may take: an operator that has much to do is slow, too
DEADLINE = 10.0  # without one that succeeded, until the holder stops by itself
RETRY = 1.0  # between two looks of those who wait
FAREWELL = 2.0  # for giving it back

log = logging.getLogger(__name__)


class Leases(Protocol):
    """What is needed of the API server."""

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The Lease, if there is one."""

    async def create(self, body: Json) -> Json | None:
        """Make it; None where another one was faster."""

    async def replace(self, body: Json) -> Json:
        """Change it; an ApiError of 409 where another one was faster."""


class Lease:
    """A Lease, and whether we hold it.

    Args:
        api: The API server.
        namespace: Of the Lease.
        name: Of the Lease.
        identity: Ours, as no other's.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        api: Leases,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._namespace, self._name, self._me = api, namespace, name, identity
        self._clock = clock
        self._seen: tuple[Any, float] | None = None  # what it was like, and since when
        self._renewed = 0.0
        self.held = False

    async def acquire(self) -> None:
        """Wait until we hold it."""
        while True:
            begun = self._clock()
            if await self._try():
                break
            await asyncio.sleep(RETRY)
        self.held, self._renewed = True, begun
        log.info("%s holds the lease", self._me)

    async def keep(self) -> None:
        """Renew it; returns when it is lost, before another one may take it."""
        while (left := self._renewed + DEADLINE - self._clock()) > 0:
            begun = self._clock()
            try:
                async with asyncio.timeout(min(left, TRY)):
                    ours = await self._try()
            except TimeoutError:
                ours = None
            if ours is False:
                break
            if ours:
                self._renewed = begun
            await asyncio.sleep(RENEW if ours else RETRY)
        self.held = False
        log.error("%s has lost the lease", self._me)

    async def release(self) -> None:
        """Give it back, so that another one need not wait."""
        if not self.held:
            return
        self.held = False
        try:
            async with asyncio.timeout(FAREWELL):
                lease = await self._api.get("Lease", self._namespace, self._name)
                if lease is not None and lease["spec"].get("holderIdentity") == self._me:
                    lease["spec"]["holderIdentity"] = ""
                    await self._api.replace(lease)
        except (ApiError, TimeoutError) as error:
            log.warning("the lease is not given back: %r", error)

    async def _try(self) -> bool | None:
        """Take or renew it; whether it is ours now, None where the server did not say."""
        try:
            lease = await self._api.get("Lease", self._namespace, self._name)
            if lease is None:
                return await self._api.create(self._made({}, transitions=0)) is not None
            spec = lease.get("spec") or {}
            holder = spec.get("holderIdentity")
            if holder and holder != self._me and not self._expired(lease):
                return False
            transitions = int(spec.get("leaseTransitions") or 0) + (holder != self._me)
            taken = self._made(spec if holder == self._me else {}, transitions)
            await self._api.replace({**taken, "metadata": lease["metadata"]})
        except ApiError as error:
            log.warning("the lease: %s", error)
            return None
        return True

    def _expired(self, lease: Json) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = version, self._clock()
        seconds = (lease.get("spec") or {}).get("leaseDurationSeconds") or SECONDS
        return self._clock() - self._seen[1] > seconds

    def _made(self, spec: Json, transitions: int) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._me,
                "leaseDurationSeconds": SECONDS,
                "acquireTime": spec.get("acquireTime", now),
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }
