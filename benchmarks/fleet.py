"""Many runs at once: how fast the operator makes their pods, and what it costs the API server.

    python benchmarks/fleet.py --runs 200

On the control plane of the test cluster with simulated nodes (`../shared/kubernetes`, or
DEMORESET_TEST_CLUSTER), where pods run without a container. Beside it the floor: a bare script that
makes as many and the same objects, the runs among them, one after the other through 16 connections,
and knows beforehand what they are. Both run on this machine, with the control plane.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from kubernetes.aio import client, config, watch

from demoreset_api.names import API_VERSION, GROUP, KIND, LABEL_RUN, LABEL_WORKER, PLURAL, VERSION
from demoreset_operator import pods, render
from demoreset_operator.api import Api
from demoreset_operator.observation import parse_run
from demoreset_operator.render import Settings
from measure import RESULTS, core_seconds, machine

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(os.environ.get("DEMORESET_TEST_CLUSTER", ROOT.parent / "shared/kubernetes"))
CONNECTIONS, WORKERS, PORT = 16, 4, 18080
LOSSES = 5  # of 20 pods each
PROGRAMS = ("kube-apiserver", "kube-controller", "kube-scheduler", "etcd", "kwok")
SETTLE = 10.0  # seconds, until the last objects that are no workers are gone
BEGUN = 20.0  # seconds, until an operator that was started has listed everything for the last time
CLAIM = {  # one for all runs: what is measured is pods
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "shared", "namespace": "default"},
    "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
}
SIMULATED = {
    "nodeSelector": {"type": "simulated"},
    "tolerations": [{"operator": "Exists"}],
}
Json = dict[str, Any]


class Pods:
    """All pods with a label, as a watch tells of them; and when something came true.

    left: that exist, or are being deleted. The simulated kubelets do one thing after the other:
    what begins before the last of them is gone waits for it.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.running: dict[str, Json] = {}
        self.places: dict[tuple[str, str], set[str]] = defaultdict(set)  # those, by run and worker
        self.exist: set[str] = set()
        self.left: set[str] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with client.ApiClient() as connected:
            listed = client.CoreV1Api(connected).list_namespaced_pod
            while True:
                async with watch.Watch().stream(
                    listed, "default", label_selector=self._label
                ) as stream:
                    async for event in stream:
                        self._hear(event["type"], event["raw_object"])
                        self._changed.set()

    def _hear(self, kind: str, body: Json) -> None:
        name = body["metadata"]["name"]
        self.exist.discard(name)
        self.places[place(body)].discard(name)
        self.running.pop(name, None)
        (self.left.discard if kind == "DELETED" else self.left.add)(name)
        if kind != "DELETED" and "deletionTimestamp" not in body["metadata"]:
            self.exist.add(name)
            if body["status"].get("phase") == "Running":
                self.running[name] = body
                self.places[place(body)].add(name)

    async def until(self, met: Callable[[], bool], patience: float = 900) -> float:
        """Wait; the moment when it was so."""
        async with asyncio.timeout(patience):
            while not met():
                self._changed.clear()
                await self._changed.wait()
        return time.monotonic()


def place(body: Json) -> tuple[str, str]:
    """The run and the number of a worker's pod."""
    labels = body["metadata"]["labels"]
    return labels[LABEL_RUN], labels[LABEL_WORKER]


async def many(works: list[Awaitable[Any]]) -> None:
    """Do all of them, so many at once as there are connections."""
    free = asyncio.Semaphore(CONNECTIONS)

    async def one(work: Awaitable[Any]) -> None:
        async with free:
            await work

    await asyncio.gather(*map(one, works))


def run(number: int) -> Json:
    """A run of four workers on simulated nodes."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": f"run-{number}", "namespace": "default"},
        "spec": {
            "demo": {"name": "montezuma-first-key"},
            "checkpoint": {"volume": {"claim": "shared"}},
            "workers": {"max": WORKERS, **SIMULATED},
        },
    }


def objects(number: int) -> list[Json]:
    """A run, and all that the operator makes for it; here nobody owns them."""
    bare, body = run(number), run(number)
    body["metadata"]["uid"] = f"bare-{number}"
    its, settings = parse_run(body), Settings("none", None, "default")
    made = [
        *render.children(its, settings),
        pods.coordinator(its, settings, 1),
        *(pods.worker(its, settings, index, 1) for index in range(WORKERS)),
    ]
    for one in made:
        del one["metadata"]["ownerReferences"]
    return [bare, *made]


async def floor(api: Api, runs: int) -> Json:
    """The bare script."""
    pods, count = Pods(LABEL_WORKER), runs * WORKERS
    watching = asyncio.create_task(pods.run())
    # Names of their own: what is deleted may stay for a while.
    made = [one for number in range(runs) for one in objects(10_000 + number)]
    before = used()
    begun = time.monotonic()
    await many([api.create(one) for one in made])
    exist = await pods.until(lambda: len(pods.exist) == count)
    cores = spent(before, used())
    running = await pods.until(lambda: len(pods.running) == count)
    await asyncio.sleep(SETTLE)
    bare = {one["metadata"]["name"]: one for one in made if one["kind"] == "Pod"}
    found = {
        "objects": len(made),
        "exist": round(exist - begun, 1),
        "running": round(running - begun, 1),
        "coreSeconds": cores,
        "lost20Seconds": await lost(api, pods, 20, bare),
    }
    names = {(one["kind"], one["metadata"]["name"]) for one in made}
    names |= {("Pod", name) for name in pods.left}
    await many([api.delete(kind, "default", name) for kind, name in names])
    await pods.until(lambda: not pods.left)
    watching.cancel()
    return found


@asynccontextmanager
async def operator() -> AsyncIterator[subprocess.Popen[bytes]]:
    """The operator, as a process of this machine."""
    command = [sys.executable, "-m", "demoreset_operator.main", "--trainer-image", "none"]
    log = (Path("/tmp") / "fleet-operator.log").open("w")
    process = subprocess.Popen([*command, "--port", str(PORT)], stderr=log)
    try:
        while "is_leader 1.0" not in scraped():
            await asyncio.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait()


def scraped() -> str:
    """The operator's metrics."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def requests() -> dict[str, int]:
    """Requests to the API server by verb, from the operator's metrics."""
    found: dict[str, int] = {}
    for verb, count in re.findall(r'api_requests_total{code="\d+",verb="(\w+)"} (\S+)', scraped()):
        found[verb] = found.get(verb, 0) + int(float(count))
    return found


def used(**others: int) -> dict[str, float]:
    """Seconds of a core so far: of the control plane's programs, of this script, and of others."""
    pids: dict[str, list[int]] = {name: [] for name in PROGRAMS}
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # it has ended
            pids.get(path.read_text().strip(), []).append(int(path.parent.name))
    pids |= {name: [pid] for name, pid in {**others, "script": os.getpid()}.items()}
    return {name: core_seconds(its) for name, its in pids.items()}


def spent(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """What was used between two moments."""
    return {name: round(now[name] - before[name], 1) for name in now}


def rss(process: subprocess.Popen[bytes]) -> float:
    """MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


async def fleet(api: Api, runs: int) -> Json:
    """So many runs under the operator."""
    pods = Pods(LABEL_WORKER)
    watching = asyncio.create_task(pods.run())
    count = runs * WORKERS
    async with operator() as process:
        await asyncio.sleep(BEGUN)
        asked, before = requests(), used(operator=process.pid)
        begun = time.monotonic()
        await many([api.create(run(number)) for number in range(runs)])
        exist = await pods.until(lambda: len(pods.exist) == count)
        cores = spent(before, used(operator=process.pid))
        running = await pods.until(lambda: len(pods.running) == count)
        await asyncio.sleep(15)
        own = core_seconds([process.pid]) - before["operator"]
        after = requests()
        found: Json = {
            "exist": round(exist - begun, 1),
            "running": round(running - begun, 1),
            "coreSeconds": cores,
            "requestsPerRun": {
                verb: round((number - asked.get(verb, 0)) / runs, 1)
                for verb, number in after.items()
            },
            "cpuSecondsPerRun": round(own / runs, 4),
            "rssMiB": round(rss(process)),
        }
        own = core_seconds([process.pid])
        await asyncio.sleep(60)
        found["idleCores"] = round((core_seconds([process.pid]) - own) / 60, 4)
        found["lost20Seconds"] = await lost(api, pods, 20)
        begun = time.monotonic()
        await many([api.delete(KIND, "default", f"run-{number}") for number in range(runs)])
        found["gone"] = round(await pods.until(lambda: not pods.left) - begun, 1)
        found["rssMiBEnd"] = round(rss(process))
    watching.cancel()
    return found


async def lost(api: Api, pods: Pods, count: int, bare: dict[str, Json] | None = None) -> Json:
    """Pods deleted at once, of as many runs: until each is whole again; several times, other runs.

    bare: All pods by name, where nobody makes others: this does, under other names.
    """
    names = random.sample(sorted(pods.running), len(pods.running))
    of = {pods.running[name]["metadata"]["labels"][LABEL_RUN]: name for name in names}
    chosen = list(of.values())[: count * LOSSES]
    times: list[float] = []

    async def one(name: str, begun: float) -> None:
        its = pods.places[place(pods.running[name])]
        await api.delete("Pod", "default", name)
        if bare is not None:
            meta = {**bare[name]["metadata"], "name": f"{name}-again"}
            await api.create({**bare[name], "metadata": meta})
        while not its - {name}:
            await asyncio.sleep(0.02)
        times.append(time.monotonic() - begun)

    for first in range(0, len(chosen), count):
        begun = time.monotonic()
        await asyncio.gather(*(one(name, begun) for name in chosen[first : first + count]))
        await asyncio.sleep(SETTLE)
    return {"median": round(statistics.median(times), 2), "max": round(max(times), 2)}


async def measure(options: argparse.Namespace) -> None:
    """All of it; writes results/fleet-RUNS.json."""
    await config.load_kube_config()
    api = Api()
    await api.connect()
    on = machine(("demoreset", "kopf", "kubernetes"))
    await api.create(CLAIM)
    found: Json = {"runs": options.runs, "workers": WORKERS, "floor": [], "operator": []}
    for _ in range(options.rounds):
        found["floor"].append(await floor(api, options.runs))
        print("  floor", found["floor"][-1], flush=True)
        await asyncio.sleep(SETTLE)
        found["operator"].append(await fleet(api, options.runs))
        print("  operator", found["operator"][-1], flush=True)
        await asyncio.sleep(SETTLE)
    found["machine"] = on
    (RESULTS / f"fleet-{options.runs}.json").write_text(json.dumps(found, indent=2) + "\n")
    await api.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if "KUBECONFIG" not in os.environ:
        tool = str(TOOLS / "cluster")
        up = subprocess.run(
            [tool, "up", "--control-plane-only"], check=True, capture_output=True, text=True
        )
        os.environ["KUBECONFIG"] = up.stdout.strip().splitlines()[-1].rpartition("=")[2]
        subprocess.run([tool, "simulate", "50"], check=True, capture_output=True)
        # The stand-in for what enforces NetworkPolicies reads all pods twice a second, for nodes
        # that are not there: half a core, which no cluster would spend.
        state = Path(os.environ["KUBECONFIG"]).parent.parent
        os.kill(json.loads((state / "run/policies.json").read_text())["pid"], signal.SIGTERM)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # the client asks once where it is
    kubectl = ["kubectl", "apply", "--server-side", "-f", str(ROOT / "manifests/base/crd.yaml")]
    programs = Path(os.environ["KUBECONFIG"]).parent.parent / "bin"
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run(kubectl, check=True, env={**os.environ, "PATH": path})
    ready = ["kubectl", "wait", "--for=condition=Established", f"crd/{PLURAL}.{GROUP}"]
    subprocess.run(ready, check=True, env={**os.environ, "PATH": path})
    print(f"{options.runs} runs x {WORKERS} workers of {GROUP}/{VERSION}")
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
