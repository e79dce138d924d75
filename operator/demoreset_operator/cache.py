"""What the watches have told: runs, and what belongs to them, found by the run's UID."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta

from demoreset_api.names import LABEL_RUN_UID
from demoreset_operator.observation import (
    Child,
    Json,
    Observation,
    Pod,
    Run,
    failing,
    parse_child,
    parse_pod,
    training,
)
from demoreset_operator.worker_status import Answer, WorkerStatus, next_answer

REMEMBERED_SECONDS = 60.0  # for which what is gone cannot come back: an answer may be late

log = logging.getLogger(__name__)


class Cache:
    """Runs by UID; their pods and other objects, parsed, by kind and name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._gone: dict[str, float] = {}  # when, by UID
        self.runs: dict[str, Json] = {}
        self._pods: dict[str, dict[str, Pod]] = defaultdict(dict)
        self._children: dict[str, dict[tuple[str, str], Child]] = defaultdict(dict)
        self._versions: dict[str, int] = {}  # of all objects, by their own UIDs
        self._names: dict[str, tuple[str, str, str]] = {}  # run, kind and name, by the same
        self._answers: dict[str, dict[str, Answer]] = defaultdict(dict)
        self._missed: dict[str, dict[str, int]] = defaultdict(dict)
        self._deleted: dict[str, set[str]] = defaultdict(set)  # pods, by us

    def put_run(self, body: Json, *, gone: bool = False) -> str | None:
        """A run as the API server has it now; its UID, where that is news."""
        uid: str = body["metadata"]["uid"]
        before = self._versions.get(uid)
        if gone:
            self.runs.pop(uid, None)
            for known in (self._answers, self._missed, self._deleted):
                known.pop(uid, None)
            self._bury(uid)
        elif self._newer(body):
            # Who manages which field is more than half of it, and nobody asks.
            meta = {key: its for key, its in body["metadata"].items() if key != "managedFields"}
            self.runs[uid] = {**body, "metadata": meta}
        return uid if self._versions.get(uid) != before or gone else None

    def put(self, body: Json, *, gone: bool = False) -> str | None:
        """An object of a run as the API server has it now; the run's UID, where that is news.

        Often it is none: an answer has told of it already, or what has changed is not kept.
        """
        meta, kind = body["metadata"], body["kind"]
        own: str = meta["uid"]
        if gone:
            return self._drop(own)
        name = meta["name"]
        uid: str | None = (meta.get("labels") or {}).get(LABEL_RUN_UID)
        if uid is None or not self._believed(uid, body):
            return None
        if self._succeeded(uid, body) or not self._newer(body):
            return None
        if own in self._names and self._names[own] != (uid, kind, name):  # another run's by now
            self._drop(own, buried=False)
        before: Pod | Child | None
        now: Pod | Child
        try:
            if kind == "Pod":
                before = self._pods[uid].get(name)
                now = failing(parse_pod(body), before, datetime.now(UTC))
                self._pods[uid][name] = now
            else:
                before, now = self._children[uid].get((kind, name)), parse_child(body)
                self._children[uid][kind, name] = now
        except (KeyError, ValueError, TypeError) as error:  # somebody forged it
            log.warning("%s %s/%s is not ours: %r", kind, meta["namespace"], name, error)
            return None
        self._names[own] = uid, kind, name
        return uid if now != before else None

    def _drop(self, own: str, *, buried: bool = True) -> str | None:
        """An object with this UID is gone; the run that it was of."""
        if buried:
            self._bury(own)
        if (known := self._names.pop(own, None)) is None:
            return None
        uid, kind, name = known
        if kind == "Pod":
            if (pod := self._pods[uid].get(name)) is not None and pod.uid == own:
                del self._pods[uid][name]
                self._answers[uid].pop(name, None)
                self._missed[uid].pop(name, None)
        elif (child := self._children[uid].get((kind, name))) is not None and child.uid == own:
            del self._children[uid][kind, name]
        for its in (self._pods, self._children, self._answers, self._missed):
            if not its[uid]:
                del its[uid]
        return uid

    def _believed(self, uid: str, body: Json) -> bool:
        """Whether an object is what its label says: of this run's namespace, and owned by it."""
        meta = body["metadata"]
        run = self.runs.get(uid)
        if run is not None and run["metadata"]["namespace"] != meta["namespace"]:
            return False
        owners = {owner.get("uid") for owner in meta.get("ownerReferences") or []}
        return body["kind"] == "PersistentVolumeClaim" or uid in owners

    def _succeeded(self, uid: str, body: Json) -> bool:
        """Whether this is a late word about an earlier object of a name that is taken again."""
        kind, meta = body["kind"], body["metadata"]
        pods, children = self._pods.get(uid, {}), self._children.get(uid, {})
        now = pods.get(meta["name"]) if kind == "Pod" else children.get((kind, meta["name"]))
        if now is None or now.uid == meta["uid"]:
            return False
        return int(meta.get("resourceVersion") or 0) < self._versions.get(now.uid, 0)

    def _bury(self, uid: str) -> None:
        now = self._clock()
        self._versions.pop(uid, None)
        self._gone = {one: at for one, at in self._gone.items() if now - at < REMEMBERED_SECONDS}
        self._gone[uid] = now

    def named(self, namespace: str, name: str) -> str | None:
        """The UID of the run that has this name now."""
        for uid, body in self.runs.items():
            meta = body["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, name):
                return uid
        return None

    def _newer(self, body: Json) -> bool:
        """Whether it is not older than what is known: answers and watches overtake each other."""
        meta = body["metadata"]
        version = int(meta.get("resourceVersion") or 0)
        late = self._clock() - self._gone.get(meta["uid"], float("-inf")) < REMEMBERED_SECONDS
        if late or version < self._versions.get(meta["uid"], 0):
            return False
        self._versions[meta["uid"]] = version
        return True

    def identities(self, namespaces: Collection[str] | None = None) -> set[str]:
        """UIDs of all that is known; or of the runs of some namespaces, and what is theirs."""
        if namespaces is None:
            return set(self._versions)
        runs = {
            uid for uid, body in self.runs.items() if body["metadata"]["namespace"] in namespaces
        }
        return runs | {own for own, (uid, _, _) in self._names.items() if uid in runs}

    def forget(self, uid: str) -> str | None:
        """Something with this UID is gone; the run that it was, or was of."""
        if uid in self.runs:
            return self.put_run(self.runs[uid], gone=True)
        return self._drop(uid)

    def answered(
        self, uid: str, pod: str, status: WorkerStatus, at: datetime, holds: timedelta
    ) -> None:
        """A worker has answered, and is believed for so long."""
        if pod not in self._pods.get(uid, ()):
            return
        its = self._answers[uid]
        self._missed[uid].pop(pod, None)
        its[pod] = next_answer(its.get(pod), status, at, holds)

    def missed(self, uid: str, pod: str) -> None:
        """A worker has not answered."""
        if pod in self._pods.get(uid, ()):
            self._missed[uid][pod] = self._missed[uid].get(pod, 0) + 1

    def deleted(self, uid: str, pod: str) -> None:
        """The operator has deleted a pod."""
        self._deleted[uid].add(pod)

    def pods(self, uid: str) -> list[Pod]:
        """A run's pods."""
        return list(self._pods.get(uid, {}).values())

    def trains(self, uid: str, now: datetime) -> bool:
        """Whether a worker of a run trains, whatever the run says."""
        return bool(training(self.pods(uid), self._answers.get(uid, {}), now))

    def observe(self, run: Run, refused: str = "") -> Observation:
        """All that is known of a run now."""
        uid = run.uid  # who only looks leaves nothing behind
        return Observation(
            run=run,
            pods=tuple(self._pods.get(uid, {}).values()),
            children=tuple(self._children.get(uid, {}).values()),
            answers=dict(self._answers.get(uid, {})),
            missed=dict(self._missed.get(uid, {})),
            deleted=frozenset(self._deleted.get(uid, ())),
            refused=refused,
        )
