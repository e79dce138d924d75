"""The operator's own metrics. Series of a run are removed with it."""

import contextlib
from collections import Counter as Count
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from demoreset_api.status import Attempt, Cause, Phase, RunStatus
from demoreset_operator.causes import NO_LOSS

disable_created_metrics()  # type: ignore[no-untyped-call]
PREFIX = "demoreset_operator_"
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """What the operator does, and how its runs are."""

    def __init__(self) -> None:
        self.registry = its = CollectorRegistry()
        self._reconciles = Counter(
            PREFIX + "reconciles", "Looks at a run, by how they ended", ["result"], registry=its
        )
        self._seconds = Histogram(
            PREFIX + "reconcile_seconds", "Time of a look at a run", buckets=BUCKETS, registry=its
        )
        self.depth = Gauge(PREFIX + "queue_depth", "Runs that wait to be looked at", registry=its)
        self.leader = Gauge(PREFIX + "is_leader", "1 while this operator acts", registry=its)
        self._runs = Gauge(PREFIX + "runs", "Runs by phase", ["phase"], registry=its)
        self._restarts = Counter(
            PREFIX + "restarts", "Workers that were lost, by cause", ["cause"], registry=its
        )
        self._requests = Counter(
            PREFIX + "api_requests", "To the API server", ["verb", "code"], registry=its
        )
        run = ["namespace", "run"]
        self._failed = Gauge(PREFIX + "run_failed", "1 where a run has failed", run, registry=its)
        self._training = Gauge(
            PREFIX + "run_training", "1 while a run trains, 0 while it should", run, registry=its
        )
        self._run_restarts = Gauge(
            PREFIX + "run_restarts", "Workers of a run that were started again", run, registry=its
        )
        self._start = Gauge(
            PREFIX + "run_start_frame", "Where a run's episodes begin", run, registry=its
        )
        self._known: dict[str, tuple[str, str, Phase]] = {}
        for result in ("done", "again", "error"):
            self._reconciles.labels(result)
        for phase in Phase:
            self._runs.labels(phase.value)
        for cause in Cause:  # what begins at 1 has no `increase`
            if cause not in NO_LOSS:
                self._restarts.labels(cause.value)

    def requested(self, verb: str, code: int) -> None:
        """A request to the API server was answered."""
        self._requests.labels(verb, str(code)).inc()

    def reconciled(self, result: str, seconds: float) -> None:
        """A run was looked at."""
        self._reconciles.labels(result).inc()
        if result == "done":
            self._seconds.observe(seconds)

    def run(self, uid: str, namespace: str, name: str, status: RunStatus) -> None:
        """How a run is."""
        before = self._known.get(uid)
        self._known[uid] = namespace, name, status.phase
        self._failed.labels(namespace, name).set(status.phase is Phase.FAILED)
        if status.phase in (Phase.PENDING, Phase.RUNNING):
            self._training.labels(namespace, name).set(status.phase is Phase.RUNNING)
        else:
            _remove(self._training, namespace, name)
        self._run_restarts.labels(namespace, name).set(status.restarts.total)
        if status.curriculum is not None:
            self._start.labels(namespace, name).set(status.curriculum.start_frame)
        elif before is None:  # an earlier run of this name may have left its own
            _remove(self._start, namespace, name)
        if before is None or before[2] is not status.phase:
            self._count()

    def lost(self, attempts: Iterable[Attempt]) -> None:
        """Workers have ended, newly recorded: a status has the latest few alone."""
        for one in attempts:
            if one.cause not in NO_LOSS:
                self._restarts.labels(one.cause.value).inc()

    def forget(self, uid: str) -> None:
        """A run is gone."""
        if (known := self._known.pop(uid, None)) is None:
            return
        its = known[:2]
        if all(other[:2] != its for other in self._known.values()):  # no new run of this name
            for gauge in (self._failed, self._training, self._run_restarts, self._start):
                _remove(gauge, *its)
        self._count()

    def _count(self) -> None:
        phases = Count(known[2] for known in self._known.values())
        for phase in Phase:
            self._runs.labels(phase.value).set(phases[phase])


def _remove(gauge: Gauge, namespace: str, run: str) -> None:
    with contextlib.suppress(KeyError):  # of a run that was never told of
        gauge.remove(namespace, run)
