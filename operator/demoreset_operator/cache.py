"""What the watches have told: runs, and what belongs to them, found by the run's UID."""

from collections import defaultdict
from datetime import datetime
from typing import Any

from demoreset_api.names import LABEL_RUN_UID
from demoreset_operator.observation import (
    Child,
    Observation,
    Pod,
    Run,
    Told,
    parse_child,
    parse_pod,
)

Json = dict[str, Any]


class Cache:
    """Runs by UID; their pods and other objects, parsed, by kind and name."""

    def __init__(self) -> None:
        self.runs: dict[str, Json] = {}
        self._pods: dict[str, dict[str, Pod]] = defaultdict(dict)
        self._children: dict[str, dict[tuple[str, str], Child]] = defaultdict(dict)
        self._versions: dict[str, int] = {}  # of all objects, by their own UIDs
        self._names: dict[str, tuple[str, str, str]] = {}  # run, kind and name, by the same
        self._told: dict[str, dict[str, Told]] = defaultdict(dict)

    def put_run(self, body: Json, *, gone: bool = False) -> str:
        """A run as the API server has it now; its UID."""
        uid: str = body["metadata"]["uid"]
        if gone:
            self.runs.pop(uid, None)
            self._told.pop(uid, None)
            self._versions.pop(uid, None)
        elif self._newer(body):
            self.runs[uid] = body
        return uid

    def put(self, body: Json, *, gone: bool = False) -> str | None:
        """An object of a run as the API server has it now; the run's UID."""
        meta = body["metadata"]
        uid: str | None = (meta.get("labels") or {}).get(LABEL_RUN_UID)
        if uid is None:
            return None
        kind, name = body["kind"], meta["name"]
        if gone:
            self._pods[uid].pop(name, None)
            self._children[uid].pop((kind, name), None)
            self._told[uid].pop(name, None)
            self._versions.pop(meta["uid"], None)
            self._names.pop(meta["uid"], None)
            if not self._pods[uid] and not self._children[uid]:
                del self._pods[uid], self._children[uid]
            return uid
        if not self._newer(body):
            return uid
        self._names[meta["uid"]] = uid, kind, name
        if kind == "Pod":
            self._pods[uid][name] = parse_pod(body)
        else:
            self._children[uid][kind, name] = parse_child(body)
        return uid

    def _newer(self, body: Json) -> bool:
        """Whether it is not older than what is known: answers and watches overtake each other."""
        meta = body["metadata"]
        version = int(meta.get("resourceVersion") or 0)
        if version < self._versions.get(meta["uid"], 0):
            return False
        self._versions[meta["uid"]] = version
        return True

    def identities(self) -> set[str]:
        """UIDs of all that is known."""
        return set(self._versions)

    def forget(self, uid: str) -> str | None:
        """Something with this UID is gone; the run that it was, or was of."""
        if uid in self.runs:
            return self.put_run(self.runs[uid], gone=True)
        if uid not in self._names:
            return None
        run, kind, name = self._names[uid]
        body = {
            "kind": kind,
            "metadata": {"name": name, "uid": uid, "labels": {LABEL_RUN_UID: run}},
        }
        return self.put(body, gone=True)

    def tell(self, uid: str, pod: str, at: datetime, content: Json) -> None:
        """What a worker has said."""
        self._told[uid][pod] = Told(at, content)

    def told(self, uid: str) -> dict[str, Told]:
        """What a run's workers have said."""
        return self._told[uid]

    def pods(self, uid: str) -> list[Pod]:
        """A run's pods."""
        return list(self._pods[uid].values())

    def observe(self, run: Run) -> Observation:
        """All that is known of a run now."""
        return Observation(
            run=run,
            pods=tuple(self._pods[run.uid].values()),
            children=tuple(self._children[run.uid].values()),
            told=dict(self._told[run.uid]),
        )
