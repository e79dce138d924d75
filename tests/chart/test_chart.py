"""The Helm chart, by what it renders."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from demoreset_api import names
from demoreset_api.spec import DemoResetRun
from demoreset_operator import main
from demoreset_operator.render import DNS_PORTS

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/demoreset"

Object = dict[str, Any]
Run = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[Object]]

EVERYTHING = (
    *("replicas=2", "namespaces={one,two}", "logFormat=text", "image.pullSecrets={secret}"),
    *("podMonitor.enabled=true", "prometheusRule.enabled=true", "dashboards.enabled=true"),
    *("networkPolicy.enabled=true", "priorityClassName=high", "podLabels.a=b"),
    *("podAnnotations.c=d", "nodeSelector.e=f", "tolerations[0].operator=Exists"),
    *("affinity.nodeAffinity.g=h", "serviceAccount.annotations.i=j", "service.annotations.k=l"),
)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def the(objects: list[Object], kind: str) -> Object:
    (one,) = of_kind(objects, kind)
    return one


def container(objects: list[Object]) -> Object:
    (one,) = the(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one


def environment(objects: list[Object]) -> dict[str, str | None]:
    return {one["name"]: one.get("value") for one in container(objects)["env"]}


def test_the_linter_has_nothing_to_say(helm: Run) -> None:
    said = helm("lint", "--strict", str(CHART))
    assert said.returncode == 0, said.stdout
    assert "[" not in said.stdout


def test_the_linter_has_nothing_to_say_with_everything_on(helm: Run) -> None:
    flags = [part for one in EVERYTHING for part in ("--set", one)]
    said = helm("lint", "--strict", str(CHART), *flags)
    assert said.returncode == 0, said.stdout
    assert "[" not in said.stdout


def test_the_run_of_the_notes_can_be_pasted_into_a_shell(helm: Run) -> None:
    said = helm("install", "demoreset", str(CHART), "--dry-run=client").stdout
    notes = said.partition("NOTES:")[2]
    pasted = re.search(r"^ *kubectl apply .*?^ *RUN$", notes, re.DOTALL | re.MULTILINE)
    assert pasted is not None
    script = "kubectl() { cat; }\n" + pasted[0] + "\n"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ran.stderr == ""
    DemoResetRun.model_validate(yaml.safe_load(ran.stdout))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("replica=1", "replica"),
        ("image.name=x", "name"),
        ("trainer.tag=x", "tag"),
        ("crds.install=true", "install"),
        ("resources.request.cpu=1", "request"),
        ("replicas=3", "replicas"),
        ("replicas=one", "replicas"),
        ("namespaces=one", "namespaces"),
        ("namespaces={One}", "namespaces"),
        ("namespaces={one,one}", "namespaces"),
        ("logFormat=xml", "logFormat"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.repository=", "repository"),
        ("trainer.image.repository=mine/trainer@sha256:" + "0" * 64, "repository"),
        ("podMonitor.enabled=yes", "enabled"),
        ("podMonitor.interval=15", "interval"),
        ("networkPolicy.apiServerPorts={0}", "apiServerPorts"),
        ("podLabels.a=1", "podLabels"),
    ],
)
def test_a_value_that_is_unknown_or_wrong_is_refused_by_name(
    helm: Run, setting: str, named: str
) -> None:
    said = helm("template", "demoreset", str(CHART), "--set", setting)
    assert said.returncode != 0
    assert named in said.stderr


def test_every_value_may_be_left_out_and_no_other_one_is_known() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(node: Object, value: Any, path: str) -> None:
        assert "required" not in node, path
        if "properties" in node:
            assert node["additionalProperties"] is False, path
            others = {"claims"} if path else {"global", "enabled"}  # Kubernetes', and Helm's own
            known = set(node["properties"]) - others
            assert known == set(value), path
            for name in known:
                compare(node["properties"][name], value[name], f"{path}.{name}")

    compare(schema, values, "")


def test_a_cluster_that_is_too_old_is_refused(helm: Run) -> None:
    said = helm("template", "demoreset", str(CHART), "--kube-version", "1.28.0")
    assert said.returncode != 0
    assert "kubeVersion" in said.stderr


def test_objects_carry_the_standard_labels(render: Render) -> None:
    for one in render(*EVERYTHING):
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "demoreset", one["metadata"]["name"]
        assert labels["app.kubernetes.io/instance"] == "demoreset"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"] == "0.1.0"
        assert labels["helm.sh/chart"] == "demoreset-0.1.0"


def test_names_follow_the_release(helm: Run) -> None:
    made = helm("template", "mine", str(CHART), "--namespace", "there")
    objects = [one for one in yaml.safe_load_all(made.stdout) if one]
    assert the(objects, "Deployment")["metadata"]["name"] == "mine-demoreset-operator"
    assert all(
        one["metadata"].get("namespace", "there") == "there"
        and one["metadata"]["name"].startswith(("mine-demoreset", "demoresetruns."))
        for one in objects
    )


def test_names_can_be_chosen(render: Render) -> None:
    objects = render("fullnameOverride=other", "serviceAccount.name=account")
    assert the(objects, "Deployment")["metadata"]["name"] == "other-operator"
    assert the(objects, "ServiceAccount")["metadata"]["name"] == "account"
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        assert the(objects, kind)["subjects"][0]["name"] == "account"


def test_an_account_that_exists_is_not_made(render: Render) -> None:
    objects = render("serviceAccount.create=false", "serviceAccount.name=theirs")
    assert not of_kind(objects, "ServiceAccount")
    pod = the(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "theirs"


@pytest.mark.parametrize("replicas", [1, 2])
def test_operators_go_one_by_one_and_need_no_room_for_one_more(
    render: Render, replicas: int
) -> None:
    spec = the(render(f"replicas={replicas}"), "Deployment")["spec"]
    assert spec["replicas"] == replicas
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }


def test_two_operators_are_on_two_nodes_where_there_are_two(render: Render) -> None:
    spec = the(render("replicas=2"), "Deployment")["spec"]
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == spec["selector"]


def test_an_operator_leaves_a_lost_node_within_seconds(render: Render) -> None:
    pod = the(render(), "Deployment")["spec"]["template"]["spec"]
    assert {one["key"]: one["tolerationSeconds"] for one in pod["tolerations"]} == {
        "node.kubernetes.io/not-ready": 15,
        "node.kubernetes.io/unreachable": 15,
    }


def test_the_operator_is_told_what_it_reads(render: Render) -> None:
    objects = render("namespaces={one,two}", "logFormat=text", "trainer.image.pullPolicy=Always")
    told = environment(objects)
    assert told == {
        main.ENV_POD_NAME: None,
        main.ENV_POD_NAMESPACE: None,
        main.ENV_NAMESPACES: "one,two",
        main.ENV_TRAINER_IMAGE: "demoreset-trainer:0.1.0",
        main.ENV_TRAINER_PULL_POLICY: "Always",
        main.ENV_LOG_FORMAT: "text",
    }
    (port,) = container(objects)["ports"]
    assert port["containerPort"] == names.OPERATOR_PORT


def test_images_can_be_pinned(render: Render) -> None:
    digest = "0.2.0@sha256:" + "a" * 64
    objects = render("image.repository=my/operator", f"image.tag={digest}")
    assert container(objects)["image"] == f"my/operator:{digest}"
    assert the(objects, "Pod")["spec"]["containers"][0]["image"] == f"my/operator:{digest}"


def test_all_namespaces_need_a_cluster_role(render: Render) -> None:
    objects = render("rbac.aggregate=false")
    (role,) = of_kind(objects, "ClusterRole")
    (lease,) = of_kind(objects, "Role")
    assert lease["metadata"]["namespace"] == "demoreset-system"
    assert {group for rule in lease["rules"] for group in rule["apiGroups"]} == {
        "coordination.k8s.io"
    }
    assert the(objects, "ClusterRoleBinding")["roleRef"]["name"] == role["metadata"]["name"]
    assert environment(objects)[main.ENV_NAMESPACES] == ""


def test_chosen_namespaces_have_a_role_each_and_nothing_reaches_over_them(render: Render) -> None:
    objects = render("namespaces={one,two}", "rbac.aggregate=false")
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")
    places = [("one", "demoreset-operator"), ("two", "demoreset-operator")]
    places.append(("demoreset-system", "demoreset-operator-lease"))
    for kind in ("Role", "RoleBinding"):
        found = [
            (one["metadata"]["namespace"], one["metadata"]["name"])
            for one in of_kind(objects, kind)
        ]
        assert found == places
    assert all(
        one["subjects"][0]["namespace"] == "demoreset-system"
        for one in of_kind(objects, "RoleBinding")
    )


def test_a_role_and_a_cluster_role_say_the_same(render: Render) -> None:
    wide = the(render("rbac.aggregate=false"), "ClusterRole")
    narrow = of_kind(render("namespaces={one}"), "Role")[0]
    assert wide["rules"] == narrow["rules"]


def test_the_operator_may_not_read_secrets_nor_do_everything(render: Render) -> None:
    for one in of_kind(render(), "ClusterRole") + of_kind(render(), "Role"):
        for rule in one["rules"]:
            assert not {"secrets", "nodes", "namespaces", "*"} & set(rule["resources"])
            assert "*" not in rule["verbs"] + rule["apiGroups"]


def test_the_lease_is_the_one_that_the_operator_takes(render: Render) -> None:
    (lease,) = of_kind(render(), "Role")
    assert lease["rules"][1]["resourceNames"] == [names.LEASE]


def test_who_may_view_or_edit_may_do_so_with_runs(render: Render) -> None:
    roles = {one["metadata"]["name"]: one for one in of_kind(render(), "ClusterRole")}
    viewer, editor = roles["demoreset-viewer"], roles["demoreset-editor"]
    to = "rbac.authorization.k8s.io/aggregate-to-"
    assert [
        who for who in ("view", "edit", "admin") if to + who in viewer["metadata"]["labels"]
    ] == [*("view", "edit", "admin")]
    assert [
        who for who in ("view", "edit", "admin") if to + who in editor["metadata"]["labels"]
    ] == [*("edit", "admin")]
    assert {verb for rule in viewer["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}


def test_runs_outlive_the_chart_unless_asked_otherwise(render: Render) -> None:
    kept = the(render(), "CustomResourceDefinition")["metadata"]
    assert kept["annotations"] == {"helm.sh/resource-policy": "keep"}
    gone = the(render("crds.keep=false"), "CustomResourceDefinition")["metadata"]
    assert "annotations" not in gone


def test_the_definition_can_be_left_to_somebody_else(render: Render) -> None:
    assert not of_kind(render("crds.enabled=false"), "CustomResourceDefinition")


@pytest.mark.parametrize("settings", [(), EVERYTHING])
def test_pods_are_restricted(render: Render, settings: tuple[str, ...]) -> None:
    objects = render(*settings)
    pods = [the(objects, "Pod")["spec"], the(objects, "Deployment")["spec"]["template"]["spec"]]
    for pod in pods:
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for one in pod["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["resources"]["requests"]
            assert one["resources"]["limits"]["memory"]


def test_what_is_set_for_pods_reaches_them(render: Render) -> None:
    objects = render(*EVERYTHING)
    template = the(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["labels"]["a"] == "b"
    assert template["metadata"]["annotations"]["c"] == "d"
    pod = template["spec"]
    assert pod["nodeSelector"] == {"e": "f"}
    assert pod["tolerations"][2:] == [{"operator": "Exists"}]
    assert pod["affinity"] == {"nodeAffinity": {"g": "h"}}
    assert pod["priorityClassName"] == "high"
    assert pod["imagePullSecrets"] == [{"name": "secret"}]
    assert the(objects, "ServiceAccount")["metadata"]["annotations"] == {"i": "j"}
    assert the(objects, "Service")["metadata"]["annotations"] == {"k": "l"}


def test_labels_of_pods_cannot_hide_them_from_their_service(render: Render) -> None:
    objects = render("podLabels.app\\.kubernetes\\.io/component=x")
    deployment = the(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        the(objects, "Service")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()


def test_what_needs_another_operator_is_off(render: Render) -> None:
    kinds = {one["kind"] for one in render()}
    assert not kinds & {"PodMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy"}


def test_workers_are_scraped_on_the_port_that_they_have(render: Render) -> None:
    from demoreset_operator import pods

    operator, runs = of_kind(render("podMonitor.enabled=true"), "PodMonitor")
    (endpoint,) = operator["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    assert endpoint["port"] == container(render())["ports"][0]["name"]
    (endpoint,) = runs["spec"]["podMetricsEndpoints"]
    source = Path(pods.__file__).read_text()
    assert f'{{"name": "{endpoint["port"]}", "containerPort": METRICS_PORT}}' in source
    assert runs["spec"]["namespaceSelector"] == {"any": True}
    selector = runs["spec"]["selector"]
    assert selector["matchLabels"] == {names.LABEL_COMPONENT: names.COMPONENT_WORKER}
    assert selector["matchExpressions"] == [{"key": names.LABEL_RUN, "operator": "Exists"}]
    relabelled = {one["sourceLabels"][0]: one["targetLabel"] for one in endpoint["relabelings"]}
    assert relabelled == {
        "__meta_kubernetes_pod_label_" + re.sub(r"[^a-z]", "_", label): target
        for label, target in ((names.LABEL_RUN, "run"), (names.LABEL_WORKER, "worker"))
    }


def test_only_chosen_namespaces_are_scraped(render: Render) -> None:
    _, runs = of_kind(render("podMonitor.enabled=true", "namespaces={one,two}"), "PodMonitor")
    assert runs["spec"]["namespaceSelector"] == {"matchNames": ["one", "two"]}


@pytest.mark.parametrize(
    ("section", "kind"), [("podMonitor", "PodMonitor"), ("prometheusRule", "PrometheusRule")]
)
def test_prometheus_selects_by_labels_of_ones_own(render: Render, section: str, kind: str) -> None:
    for one in of_kind(render(f"{section}.enabled=true", f"{section}.labels.release=x"), kind):
        assert one["metadata"]["labels"]["release"] == "x"


def test_alerts_are_those_of_the_file_and_point_to_the_runbook(render: Render) -> None:
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    settings = ("prometheusRule.enabled=true", "prometheusRule.runbook=https://docs/ops")
    made = the(render(*settings), "PrometheusRule")["spec"]
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = rule["expr"].replace(
                "_is_leader", '_is_leader{namespace="demoreset-system"}'
            )
            url = rule["annotations"]["runbook_url"]
            rule["annotations"]["runbook_url"] = url.replace(
                "docs/operations.md", "https://docs/ops"
            )
    assert made == rules


def test_dashboards_are_those_of_the_files(render: Render) -> None:
    settings = ("dashboards.enabled=true", "dashboards.annotations.grafana_folder=Training")
    made = of_kind(render(*settings), "ConfigMap")
    assert [one["metadata"]["name"] for one in made] == [
        *("demoreset-dashboard-run", "demoreset-dashboard-fleet")
    ]
    for one in made:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "Training"}
        ((name, text),) = one["data"].items()
        file = CHART / "files" / name.replace("demoreset-", "dashboard-")
        assert json.loads(text) == json.loads(file.read_text())


def test_a_policy_lets_the_operator_reach_what_it_needs(render: Render) -> None:
    policy = the(
        render("networkPolicy.enabled=true", "networkPolicy.apiServerPorts={8443}"), "NetworkPolicy"
    )["spec"]
    labels = the(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    ports = [one["port"] for rule in policy["egress"] for one in rule["ports"]]
    dns = [port for port in DNS_PORTS for _ in ("UDP", "TCP")]  # as those of runs
    assert ports == [*dns, 8443, names.METRICS_PORT]


def test_the_test_pod_asks_in_a_namespace_that_it_may_see(render: Render) -> None:
    (asked,) = the(render(), "Pod")["spec"]["containers"]
    (narrow,) = the(render("namespaces={one,two}"), "Pod")["spec"]["containers"]
    base = f"/apis/{names.GROUP}/{names.VERSION}"
    assert asked["env"][0]["value"] == f"{base}/{names.PLURAL}"
    assert narrow["env"][0]["value"] == f"{base}/namespaces/one/{names.PLURAL}"
    lease = f"/apis/coordination.k8s.io/v1/namespaces/demoreset-system/leases/{names.LEASE}"
    assert asked["env"][1]["value"] == narrow["env"][1]["value"] == lease
    assert asked["env"][2]["value"] == "http://demoreset-operator.demoreset-system:8080"
    (script,) = asked["args"]
    assert script.strip() == (CHART / "files/installed.py").read_text().strip()


def test_the_notes_say_what_to_do_next(helm: Run) -> None:
    made = helm(
        *("install", "demoreset", str(CHART), "--namespace", "there", "--dry-run=client"),
        *("--set", "namespaces={mine}"),
    )
    assert made.returncode == 0, made.stderr
    notes = made.stdout.partition("NOTES:")[2]
    assert "helm test demoreset --namespace there" in notes
    assert "kubectl apply --namespace mine" in notes
    assert "kubectl get demoresetruns --namespace mine --watch" in notes


def test_the_notes_need_no_list_of_namespaces(helm: Run) -> None:
    made = helm("install", "demoreset", str(CHART), "--dry-run=client", "--set", "namespaces=null")
    assert made.returncode == 0, made.stderr
    assert "kubectl apply --namespace default" in made.stdout.partition("NOTES:")[2]


def test_the_run_that_artifact_hub_shows_is_one() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    for run in yaml.safe_load(chart["annotations"]["artifacthub.io/crdsExamples"]):
        DemoResetRun.model_validate(run)
