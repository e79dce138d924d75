"""Pods, nodes and operators that are lost on a real cluster: the rows that need Kubernetes.

On the test cluster (`../shared/kubernetes`, or DEMORESET_TEST_CLUSTER), which runs on this machine:
so members write their events, with times of its one clock, to the run's volume, a folder of this
machine; and pods are killed for real, by SIGKILL to all of their processes. A deletion, also one
without grace, asks them with SIGTERM first. Its times begin when the API server has taken it: the
kubelet's part is in them, kubectl's own start is not.
"""

import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from injured import RUN, Outcome, Row, Watched, check

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/cluster"))

import kube
from kube import Cluster, until
from told import CORE, Told

EVENTS = "events.jsonl"
INTERVAL = 5  # seconds between checkpoints
START = 10.0  # seconds that a group may need from the start of its pods
AT_ONCE = {"backOffSeconds": 0}  # one loss follows the other sooner than in a cluster's life
# As `injured.QUICK`.
SMALL: dict[str, Any] = {
    "environment": {"slots": 12},
    "ppo": {"rolloutLength": 8, "epochs": 1, "minibatches": 2},
    "checkpoint": {"intervalSeconds": INTERVAL, "volume": {"size": "1Gi", "retention": "Delete"}},
}
SPREAD = {
    "maxSkew": 1,
    "topologyKey": "kubernetes.io/hostname",
    "whenUnsatisfiable": "ScheduleAnyway",
    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "worker"}},
}


class Deployed(Watched):
    """A run on the cluster: its members' events, and its pods."""

    def __init__(self, told: Told, body: dict[str, Any], scratch: Path, count: int) -> None:
        super().__init__(scratch, count, ())
        self._body, self.told = body, told

    def apply(self) -> float:
        """Apply it; when that was done."""
        self.told.cluster.apply(self.told.namespace, self._body)
        return time.monotonic()

    def find(self) -> None:
        """Find the volume, where the events are."""
        cluster, namespace = self.told.cluster, self.told.namespace
        volume = until(lambda: bound(cluster, namespace), "a volume")
        path = cluster.get(namespace, "pv", volume)["spec"]["hostPath"]["path"]
        self.events_file = Path(path) / EVENTS

    def alive(self, members: Mapping[str, int]) -> bool:
        """Whether the pods of all of these members run; their process ids are their pods' own."""
        return {pod(id) for id in members} <= set(self.told.live())

    def kill(self, *names: str) -> float:
        """SIGKILL to all processes of these pods; when that was."""
        told = self.told
        processes = [of_pod(told.cluster, told.namespace, name) for name in names]
        since = time.monotonic()
        for number in itertools.chain.from_iterable(processes):
            slay(number)
        return since

    def delete(self, *names: str, grace: bool = True) -> float:
        """Delete pods; when they were."""
        command = ["delete", "pod", *names, "-n", self.told.namespace, "--wait=false"]
        self.told.cluster.kubectl(*command, *(() if grace else ("--grace-period=0", "--force")))
        return time.monotonic()

    def commits(self, since: float = 0.0) -> list[dict[str, Any]]:
        return [e for e in self.look() if e["event"] == "commit" and e["time"] > since]

    def close(self) -> int:
        self.log.close()
        self.look()
        return 0


def pod(member: str) -> str:
    """The pod of a member, which is called after it."""
    return member.rsplit("-", 2)[0]


@contextmanager
def cluster() -> Iterator[tuple[Cluster, str]]:
    """The test cluster with the operator; stopped in the end."""
    with kube.started(nodes=2) as made:
        # /data is where a run's volume is in its pods.
        kube.make_image("trainer", kube.TRAINER, DEMORESET_EVENTS=f"/data/{EVENTS}")
        with kube.installed(made) as namespace:
            yield made, namespace


@contextmanager
def prepared(made: Cluster, count: int = 3, **spec: Any) -> Iterator[Deployed]:
    """A run far from its goal, to be applied in a namespace of its own."""
    namespace = f"faults-{random.randrange(10**6)}"
    body = yaml.safe_load(RUN.read_text())
    shape = {"min": 1, "max": count, "resources": CORE, "topologySpreadConstraints": [SPREAD]}
    body["spec"] |= {**SMALL, "workers": shape, **spec}
    made.kubectl("create", "namespace", namespace)
    made.kubectl("label", "namespace", namespace, kube.RESTRICTED)
    told = Told(made, namespace, body["metadata"]["name"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run = Deployed(told, body, Path(scratch), count)
            yield run
            run.close()
    finally:
        made.kubectl("delete", "drr", "--all", "-n", namespace)
        made.kubectl("delete", "namespace", namespace, "--wait=false")


@contextmanager
def deployed(made: Cluster, count: int = 3, **spec: Any) -> Iterator[Deployed]:
    """A run far from its goal."""
    with prepared(made, count, **spec) as run:
        run.apply()
        run.find()
        yield run


def bound(made: Cluster, namespace: str) -> str | None:
    claims = made.get(namespace, "pvc")
    return claims[0]["spec"].get("volumeName") if claims else None


# One trial each: seconds


def lost(run: Deployed, strike: Callable[[str], float], *, first: bool = False) -> float:
    """The pod of the first member, or of another one: until the others have summed without it."""
    ids = list(run.whole())
    victim = ids[0] if first else random.choice(ids[1:])
    time.sleep(random.random())
    since = strike(pod(victim))
    return run.recovered(since, [id for id in ids if id != victim])


def killed(run: Deployed) -> float:
    return lost(run, run.kill)


def first_killed(run: Deployed) -> float:
    return lost(run, run.kill, first=True)


def drained(run: Deployed) -> float:
    return lost(run, run.delete)


def regrown(run: Deployed) -> float:
    """A pod is killed: until the group is whole again."""
    ids = list(run.whole())
    since = run.kill(pod(random.choice(ids[1:])))
    run.wait(lambda: set(run.whole()) != set(ids), "another group")
    formed = [e for e in run.events if e["event"] == "formed" and len(e["members"]) == run.count]
    return float(min(e["time"] for e in formed if e["time"] > since) - since)


def all_killed(run: Deployed) -> float:
    """All pods at once: until an update is done again. What went back is at most an interval."""
    ids = list(run.whole())
    time.sleep(INTERVAL * (1 + random.random()))
    since = run.kill(*map(pod, ids))
    last = max(e["update"] for e in run.commits())
    begun = time.monotonic()
    first = run.wait(lambda: run.commits(begun), "an update")[0]
    # An update that was lost before has been done more than once.
    same = [e["time"] for e in run.commits() if e["update"] == first["update"]]
    again = max((at for at in same if at < begun), default=since)
    if first["update"] > last + 1:
        raise RuntimeError(f"after update {last} came {first['update']}")
    if (lost := since - again) > INTERVAL + 2:
        raise RuntimeError(f"{lost:.1f} s of training were lost, more than {INTERVAL}")
    return float(first["time"] - since)


def without_coordinator(run: Deployed) -> float:
    """The coordinator's pod is killed: the longest pause of any member, less what a pod takes."""
    ids = list(run.whole())
    (name,) = run.told.pods("coordinator")
    time.sleep(random.random())
    since = run.delete(name, grace=False)
    until(lambda: running(run, name), "another coordinator")
    away = time.monotonic() - since
    time.sleep(12)
    pauses = []
    for id in ids:
        # Who never went on has paused until now.
        times = [*(e["time"] for e in run.commits() if e["member"] == id), time.monotonic()]
        pauses += [b - max(a, since) for a, b in itertools.pairwise(times) if b > since]
    return float(max(0.0, max(pauses) - away))


def running(run: Deployed, other: str) -> bool:
    """Whether there is another coordinator that runs."""
    pods = run.told.pods("coordinator").items()
    return any(name != other and body["status"]["phase"] == "Running" for name, body in pods)


def cut_off(run: Deployed) -> float:
    """The node without the coordinator is cut off for 20 s: until the others go on."""
    (coordinator,) = run.told.pods("coordinator").values()
    home = coordinator["spec"]["nodeName"]
    away = next(n for n in ("node1", "node2") if n != home)
    while True:
        ids = list(run.whole())
        nodes = {name: body["spec"]["nodeName"] for name, body in run.told.pods().items()}
        others = [id for id in ids if nodes[pod(id)] == home]
        if len(others) < len(ids):
            break
        run.delete(pod(others[-1]))  # all have come here from a node that was lost before
    since = time.monotonic()
    run.told.cluster.node("cut", away)
    try:
        seconds = run.recovered(since, others)
        time.sleep(max(0.0, since + 20 - time.monotonic()))
    finally:
        run.told.cluster.node("heal", away)
    run.told.ready(run.count)
    return seconds


# Rows


def repeated(trial: Callable[[Deployed], float], *, kills: int = 0) -> Callable[[int], Outcome]:
    """The same trial again and again, in one run; `kills`: workers that one of them kills."""

    def measure(trials: int) -> Outcome:
        outcome = Outcome()
        with cluster() as (made, _), deployed(made, restart=AT_ONCE | {"limit": 3 * trials}) as run:
            for _ in range(trials):
                outcome.n += 1
                try:
                    outcome.seconds.append(trial(run))
                    print(f"  {outcome.n}/{trials}: {outcome.seconds[-1]:.3f} s", flush=True)
                except (RuntimeError, TimeoutError, AssertionError) as error:
                    outcome.failures.append(str(error))
                    print(f"  {outcome.n}/{trials}: {error}", flush=True)
            run.whole()
            told = run.told.status["restarts"]
            # Those that are killed while others train do not count, but are on record.
            if told["total" if kills else "counted"] != kills * trials:
                outcome.failures.append(f"of {kills * trials} kills the ledger says {told}")
        outcome.events = run.events
        # Where all are lost, updates are done again: those are told by the trial.
        outcome.facts = {} if trial is all_killed else dict(check(run.events))
        return outcome

    return measure


def operators(strike: Callable[[Cluster, str], None], replicas: int) -> Callable[[int], Outcome]:
    """Operators are struck while workers are killed: each is replaced once, no other is touched."""

    def measure(trials: int) -> Outcome:
        outcome, kills = Outcome(), 0
        with cluster() as (made, namespace), deployed(made, restart=AT_ONCE | {"limit": 0}) as run:
            kube.upgrade(made, kube.CHART, "--set", f"replicas={replicas}")
            run.whole()
            known = set(run.told.live())

            def settle() -> None:
                """Wait for an operator that has seen all: the status alone may be of before."""
                until(
                    lambda: (
                        run.told.status["restarts"]["total"] == kills
                        and len(run.told.live()) == run.count
                    ),
                    f"{kills} kills recorded, {run.count} workers run",
                    120,
                )
                run.told.ready(run.count)

            for number in range(trials):
                outcome.n += 1
                most = min(len(known), random.choice((0, 0, 1)))
                victims = set(random.sample(sorted(known), most))
                if victims:
                    run.delete(*victims, grace=False)
                    kills += len(victims)
                    time.sleep(random.random())
                strike(made, namespace)
                if number % 5 == 4 or replicas > 1:
                    settle()
                else:
                    time.sleep(3 * random.random())
                names = set(run.told.live())
                places = [name.rsplit("-", 1)[0] for name in names]
                if len(places) != len(set(places)) or (known - victims) - names:
                    outcome.failures.append(f"{sorted(known - victims)} became {sorted(names)}")
                known = names
                print(f"  {outcome.n}/{trials}: {len(victims)} killed", flush=True)
            settle()
            told = run.told.status["restarts"]
            if (told["total"], told["counted"]) != (kills, 0):
                outcome.failures.append(f"{kills} workers were killed, the ledger says {told}")
        outcome.facts, outcome.events = dict(check(run.events)), run.events
        return outcome

    return measure


def kill_operator(made: Cluster, namespace: str) -> None:
    """Whichever acts, without a word; deleted too, so that the next one need not wait."""
    pods = made.get(namespace, "pods", selector="app.kubernetes.io/component=operator")
    names = [body["metadata"]["name"] for body in pods]
    for number in itertools.chain.from_iterable(of_pod(made, namespace, name) for name in names):
        slay(number)
    made.kubectl(
        *("delete", "pods", "-n", namespace, *names),
        *("--grace-period=0", "--force", "--wait=false"),
    )


def freeze_leader(made: Cluster, namespace: str) -> None:
    """The one that acts is stopped until the other one does, and goes on then."""
    leader = until(lambda: kube.leader(made), "a leader")
    processes = of_pod(made, namespace, leader)
    for number in processes:
        os.kill(number, signal.SIGSTOP)
    try:
        until(lambda: kube.leader(made) not in ("", leader), "another leader", 60)
    finally:
        for number in processes:
            os.kill(number, signal.SIGCONT)


def of_pod(made: Cluster, namespace: str, name: str) -> list[int]:
    """A pod's processes that are ours, as this machine knows them."""
    uid = made.get(namespace, "pods", name)["metadata"]["uid"]
    found = []
    for entry in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            ours = b"demoreset" in (entry.parent / "cmdline").read_bytes()
            if ours and uid in entry.read_text():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def slay(number: int) -> None:
    """Kill a process, if it is still there: its parent may have gone before it."""
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def too_little_memory(trials: int) -> Outcome:
    """A limit that is too low: until the run's condition names it."""
    outcome = Outcome()
    little = {"resources": {"limits": {"memory": "150Mi"}}}
    with cluster() as (made, _):
        for _ in range(trials):
            outcome.n += 1
            begun = time.monotonic()
            with deployed(made, 1, workers=little, restart={"outOfMemoryLimit": 1}) as run:
                until(lambda: run.told.condition("Failed"), "failed")
                outcome.seconds.append(time.monotonic() - begun)
                said = run.told.condition("Failed")["message"]
                causes = [attempt["cause"] for attempt in run.told.status["attempts"]]
            if causes != ["OutOfMemory"] * 2 or "150Mi" not in said:
                outcome.failures.append(json.dumps([causes, said]))
    return outcome


ROWS = {
    "pod": Row(2, "a worker's pod, kill -9", 20, repeated(killed, kills=1), p95=1),
    "pod-back": Row(
        2, "the same: until the group is whole again", 10, repeated(regrown, kills=1), p95=START + 5
    ),
    "first-pod": Row(
        3, "the first worker's pod, the same", 10, repeated(first_killed, kills=1), p95=1
    ),
    "all-pods": Row(
        4, "all workers' pods at once", 5, repeated(all_killed, kills=3), p95=START + 5
    ),
    "coordinator-pod": Row(
        5, "its pod: after it is back", 10, repeated(without_coordinator), p95=3
    ),
    "drained-pod": Row(7, "a worker's pod, deleted with grace", 10, repeated(drained), p95=10),
    "cut-node": Row(11, "a node cut off for 20 s", 3, repeated(cut_off), p95=6),
    "operator": Row(20, "the operator, kill -9", 50, operators(kill_operator, 1)),
    "memory": Row(23, "a memory limit that is too low: named", 3, too_little_memory, p95=60),
    "two-operators": Row(
        24, "one that acts, stopped, replaced, thawed", 5, operators(freeze_leader, 2)
    ),
}
