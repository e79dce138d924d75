"""The queue of runs to look at, and what is done when it is a run's turn."""

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from demoreset_api.names import (
    API_VERSION,
    KIND,
    LABEL_MANAGED_BY,
    LABEL_RUN,
    LABEL_RUN_UID,
    MANAGER,
    OPERATOR_NAME,
)
from demoreset_api.status import MAX_MESSAGE, RunStatus
from demoreset_operator import story
from demoreset_operator.api import CONNECTIONS, Api, ApiError
from demoreset_operator.cache import Cache
from demoreset_operator.decide import Event, Plan, decide
from demoreset_operator.metrics import Metrics
from demoreset_operator.observation import Json, Observation, Run, not_understood, parse_run
from demoreset_operator.reasons import Reason
from demoreset_operator.render import Settings, claim_name

AT_ONCE = 32  # runs that are worked on
OTHERS_SECONDS = 0.5  # that who has made its lost pods waits at most for others to have theirs
PROGRESS_SECONDS = 5.0  # between two status writes that are not urgent
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # after a failure
LONGEST_REFUSED_WAIT = 5.0  # after a refusal: what was in the way may be gone
REFUSED_CODES = (400, 403, 422, 500)  # what a person may have to mend; 500: a webhook is down
# Of a refusal to make a pod while another is there: it may be taken in its place.
SAYS_NOTHING = ("exceeded quota", "does not support dry run")

UNCLEAR = "run %s: not understood: %s"

log = logging.getLogger(__name__)


class Taken(ApiError):
    """An object of the wanted name is there, and not ours."""


@dataclass(frozen=True)
class Refusal:
    """What the API server would not take, until when it is not asked again, and how often."""

    message: str
    until: float
    generation: int
    times: int


@dataclass
class Memory:
    """What is kept of a run between two looks at it.

    met: when it was first heard of. failures: of looks, in a row. retry: when the next look is due
    after them. written: when progress was last put into its status. refusal: of what was to be
    made. unfit: of a pod as the run says now, while others train. puzzled: what of it was not
    understood, and was said.
    """

    met: float = field(default_factory=lambda: time.monotonic())  # looked up late, for tests
    failures: int = 0
    retry: float = 0.0
    written: float = 0.0
    refusal: Refusal | None = None
    unfit: Refusal | None = None
    puzzled: str = ""


class Queue:
    """Keys and when they are due; a key is there once, at its earliest time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due; those that have an appointment later do not wait."""
        now = self._clock()
        return sum(due <= now for due in self._due.values())

    def add(self, key: str, after: float = 0.0) -> None:
        """Look at a key so many seconds from now, or sooner."""
        due = self._clock() + after
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._count), key))
        if len(self._heap) > 2 * len(self._due) + 64:  # most of it was replaced by sooner times
            self._heap = [(due, next(self._count), key) for key, due in self._due.items()]
            heapq.heapify(self._heap)
        self._changed.set()

    async def get(self) -> str:
        """The next key, when it is due."""
        while True:
            now = self._clock()
            while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
                heapq.heappop(self._heap)  # it is due sooner, or was taken
            if self._heap and self._heap[0][0] <= now:
                _, _, key = heapq.heappop(self._heap)
                del self._due[key]
                return key
            self._changed.clear()
            wait = self._heap[0][0] - now if self._heap else None
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue


class Controller:
    """Looks at runs whose turn it is, one at a time for each run, and does what was decided."""

    def __init__(self, api: Api, cache: Cache, settings: Settings, metrics: Metrics) -> None:
        self._api, self.cache, self._settings, self._metrics = api, cache, settings, metrics
        self.queue = Queue()
        self._busy: set[str] = set()
        self._again: set[str] = set()  # that changed while they were worked on
        self._memories: dict[str, Memory] = defaultdict(Memory)
        self._requests = asyncio.Semaphore(CONNECTIONS)  # more would only wait
        self._making = 0  # runs whose lost pods are being made
        self._made = asyncio.Event()  # none are

    def wake(self, uid: str | None) -> None:
        """Something has changed: look at a run; after a failure not before its time."""
        if uid in self._busy:
            self._again.add(uid)
        elif uid is not None:
            self.queue.add(uid, max(0.0, self._memories[uid].retry - time.monotonic()))

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            uid = await self.queue.get()
            self._busy.add(uid)
            begun = time.monotonic()
            try:
                await self.reconcile(uid)
            except Exception as error:
                self._failed(uid, error)
            else:
                if uid in self._memories:  # else it is gone
                    self._memories[uid].failures, self._memories[uid].retry = 0, 0.0
                self._metrics.reconciled("done", time.monotonic() - begun)
            finally:
                self._busy.discard(uid)
                if uid in self._again:
                    self._again.discard(uid)
                    self.wake(uid)

    def _failed(self, uid: str, error: Exception) -> None:
        """Try again later."""
        memory = self._memories[uid]
        memory.failures += 1
        wait = _back_off(memory.failures, LONGEST_WAIT)
        memory.retry = time.monotonic() + wait
        self.queue.add(uid, wait)
        conflict = isinstance(error, ApiError) and error.code in (404, 409)
        self._metrics.reconciled("again" if conflict else "error", 0.0)
        log.log(
            logging.INFO if conflict else logging.WARNING,
            "run %s: trying again in %.0f s: %s",
            self._name(uid),
            wait,
            error,
            exc_info=None if isinstance(error, ApiError) else error,
        )

    def _name(self, uid: str) -> str:
        body = self.cache.runs.get(uid)
        return f"{body['metadata']['namespace']}/{body['metadata']['name']}" if body else uid

    async def reconcile(self, uid: str) -> None:
        """Look at a run, decide, and do it."""
        body = self.cache.runs.get(uid)
        if body is None:
            self._metrics.forget(uid)
            self._memories.pop(uid, None)
            return
        try:
            run = parse_run(body)
        except ValidationError as error:  # another version's run: the schema keeps all else out
            await self._not_understood(body, not_understood(error))
            return
        if not run.ours:
            self._metrics.forget(uid)  # what becomes of it is another's to tell
            return
        seen, now = self._observe(run), datetime.now(UTC)
        plan = decide(seen, self._settings, now)
        if await self._unfit(run, plan.trial):
            seen = replace(self._observe(run), unfit=True)
            plan = decide(seen, self._settings, now)
        if plan.pods_first:
            seen = await self._make_first(seen, plan)
            plan = decide(seen, self._settings, now)
        told = plan.status or run.status
        lost = story.claim_gone(told) and not story.over(run.status)
        if lost and await self._claim_of_another(run):
            seen = replace(seen, claimed=True)
            plan = decide(seen, self._settings, now)
        self._metrics.run(uid, run.namespace, run.name, plan.status or run.status)
        meta, late = await self._write_status(run, plan, body["metadata"])
        self._metrics.lost(plan.losses)
        held = await self._carry_out(seen, plan, meta["resourceVersion"])
        tried = _held_back(run, self._memories[uid].unfit) if seen.unfit else None
        waits = [wait for wait in (late, held, tried) if wait is not None]
        if plan.again is not None:
            waits.append(max(0.0, (plan.again - now) / timedelta(seconds=1)) + 0.01)
        if waits:
            self.queue.add(uid, min(waits))

    async def _unfit(self, run: Run, pod: Json | None) -> bool:
        """Whether the API server would refuse a pod as the run says now: no worker goes for that.

        It is asked from time to time, for what was in the way may be gone.
        """
        memory = self._memories[run.uid]
        if pod is None:
            memory.unfit = None
        elif _held_back(run, memory.unfit) <= 0:
            try:
                await self._api.create(pod, dry_run=True)
                memory.unfit = None
            except ApiError as error:
                nothing = any(words in str(error) for words in SAYS_NOTHING)
                memory.unfit = None if nothing else self._refusal(run, error, memory.unfit)
        return memory.unfit is not None

    async def _make_first(self, seen: Observation, plan: Plan) -> Observation:
        """Make pods before the status, so that one status tells of both, who was lost and who came.

        Where many runs have lost some, as with a node, their pods come before their statuses.

        Returns:
            The run as it was seen, so that the loss is judged the same again, with those pods.
        """
        self._making += 1
        self._made.clear()
        try:
            with suppress(ApiError):  # the next plan has what could not be made
                await self._make(seen.run, plan, {})
        finally:
            self._making -= 1
            if not self._making:
                self._made.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._made.wait(), OTHERS_SECONDS)
        before = {pod.name for pod in seen.pods}
        after = self._observe(seen.run)
        made = [pod for pod in after.pods if pod.name not in before]
        return replace(seen, pods=(*seen.pods, *made), refused=after.refused)

    def _observe(self, run: Run) -> Observation:
        memory = self._memories[run.uid]
        refusal = memory.refusal or memory.unfit
        return self.cache.observe(run, refusal.message if refusal is not None else "")

    async def _claim_of_another(self, run: Run) -> bool:
        """Whether a claim of the right name is there, which no watch shows: it has not our labels.

        Somebody has put it there, as from a snapshot of the one that is gone.
        """
        where = "PersistentVolumeClaim", run.namespace, claim_name(run)
        return await self._api.get(*where) is not None

    async def _not_understood(self, body: Json, what: str) -> None:
        """Say that a run is left as it is; all else that a later version has written is kept."""
        meta = body["metadata"]
        manager = (body.get("spec") or {}).get("managedBy")
        if manager not in (None, MANAGER) or "deletionTimestamp" in meta:
            self._metrics.forget(meta["uid"])
            return
        now, raw = datetime.now(UTC), body.get("status") or {}
        whose = meta["uid"], meta["namespace"], meta["name"]
        trains = self.cache.trains(meta["uid"], now)
        try:
            status = RunStatus.model_validate(raw)
        except ValidationError:  # then no condition of ours may be put beside those
            self._metrics.run(*whose, story.outline(raw, trains=trains))
            await self._say_once(body, what)
            return
        generation = meta.get("generation", 0)
        after = story.not_understood(status, what, now, generation, trains=trains)
        self._metrics.run(*whose, after)
        if after != status:
            log.warning(UNCLEAR, self._name(meta["uid"]), what)
            own = {"phase", "conditions", "observed_generation"}
            content = after.model_dump(mode="json", by_alias=True, include=own)
            await self._put_status(meta, {**raw, **content})

    async def _say_once(self, body: Json, what: str) -> None:
        """An event that a run is left as it is, as long as this operator lives."""
        meta = body["metadata"]
        memory = self._memories[meta["uid"]]
        if memory.puzzled == what:
            return
        log.warning(UNCLEAR, self._name(meta["uid"]), what)
        known = {key: meta[key] for key in ("name", "namespace", "uid")}
        reference = {"apiVersion": API_VERSION, "kind": KIND, **known}
        event = Event("Warning", Reason.NOT_UNDERSTOOD, story.unknown(what))
        await self._api.create(_event(reference, event))
        memory.puzzled = what

    async def _write_status(self, run: Run, plan: Plan, meta: Json) -> tuple[Json, float | None]:
        """Write the status; the run's metadata then, and where that may wait, for how long.

        Args:
            run: The run.
            plan: What was decided for it.
            meta: Its metadata when that was decided: the cache may have heard more since.
        """
        if plan.status is None:
            return meta, None
        memory = self._memories[run.uid]
        if not story.urgent(run.status, plan.status, others=len(self.queue) > 0):
            left = (memory.written or memory.met) + PROGRESS_SECONDS - time.monotonic()
            if left > 0:
                return meta, left
        memory.written = time.monotonic()
        content = plan.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        return await self._put_status(meta, content), None

    async def _put_status(self, meta: Json, status: Json) -> Json:
        # Refused where another run has the name by now, or another operator was faster.
        known = ("name", "namespace", "uid", "resourceVersion")
        answer = await self._api.apply_status(
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {key: meta[key] for key in known},
                "status": status,
            }
        )
        self.wake(self.cache.put_run(answer))
        now: Json = answer["metadata"]
        return now

    async def _carry_out(self, seen: Observation, plan: Plan, version: str) -> float | None:
        """Do what was decided; where making something is held back, for how many seconds.

        Args:
            seen: The run and what belongs to it.
            plan: What was decided.
            version: The run's resourceVersion that this was decided for.
        """
        run = seen.run
        known = {(child.kind, child.name): child.uid for child in seen.children}
        known |= {("Pod", pod.name): pod.uid for pod in seen.pods}
        ended = {pod.name for pod in seen.pods if pod.ended}
        # What has ended is tidied up last: where that is refused, its successor is there.
        leave = [("Pod", name) for name in plan.delete_pods if name not in ended]
        tidy = [("Pod", name) for name in plan.delete_pods if name in ended]
        try:
            held = await self._replace(run, plan, leave, known)
        except ApiError:
            await self._tell(run, plan.events)  # the next plan has them no more
            raise
        await self._tell(run, plan.events)
        await self._all(
            [self._delete(run, *key, known.get(key, "")) for key in (*tidy, *plan.delete_children)]
        )
        if plan.delete_run:
            # Not one whose user has just given it longer: its volume may go with it.
            await self._api.delete(KIND, run.namespace, run.name, run.uid, version)
        return held

    async def _replace(
        self, run: Run, plan: Plan, leave: list[tuple[str, str]], known: dict[tuple[str, str], str]
    ) -> float | None:
        """Take away what lives and is to leave, then make what is to be there."""
        try:
            await self._all([self._delete(run, *key, known.get(key, "")) for key in leave])
        except ApiError as error:
            return self._refused(run, error)
        return await self._make(run, plan, known)

    async def _make(
        self, run: Run, plan: Plan, known: Mapping[tuple[str, str], str]
    ) -> float | None:
        """Make what is to be there; after a refusal not at once again, while all else goes on."""
        refusal = self._memories[run.uid].refusal
        left = _held_back(run, refusal)
        if (plan.apply_children or plan.create_pods) and left > 0:
            return left
        try:
            for body in plan.apply_children:
                if (body["kind"], body["metadata"]["name"]) in known:
                    self._put(await self._api.apply(body), body["kind"])
                else:
                    await self._create(run, body)
            create = plan.create_pods
            if refusal is not None and create:  # one that is taken first, and then the others
                first = refusal.times % len(create)  # not always the one that was refused
                await self._create(run, create[first])
                create = create[:first] + create[first + 1 :]
            await self._all([self._create(run, body) for body in create])
        except ApiError as error:
            return self._refused(run, error)
        self._memories[run.uid].refusal = None
        return None if refusal is None else 0.0  # to say so

    def _refused(self, run: Run, error: ApiError) -> float:
        """Seconds until what the API server would not take is tried again; at first to say so.

        Raises:
            ApiError: it is no refusal.
        """
        if not (isinstance(error, Taken) or error.code in REFUSED_CODES):
            raise error
        memory = self._memories[run.uid]
        before, memory.refusal = memory.refusal, self._refusal(run, error, memory.refusal)
        return _held_back(run, memory.refusal) if before is not None else 0.0

    def _refusal(self, run: Run, error: ApiError, before: Refusal | None) -> Refusal:
        times = before.times + 1 if before is not None else 1
        until = time.monotonic() + _back_off(times, LONGEST_REFUSED_WAIT)
        log.info("run %s: refused: %s", self._name(run.uid), error)
        return Refusal(str(error)[:MAX_MESSAGE], until, run.generation, times)  # no status has more

    async def _tell(self, run: Run, events: list[Event]) -> None:
        async def one(event: Event) -> None:
            try:
                await self._api.create(_event(run.reference, event))
            except ApiError as error:  # all that it tells is in the status, too
                log.warning("run %s: an event is lost: %s", self._name(run.uid), error)

        await self._all([one(event) for event in events])

    async def _all(self, requests: list[Any]) -> None:
        """Make requests side by side; all of them, also where one fails."""

        async def one(request: Any) -> None:
            async with self._requests:
                await request

        results = await asyncio.gather(*map(one, requests), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                raise error

    async def _create(self, run: Run, body: Json) -> None:
        """Make an object; what is there already must be this run's, or become it."""
        answer = await self._api.create(body)
        if answer is None:
            answer = await self._adopt(run, body)
        self._put(answer, body["kind"])

    async def _adopt(self, run: Run, body: Json) -> Json:
        kind, meta = body["kind"], body["metadata"]
        where = kind, meta["namespace"], meta["name"]
        found = await self._api.get(*where)
        if found is None:
            raise ApiError(409, f"{kind} {meta['name']} was there and is gone; trying again")
        labels = found["metadata"].get("labels") or {}
        if labels.get(LABEL_MANAGED_BY) != OPERATOR_NAME or labels.get(LABEL_RUN) != run.name:
            then = "rename the run, or it"
            if kind == "PersistentVolumeClaim":
                own = f"{LABEL_MANAGED_BY}={OPERATOR_NAME} {LABEL_RUN}={run.name}"
                then = f"`kubectl label pvc {meta['name']} {own}` gives it to the run"
            raise Taken(409, f"{kind} {meta['name']} exists and is not this run's: {then}")
        if labels.get(LABEL_RUN_UID) == run.uid:
            return found
        goes = "deletionTimestamp" in found["metadata"] or found["metadata"].get("ownerReferences")
        if kind != "PersistentVolumeClaim" or goes:
            raise Taken(409, f"{kind} {meta['name']} of an earlier run is still there")
        # A volume that was retained: what it asks for cannot be changed, and what is on it is kept.
        # So it does not become the run's own, to be deleted with it: it was there before.
        change = {"metadata": {key: meta[key] for key in ("labels", "annotations") if key in meta}}
        return await self._api.patch(*where, change)

    def _put(self, answer: Json, kind: str) -> None:
        """What was made, or deleted, is known at once, before the watch tells of it."""
        self.wake(self.cache.put({**answer, "kind": kind}))

    async def _delete(self, run: Run, kind: str, name: str, uid: str) -> None:
        if kind == "Pod":
            self.cache.deleted(run.uid, name)
        answer = await self._api.delete(kind, run.namespace, name, uid)
        if answer is not None:
            self._put(answer, kind)


def _back_off(failures: int, longest: float) -> float:
    wait = min(FIRST_WAIT * 2.0 ** min(failures - 1, 10), longest)
    return wait * random.uniform(0.8, 1.2)


def _held_back(run: Run, refusal: Refusal | None) -> float:
    """For how many seconds what the run says is not tried again, after it was refused."""
    if refusal is None or refusal.generation != run.generation:
        return 0.0
    return max(0.0, refusal.until - time.monotonic())


def _event(about: Json, event: Event) -> Json:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = f"{about['name']}.{time.time_ns():x}{random.randrange(4096):03x}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": about["namespace"]},
        "involvedObject": about,
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],  # as long as the API server takes
        "source": {"component": OPERATOR_NAME},
        "reportingComponent": OPERATOR_NAME,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
