"""A run, as kubectl tells of it."""

import json
import re
from pathlib import Path
from typing import Any

from kube import SYSTEM, Cluster, until

RUN = "freeway-crossing"  # the bundled run that is learned soonest
# On one machine: with one thread each they do not wait for one another.
CORE = {"requests": {"cpu": "500m"}, "limits": {"cpu": 1}}


def kill(cluster: Cluster, namespace: str, pod: str) -> None:
    """Kill all of a pod's processes; a deletion, also one without grace, would ask them first."""
    cluster.kubectl("exec", pod, "-n", namespace, "--", "sh", "-c", "kill -9 -1", check=False)


def scene(cluster: Cluster, namespace: str) -> str:
    """What is in a namespace, and what the operator and the pods there have said last."""

    def asked(*arguments: str, width: int = 4000) -> str:
        # Where nobody answers, this must not keep the tests that are left.
        said = cluster.kubectl(*arguments, "--request-timeout=20s", check=False)
        lines = [line[:width] for line in said.splitlines()]
        return "\n".join([f"$ kubectl {' '.join(arguments)}", *lines])

    def logs(place: str, selector: str) -> str:
        return asked("logs", "-n", place, "-l", selector, "--prefix", "--tail=200", width=300)

    return "\n".join(
        [
            asked("get", "drr,pods,events", "-n", namespace, "-o", "wide"),
            asked("get", "drr", "-n", namespace, "-o", "jsonpath={.items[*].status}"),
            asked("get", "pods", "-n", SYSTEM, "-o", "wide"),
            logs(SYSTEM, "app.kubernetes.io/component=operator"),
            logs(namespace, "demoreset.dev/run"),
        ]
    )


class Told:
    """A run, as kubectl tells of it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name

    @property
    def body(self) -> dict[str, Any]:
        return dict(self.cluster.get(self.namespace, "drr", self.name))

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.body.get("status") or {})

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def update(self) -> int:
        return int((self.status.get("training") or {}).get("update", 0))

    def pods(self, component: str = "worker") -> dict[str, dict[str, Any]]:
        selector = f"demoreset.dev/run={self.name},app.kubernetes.io/component={component}"
        found = self.cluster.get(self.namespace, "pods", selector=selector)
        return {body["metadata"]["name"]: body for body in found}

    def live(self) -> list[str]:
        return [
            name
            for name, body in self.pods().items()
            if body["status"]["phase"] == "Running" and "deletionTimestamp" not in body["metadata"]
        ]

    def ready(self, count: int, patience: float = 240) -> None:
        until(
            lambda: (
                self.status.get("workers", {}).get("shown") == f"{count}/{count}"
                and self.status["workers"]["members"] == count
            ),
            f"{count} workers train together",
            patience,
        )

    def goes_on(self, patience: float = 150) -> None:
        """Two more updates are done: by a worker's own word, for the status is seconds behind."""
        before = until(self.done, "the first update", patience)
        until(lambda: self.done() > before + 1, f"updates beyond {before}", patience)

    def done(self) -> int:
        """Updates that the first member has put into the run's metrics; 0 where nobody can say."""
        if not (live := self.live()):
            return 0
        if (folder := self.folder()) is not None:
            file = folder / "metrics.jsonl"
            said = "".join(file.read_text().splitlines()[-1:]) if file.exists() else ""
        else:
            command = ("tail", "-n", "1", f"/data/{self.name}/metrics.jsonl")
            where = ("exec", live[0], "-n", self.namespace, "--")
            said = self.cluster.kubectl(*where, *command, check=False)
        found = re.search(r'"update": ?(\d+)', said)
        return int(found[1]) if found else 0

    def history(self) -> list[dict[str, Any]]:
        """What the run has told of its updates, life by life; of one that was done again the last.

        Nothing where the volume is on another machine.
        """
        if (folder := self.folder()) is None:
            return []
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        told = {(line["life"], line["update"]): line for line in lines}
        return [told[which] for which in sorted(told)]

    def saved(self) -> Path | None:
        """The latest checkpoint; None where the volume is on another machine."""
        folder = self.folder()
        return max(folder.glob("checkpoints/ckpt-*")) if folder is not None else None

    def folder(self) -> Path | None:
        """The run's folder, where it is on this machine: volumes of the test cluster are."""
        if self.cluster.tools is None:
            return None
        name = self.body["spec"]["checkpoint"]["volume"].get("claim", f"{self.name}-data")
        claim = self.cluster.get(self.namespace, "pvc", name)
        volume = self.cluster.get("", "pv", claim["spec"]["volumeName"])
        return Path(volume["spec"]["hostPath"]["path"]) / self.name

    @property
    def life(self) -> int:
        """How often the run was read from the disk: a live worker looks at the folder."""
        folder = f"/data/{self.name}/checkpoints"
        said = self.cluster.kubectl(
            "exec", self.live()[0], "-n", self.namespace, "--", "ls", folder
        )
        return max(int(number) for number in re.findall(r"^life-(\d+)$", said, re.MULTILINE))

    def delete(self, name: str) -> None:
        command = ["delete", "pod", name, "-n", self.namespace]
        self.cluster.kubectl(*command, "--grace-period=0", "--force")

    def kill(self, name: str) -> None:
        kill(self.cluster, self.namespace, name)

    def patch(self, **spec: Any) -> None:
        patch = json.dumps({"spec": spec})
        command = ["patch", "drr", self.name, "-n", self.namespace, "--type=merge", "-p", patch]
        self.cluster.kubectl(*command)

    def condition(self, kind: str) -> dict[str, Any]:
        found = [one for one in self.status.get("conditions", []) if one["type"] == kind]
        return found[0] if found else {}
