"""A real cluster for tests: kubectl, helm, and images that are made from the Dockerfile's words."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import yaml

ROOT = Path(__file__).parents[2]
TOOLS = Path(os.environ.get("DEMORESET_TEST_CLUSTER", ROOT.parent / "shared/kubernetes"))
CHART = ROOT / "charts/demoreset"
VENV = Path(sys.prefix)
SYSTEM = "demoreset-system"  # the operator's namespace
OPERATOR, TRAINER = "demoreset-operator:test", "demoreset-trainer:test"
KNOCK = """
import socket, sys
for door in sys.argv[1:]:
    host, port = door.split(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        continue
    print(door)
"""
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
Json = dict[str, Any]
# Where objects are, by kubectl's words for them; of a namespace, of all, or of none.
PATHS = {
    "configmaps": "/api/v1/{}configmaps",
    "crd": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "drr": "/apis/demoreset.dev/v1alpha1/{}demoresetruns",
    "lease": "/apis/coordination.k8s.io/v1/{}leases",
    "networkpolicies": "/apis/networking.k8s.io/v1/{}networkpolicies",
    "poddisruptionbudgets": "/apis/policy/v1/{}poddisruptionbudgets",
    "pods": "/api/v1/{}pods",
    "pv": "/api/v1/persistentvolumes",
    "pvc": "/api/v1/{}persistentvolumeclaims",
    "services": "/api/v1/{}services",
}


class Cluster:
    """A cluster that `environment` leads programs to.

    api: the API server's address for who has no credentials. tools: the program that started the
    cluster, and can lose its nodes; None for somebody else's.
    """

    def __init__(self, environment: dict[str, str], api: str, tools: Path | None) -> None:
        self.environment, self.api, self.tools = environment, api, tools
        self._opener = build_opener(ProxyHandler({}))  # it is this machine's

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        return self.run("kubectl", *arguments, given=given, check=check)

    def helm(self, *arguments: str) -> str:
        return self.run("helm", *arguments)

    def run(self, *command: str, given: str | None = None, check: bool = True) -> str:
        """What a program says that finds the cluster by its environment."""
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, env=self.environment, timeout=400
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout + (done.stderr if not check else "")

    def get(self, namespace: str, kind: str, name: str = "", selector: str = "") -> Any:
        """An object as JSON, or all of a kind as a list, of all namespaces where that is "".

        Tests ask all the time: each start of kubectl would take a core from pods that start.
        """
        path = PATHS[kind].format(f"namespaces/{namespace}/" if namespace else "")
        path += f"/{name}" if name else ""
        path += "?" + urlencode({"labelSelector": selector}) if selector else ""
        try:
            with self._opener.open(self.api + path, timeout=30) as said:
                found = json.load(said)
        except HTTPError as error:
            raise AssertionError(f"GET {path}: {error.read().decode()}") from error
        return found if name else found["items"]

    def apply(self, namespace: str, content: Json | str, check: bool = True) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        return self.kubectl("apply", "-n", namespace, "-f", "-", given=text, check=check)

    def node(self, action: str, name: str) -> None:
        assert self.tools is not None
        _told(self.tools, "node", action, name)


@contextmanager
def reached(
    kubeconfig: Path, programs: Path | None = None, tools: Path | None = None
) -> Iterator[Cluster]:
    """The cluster that a kubeconfig leads to; `programs`: where kubectl and helm are."""
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    if programs is not None:
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    command = ["kubectl", "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said, f"{' '.join(command)} says nothing"
            yield Cluster(environment, "http://" + said.split()[-1], tools)
        finally:
            process.terminate()


def _told(tools: Path, *arguments: str) -> str:
    """What the test cluster's program says; its own words are the error where it fails."""
    done = subprocess.run([tools, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"cluster {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


def until(met: Callable[[], Any], what: str, patience: float = 120.0) -> Any:
    """Wait until something is so; what was found then."""
    deadline = time.monotonic() + patience
    found = None
    while time.monotonic() < deadline:
        if found := met():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {patience:.0f} s: {what}; found {found!r}")


def image(target: str) -> dict[str, Any]:
    """What the Dockerfile says of a target: its entry point, user and environment.

    The images of the test are empty; Python and the packages are this machine's, and so are the
    places of the programs.
    """
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    stages: dict[str, list[str]] = {}
    parents: dict[str, str] = {}
    current: list[str] = []
    for line in text.splitlines():
        if made := re.match(r"FROM (\S+) AS (\S+)", line):
            parents[made[2]] = made[1]
            current = stages[made[2]] = []
        elif line.strip() and not line.startswith("#"):
            current.append(line.strip())
    lines: list[str] = []
    stage: str | None = target
    while stage in stages:
        lines = stages[stage] + lines
        stage = parents[stage]
    found: dict[str, Any] = {"env": {}}
    for line in lines:
        word, _, rest = line.partition(" ")
        match word:
            case "ENTRYPOINT":
                found["entrypoint"] = json.loads(rest)
                if found["entrypoint"][0] == "tini" and shutil.which("tini") is None:
                    del found["entrypoint"][:2]  # it is a Debian package, beside the images' Python
            case "USER":
                found["user"] = rest.strip()
            case "ENV":
                found["env"] |= dict(re.findall(r"(\w+)=(\S+)", rest))
    found["env"]["PATH"] = f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin"
    return found


def make_image(target: str, name: str, **environment: str) -> None:
    """An image of the test cluster for a target of the Dockerfile, with more in its environment."""
    said = image(target)
    said["env"] |= environment
    command = ["image", name, "--user", said["user"].split(":")[0]]
    command += ["--entrypoint", json.dumps(said["entrypoint"]), "--workdir", "/tmp"]
    for key, value in said["env"].items():
        command += ["--env", f"{key}={value}"]
    _told(TOOLS / "cluster", *command)


@contextmanager
def started(nodes: int) -> Iterator[Cluster]:
    """The test cluster, with the images, and this repository and its Python in every pod.

    It fetches packages and starts a dozen programs of others: what fails there once is tried again.
    """
    tools = TOOLS / "cluster"
    command = ["up", "--nodes", str(nodes)]
    for folder in (ROOT, VENV):
        command += ["--share", str(folder)]
    try:
        said = _told(tools, *command)
    except AssertionError:
        _told(tools, "down")
        said = _told(tools, *command)
    kubeconfig = Path(said.strip().splitlines()[-1].removeprefix("export KUBECONFIG="))
    try:
        make_image("operator", OPERATOR)
        make_image("trainer", TRAINER)
        with reached(kubeconfig, kubeconfig.parent.parent / "bin", tools) as cluster:
            yield cluster
    finally:
        _told(tools, "down")


@contextmanager
def installed(cluster: Cluster) -> Iterator[str]:
    """The operator, uninstalled in the end from a cluster that stays; its namespace."""
    yield install(cluster)
    if cluster.tools is None:
        uninstall(cluster)


def images() -> tuple[str, str]:
    """The operator's and the trainer's."""
    operator = os.environ.get("DEMORESET_OPERATOR_IMAGE", OPERATOR)
    return operator, os.environ.get("DEMORESET_TRAINER_IMAGE", TRAINER)


def install(cluster: Cluster) -> str:
    """Install the operator with Helm as a user does it; its namespace."""
    (repository, tag), (trainer, trainer_tag) = (one.rsplit(":", 1) for one in images())
    settings = {
        "image.repository": repository,
        "image.tag": tag,
        "trainer.image.repository": trainer,
        "trainer.image.tag": trainer_tag,
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    cluster.kubectl("create", "namespace", SYSTEM, check=False)
    cluster.kubectl("label", "namespace", SYSTEM, RESTRICTED, "--overwrite")
    cluster.helm(
        *("install", "demoreset", str(CHART), "--namespace", SYSTEM),
        *("--wait", "--timeout", "90s", *given),
    )
    return SYSTEM


def uninstall(cluster: Cluster) -> None:
    """Take it away again."""
    cluster.helm("uninstall", "demoreset", "--namespace", SYSTEM, "--wait")


@contextmanager
def applied(cluster: Cluster, overlay: str, namespace: str, folder: Path) -> Iterator[None]:
    """The operator by kustomize, from a folder of one's own as docs/install.md has it.

    All but the definition of runs: it is there, Helm's, and so are runs.
    """
    (repository, tag), trainer = images()[0].rsplit(":", 1), images()[1]
    environment = [{"name": "DEMORESET_TRAINER_IMAGE", "value": trainer}]
    patch = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "demoreset-operator", "namespace": namespace},
        "spec": {"template": {"spec": {"containers": [{"name": "operator", "env": environment}]}}},
    }
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(ROOT / "manifests/overlays" / overlay, folder.resolve())],
        "images": [{"name": "demoreset-operator", "newName": repository, "newTag": tag}],
        "patches": [{"patch": json.dumps(patch)}],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(content))
    made = yaml.safe_load_all(cluster.kubectl("kustomize", str(folder)))
    items = [one for one in made if one["kind"] != "CustomResourceDefinition"]
    given = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    cluster.kubectl("apply", "--server-side", "-f", "-", given=given)
    try:
        ready = ("rollout", "status", "deployment/demoreset-operator", "--timeout=90s")
        cluster.kubectl(*ready, "-n", namespace)
        yield
    finally:
        cluster.kubectl("delete", "--wait=false", "-f", "-", given=given)


@contextmanager
def stranger(cluster: Cluster, namespace: str) -> Iterator[str]:
    """A pod that has nothing to do with any run; its name."""
    container = {
        "name": "stranger",
        "image": images()[1],
        "command": ["sleep", "300"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger"}, "spec": spec}
    cluster.apply(namespace, body)
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "pod/stranger", "-n", namespace)
        yield "stranger"
    finally:
        cluster.kubectl("delete", "pod", "stranger", "-n", namespace, "--now", "--wait=false")


def reached_by(cluster: Cluster, namespace: str, pod: str, doors: set[str]) -> set[str]:
    """To which of these addresses (host:port) a pod can connect."""
    said = cluster.kubectl("exec", pod, "-n", namespace, "--", "python", "-c", KNOCK, *doors)
    return set(said.split())


def upgrade(cluster: Cluster, chart: Path, *more: str) -> None:
    """Upgrade it to another chart, or with other values."""
    same = ("--namespace", SYSTEM, "--reset-then-reuse-values", "--wait", "--timeout", "90s")
    cluster.helm("upgrade", "demoreset", str(chart), *same, *more)


def operators(cluster: Cluster) -> dict[str, Json]:
    """The operator's pods that are ready and stay, by their names."""
    ready = {"type": "Ready", "status": "True"}
    return {
        body["metadata"]["name"]: body
        for body in cluster.get(SYSTEM, "pods", selector="app.kubernetes.io/component=operator")
        if "deletionTimestamp" not in body["metadata"]
        and any(ready.items() <= one.items() for one in body["status"].get("conditions", ()))
    }


def begun(pods: dict[str, Json]) -> set[tuple[str, int]]:
    """Which containers these are: their pods, and how often the kubelet started them again."""
    return {
        (name, container["restartCount"])
        for name, body in pods.items()
        for container in body["status"].get("containerStatuses", ())
    }


def leader(cluster: Cluster) -> str:
    """The operator's pod that acts; "" where none does."""
    found = cluster.get(SYSTEM, "lease", "demoreset-operator")
    return str(found["spec"].get("holderIdentity", ""))
