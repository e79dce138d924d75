"""A run's port: /metrics for Prometheus, /status for the operator, and the kubelet's probes."""

import errno
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from demoreset_api.errors import UserError
from demoreset_api.names import ASIDE, QUORUM, STARTING
from demoreset_trainer.coordinator import has_ipv6
from demoreset_trainer.counters import Cause, losses
from demoreset_trainer.progress import Progress

WAITS_AFTER = 10.0  # seconds at the quorum until it counts as waiting: others are gone, or slow
HUNG_AFTER = 300.0  # seconds without a phase or update until the process counts as hung
PREFIX = "demoreset_"

# name, what it says, field of Progress
GAUGES = (
    ("curriculum_start_frame", "Frontier: the earliest start mastered, in frames", "start_frame"),
    ("curriculum_demo_frames", "Length of what is learned of the demo, in frames", "demo_frames"),
    ("curriculum_progress_ratio", "Share of the demo that the start has moved", "progress_ratio"),
    ("curriculum_success_ratio", "Success around the frontier", "success_rate"),
    ("goal_success_ratio", "Success of the latest episodes from the game's own start", "goal_rate"),
    ("goal_ratio", "Success that is wanted from there", "goal"),
    ("episode_score_mean", "Mean score of this update's episodes", "episode_score_mean"),
    ("episode_score_max", "Best score of this update's episodes", "episode_score_max"),
    ("score_mean", "Mean score of this update's episodes from the game's own start", "score_mean"),
    ("score_max", "Best score from the game's own start", "score_max"),
    ("update", "Updates done", "update"),
    ("update_seconds", "Time that the latest update took, with its rollout", "update_seconds"),
    ("learning_rate", "Step size, with remedies; less near the goal", "learning_rate"),
    (
        "entropy_coefficient",
        "Weight of the entropy, with remedies; without a guide less near the goal",
        "entropy_coefficient",
    ),
    ("entropy_nats", "Entropy of the policy", "entropy"),
    ("kl_nats", "Divergence of the policy within the update", "kl"),
    ("clip_ratio", "Share of samples whose ratio was clipped", "clip_share"),
    ("policy_loss", "Clipped surrogate, negated", "policy_loss"),
    ("value_loss", "Half the squared error of the value", "value_loss"),
    ("guide_loss", "Cross entropy to the demo, weighted by 1 - success", "guide_loss"),
    ("explained_variance_ratio", "Share of the returns' variance explained", "explained_variance"),
    ("gradient_norm", "Norm of the gradient before it is clipped", "gradient_norm"),
    ("frames_per_second", "Emulator frames per second of training, lately", "frames_per_second"),
    ("stall_rung", "Remedies in force against a plateau", "stall_rung"),
    ("stalled", "1 when all remedies were tried in vain", "stalled"),
    ("members", "Members of the group", "members"),
    ("generation", "Number of the group's present composition", "generation"),
    ("goodput_ratio", "Share of the time that was not spent on recoveries", "goodput"),
    ("eta_seconds", "Until the start is reached, at the present pace", "eta_seconds"),
    ("checkpoint_update", "Update of the latest checkpoint", "checkpoint_update"),
    ("checkpoint_age_seconds", "Age of the latest checkpoint", "checkpoint_age_seconds"),
    ("checkpoint_bytes", "Size of the latest checkpoint", "checkpoint_bytes"),
    ("checkpoint_write_seconds", "Time that writing it took", "checkpoint_seconds"),
)
# name, what it says, field of Progress: totals of the run, over all its lives
TOTALS = (
    ("frames", "Emulator frames of the run", "frames"),
    ("training_seconds", "Time in training", "seconds"),
    ("rejected_updates", "Updates that were not finite and were undone", "rejected_updates"),
    ("updates_rolled_back", "Updates done again after a member was lost", "rolled_back"),
    ("frames_discarded", "Frames of lost members, never learned from", "frames_discarded"),
)
# name, what it says, field of Progress: totals of the run by cause
RECOVERIES = (
    ("recoveries", "Changes that the group recovered from", "recoveries"),
    ("recovery_seconds", "Time that they took", "recovery_seconds"),
)


class _Server(ThreadingHTTPServer):
    """Listens on IPv6, too, where that is meant and there: a pod may have no other address."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in host or (not host and has_ipv6()):
            self.address_family = socket.AF_INET6
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Bind without asking the name service who we are: that can take seconds in a pod."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not news, and must not write over the screen."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Report(Collector):
    """Serves what the loop tells.

    Before the first update there are no metrics but the heartbeat: a start of 0 would say that the
    run has arrived, and a counter that goes from 0 to a resumed run's total that it just did that.

    Args:
        port: 0 takes a free one; `port` says which.
        host: Where it listens; all addresses by default, for a pod is asked from outside.

    Raises:
        UserError: the port is taken, or not allowed.
    """

    def __init__(self, port: int, host: str = "") -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._phase, self._entered = STARTING, time.monotonic()
        self._heartbeat = time.time()
        self._told = time.monotonic()
        self._episodes: dict[str, float] = {}  # by outcome
        self._phases: dict[str, float] = {}  # seconds by phase
        self._states: dict[str, str] = {}  # of this supervisor's members, by id
        self._registry = CollectorRegistry()
        self._registry.register(self)
        report = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds that a client may be silent

            def do_GET(self) -> None:
                code, kind, body = report.answer(self.path)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not news."""

        try:
            self._server = _Server(host, port, Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            unknown = isinstance(error, socket.gaierror)
            if unknown or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"--host {host}: cannot be served ({reason}); it is an address of this "
                    "machine, or a name of one"
                ) from error
            raise UserError(
                f"--port {port}: cannot be served ({reason}); choose another, or 0 for a free one"
            ) from error
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="report", daemon=True).start()

    def phase(self, name: str) -> None:
        """The loop has entered a phase, or is still in it."""
        if name != self._phase:
            self._phase, self._entered = name, time.monotonic()
        self._heartbeat = time.time()

    def states(self, states: Mapping[str, str]) -> None:
        """How the members of this supervisor are, by their ids."""
        with self._lock:
            self._states = dict(states)

    def update(self, progress: Progress) -> None:
        """An update is done."""
        with self._lock:
            self._progress, self._heartbeat = progress, time.time()
            self._told = time.monotonic()
            for outcome, count in progress.outcomes.items():
                name = outcome.lower()
                self._episodes[name] = self._episodes.get(name, 0) + count
            for phase, seconds in progress.phase_seconds.items():
                self._phases[phase] = self._phases.get(phase, 0.0) + seconds

    def _latest(self) -> Progress | None:
        """The latest update; the checkpoint has grown older since, also while the loop hangs."""
        p = self._progress
        if p is None or p.checkpoint_age_seconds is None:
            return p
        age = p.checkpoint_age_seconds + time.monotonic() - self._told
        return replace(p, checkpoint_age_seconds=age)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        with self._lock:
            p, episodes, phases = self._latest(), dict(self._episodes), dict(self._phases)
        text = "Unix time of the loop's latest sign of life"
        yield GaugeMetricFamily(PREFIX + "heartbeat_timestamp_seconds", text, self._heartbeat)
        if p is None:
            return
        for name, text, field in GAUGES:
            value = getattr(p, field)
            yield GaugeMetricFamily(PREFIX + name, text, float("nan") if value is None else value)
        for name, text, field in TOTALS:
            yield CounterMetricFamily(PREFIX + name, text, getattr(p, field))
        failing = p.checkpoint_error is not None
        text = "1 while checkpoints cannot be written"
        yield GaugeMetricFamily(PREFIX + "checkpoint_failing", text, failing)
        # All are told from the start: what begins at 1 has no `increase`.
        causes: dict[str, float] = dict.fromkeys(Cause, 0)
        by_cause = [
            (name, text, "cause", causes | getattr(p, field)) for name, text, field in RECOVERIES
        ]
        for name, text, label, counts in (
            ("episodes", "Episodes that ended, by how", "outcome", episodes),
            ("phase_seconds", "Time by phase of the loop", "phase", phases),
            *by_cause,
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status code, type and body for a path."""
        match path.partition("?")[0]:
            case "/metrics":
                body = generate_latest(self._registry)
                return 200, "text/plain; version=0.0.4; charset=utf-8", body
            case "/status":
                return 200, "application/json", json.dumps(self.status()).encode()
            case "/healthz" | "/readyz" as probe:
                silent = time.time() - self._heartbeat
                if silent > HUNG_AFTER:
                    return 503, "text/plain", f"no sign of life for {silent:.0f} s\n".encode()
                if probe == "/readyz" and (
                    self._progress is None or self._phase in (ASIDE, STARTING)
                ):
                    return 503, "text/plain", b"does not train\n"
                starting = self._progress is None and self._phase == STARTING
                return 200, "text/plain", b"starting\n" if starting else b"ok\n"
            case _:
                return 404, "text/plain", b"there are /metrics, /status, /healthz and /readyz\n"

    @property
    def _waiting(self) -> bool:
        return self._phase == QUORUM and time.monotonic() - self._entered > WAITS_AFTER

    def status(self) -> dict[str, Any]:
        """What the operator reads (design: the worker's /status)."""
        with self._lock:
            p, states = self._latest(), dict(self._states)
        status: dict[str, Any] = {
            "phase": self._phase,
            "lastHeartbeat": self._heartbeat,
            "members": _members(p.roster if p else [], states, waiting=self._waiting),
        }
        if p is None:
            return status | {"generation": 0, "worldSize": 1, "rank": 0, "recoveries": 0}
        return status | {"recoveries": losses(p.recoveries)} | standing(p)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def standing(p: Progress) -> dict[str, Any]:
    """Where a run stands, as /status has it; also the last words of a worker that is done."""
    return {
        "generation": p.generation,
        "worldSize": p.members,
        "rank": p.rank,
        "life": p.life,
        "resumed": {
            "life": p.resumed_life,
            "update": p.resumed_update,
            "frames": p.resumed_frames,
        },
        "update": p.update,
        "frames": p.frames,
        "seconds": p.seconds,
        "curriculum": {
            "startFrame": p.start_frame,
            "demoFrames": p.demo_frames,
            "progress": p.progress_ratio,
            "successRate": p.success_rate,
            "goalRate": p.goal_rate,
        },
        "evaluation": {
            "update": p.evaluation_update,
            "episodes": p.evaluation_episodes,
            "successRate": p.evaluation_rate,
        },
        "training": {
            "framesPerSecond": p.frames_per_second,
            "scoreMean": p.score_mean,
            "scoreMax": p.score_max,
            "entropy": p.entropy,
            "learningRate": p.learning_rate,
            "stallRung": p.stall_rung,
            "stalled": p.stalled,
            "etaSeconds": p.eta_seconds,
        },
        "checkpoint": {
            "update": p.checkpoint_update,
            "ageSeconds": p.checkpoint_age_seconds,
            "bytes": p.checkpoint_bytes,
            "writeSeconds": p.checkpoint_seconds,
            "error": p.checkpoint_error,
        },
    }


def _members(
    roster: list[dict[str, Any]], states: Mapping[str, str], *, waiting: bool
) -> list[dict[str, Any]]:
    """The latest group's members; and those of this supervisor that are not in it: new, or hung.

    While ours wait for others, nothing is known of those.
    """
    if waiting:
        states = {id: "waiting" if state == "training" else state for id, state in states.items()}
    members = [
        {key: member.get(key) for key in ("id", "pid", "host", "update")}
        | {"state": states.get(member["id"], "unknown" if waiting else "training")}
        for member in roster
    ]
    inside = {member["id"] for member in roster}
    outside = {  # who trained, and is not in the group any more, hangs or was cut off
        name: "out" if state == "training" else state
        for name, state in states.items()
        if name not in inside
    }
    return members + [
        {"id": name, "pid": None, "host": None, "update": None, "state": state}
        for name, state in sorted(outside.items())
    ]
