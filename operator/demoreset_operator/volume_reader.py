"""A pod through which a run's volume is read, where the cluster has the volume and we do not."""

import json
import secrets
import subprocess
import sys
import time

from demoreset_api.errors import UserError
from demoreset_api.names import ANNOTATION_IMAGE, COMPONENT_WORKER, LABEL_COMPONENT, LABEL_RUN_UID
from demoreset_operator import story
from demoreset_operator.kubectl import Kubectl, runs
from demoreset_operator.observation import Json, Run, trouble
from demoreset_operator.pods import worker
from demoreset_operator.render import DATA, Settings, claim_name
from demoreset_operator.why import missing_claim

LIFE_SECONDS = 4 * 3600  # that a pod which reads a volume lives at most
WAIT_SECONDS = 600.0  # for it to begin
POLL_SECONDS = 2.0
RESOURCES = {  # all four: a quota refuses pods that lack one which it counts
    "requests": {"cpu": "100m", "memory": "64Mi"},
    "limits": {"cpu": "1", "memory": "256Mi"},
}
# What matches a pattern; nothing where there is none.
FIND = "ls -d $0 2> /dev/null || true"


class VolumeReader:
    """A pod that sees the run's volume: a worker that runs, else one that is made for it.

    Also a worker of another run, as of a branch: its node may be the only one that can have it.
    """

    def __init__(self, kubectl: Kubectl, run: Run, image: str | None) -> None:
        """The image is that of a pod that may have to be made; None is the run's own."""
        self._kubectl, self._run, self._image = kubectl, run, image
        self._pod, self.made, self._container = "", False, "worker"

    def __enter__(self) -> "VolumeReader":
        # A component of that name may be somebody else's; ours have a run.
        selector = f"{LABEL_COMPONENT}={COMPONENT_WORKER},{LABEL_RUN_UID}"
        found = self._kubectl.get("pods", "-l", selector)
        sees = [body for body in found["items"] if claim_name(self._run) in _claims(body)]
        own = [body for body in sees if body["metadata"]["labels"][LABEL_RUN_UID] == self._run.uid]
        # Workers of a run that is over are about to end, in the middle of what is read.
        last = own if story.over(self._run.status) else []
        for body in (*own, *sees):
            if runs(body) and body not in last:
                self._pod = body["metadata"]["name"]
                return self
        like = own[-1] if own and self._image is None else self._worker()
        self._pod, self.made = f"{self._run.name}-reader-{secrets.token_hex(3)}", True
        self._container = "reader"
        body = _pod_like(self._pod, like, self._run)
        self._kubectl.run("create", "-f", "-", given=json.dumps(body))
        print(f"kubectl demoreset: waiting for the pod {self._pod}", file=sys.stderr)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _worker(self) -> Json:
        """A worker's pod as the operator would make it, with the image that is known best."""
        image = self._image or self._run.spec.workers.image or self._told()
        if image is None:
            raise UserError(
                f"{self._run.name} has no pod now, and so no image is known that could read its "
                f"volume: name a trainer's with --image, or mount the claim "
                f"{claim_name(self._run)} in a pod of your own; its folder there is "
                f"{self._run.name}"
            )
        pod = worker(self._run, Settings(image), 0, 0)
        pod["spec"]["containers"][0]["image"] = image  # also of a run that names its own
        return pod

    def _told(self) -> str | None:
        """The image that the operator would take, as it wrote down beside the run file."""
        try:
            found = self._kubectl.get("configmaps", "-l", f"{LABEL_RUN_UID}={self._run.uid}")
        except UserError:  # of whom may not read them
            return None
        files: list[Json] = [body["metadata"] for body in found["items"]]
        newest = max(files, key=lambda meta: str(meta["creationTimestamp"]), default={})
        return (newest.get("annotations") or {}).get(ANNOTATION_IMAGE)

    def _wait(self) -> None:
        """Wait until the pod that was made has begun, and say what it waits for."""
        until, said = time.monotonic() + WAIT_SECONDS, ""
        while True:
            status = self._kubectl.get("pod", self._pod).get("status") or {}
            if status.get("phase") == "Running":
                return
            words = ": ".join(filter(None, trouble(status, self._container)))
            over = status.get("phase") in ("Succeeded", "Failed") or time.monotonic() > until
            if over or missing_claim(words):
                words = words or status.get("phase", "Pending")
                raise UserError(f"the pod {self._pod} does not begin: {words}")
            if words and words != said:
                print(f"kubectl demoreset: it waits: {words}", file=sys.stderr)
                said = words
            time.sleep(POLL_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self.made:
            self._kubectl.run("delete", "pod", self._pod, "--wait=false")

    def command(self, *arguments: str) -> list[str]:
        """A command that runs in the pod."""
        return self._kubectl.command("exec", self._pod, "-c", self._container, "--", *arguments)

    def needs(self, what: str) -> None:
        """Refuse to go on where the run's folder has no such file: nothing was saved yet."""
        if not self.run("sh", "-c", FIND, f"{DATA}/{self._run.name}/{what}"):
            best = "best " if what.endswith("BEST") else ""
            raise UserError(f"{self._run.name} has no {best}checkpoint yet")

    def run(self, *arguments: str) -> bytes:
        """What a command in the pod says."""
        done = subprocess.run(self.command(*arguments), capture_output=True)
        if done.returncode:
            raise UserError(done.stderr.decode().strip() or f"{arguments[0]} failed")
        return done.stdout


def _claims(pod: Json) -> list[str]:
    """The claims whose volumes a pod sees."""
    volumes = (one.get("persistentVolumeClaim", {}) for one in pod["spec"].get("volumes", []))
    return [one["claimName"] for one in volumes if one]


def _pod_like(name: str, worker: Json, run: Run) -> Json:
    """A pod like a worker's of this run, that only waits."""
    spec, more = worker["spec"], run.spec.workers  # its labels are not a worker's: nobody counts it
    nodes = {k: v for k, v in (spec.get("affinity") or {}).items() if k == "nodeAffinity"}
    container = next(one for one in spec["containers"] if one["name"] == "worker")
    kept = ("image", "imagePullPolicy", "securityContext")
    seen = ("data", "tmp")  # its run file may be gone
    wait: Json = {
        "command": ["sleep", str(LIFE_SECONDS)],
        "name": "reader",
        "resources": RESOURCES,
        "volumeMounts": [one for one in container["volumeMounts"] if one["name"] in seen],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": run.namespace,
            "labels": more.common_labels,
            "annotations": more.common_annotations,
        },
        "spec": {
            "containers": [{**{key: container[key] for key in kept if key in container}, **wait}],
            "volumes": [one for one in spec["volumes"] if one["name"] in seen],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "activeDeadlineSeconds": LIFE_SECONDS,
            **({"affinity": nodes} if nodes else {}),
            **{
                key: spec[key]
                for key in (
                    *("securityContext", "imagePullSecrets", "nodeSelector"),
                    *("tolerations", "automountServiceAccountToken"),
                )
                if key in spec
            },
        },
    }
