"""The manifests against the API's schemas, the restricted Pod Security Standard and themselves."""

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

BASE = Path(__file__).parents[2] / "deploy" / "k8s" / "base"
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
FILES = sorted(path for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")
RESOURCES = [resource for path in FILES for resource in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {r["metadata"]["name"]: r for r in RESOURCES if r["kind"] == kind}


DEPLOYMENTS = of_kind("Deployment")
each_deployment = pytest.mark.parametrize("name", DEPLOYMENTS)


def pod_of(name: str) -> dict[str, Any]:
    return dict(DEPLOYMENTS[name]["spec"]["template"]["spec"])


def labels_of(name: str) -> dict[str, str]:
    return dict(DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"])


def selected(selector: dict[str, str]) -> set[str]:
    return {name for name in DEPLOYMENTS if selector.items() <= labels_of(name).items()}


def validate(resource: dict[str, Any], version: str = NEWEST) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize(
    "resource", RESOURCES, ids=lambda r: f"{r['kind']}-{r['metadata']['name']}"
)
def test_every_resource_keeps_to_its_schema(resource: dict[str, Any], version: str) -> None:
    validate(resource, version)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("spec", "template", "spec"), "terminationGracePeriod", 90),
        (("spec", "template", "spec", "containers", 0, "readinessProbe"), "period", 5),
        (("spec",), "replicas", "two"),
    ],
)
def test_a_broken_copy_is_caught(place: tuple[Any, ...], key: str, value: Any) -> None:
    broken = copy.deepcopy(DEPLOYMENTS["gateway"])
    spot = broken
    for part in place:
        spot = spot[part]
    spot[key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


def test_kustomization_names_every_file() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in FILES]
    assert kustomization["namespace"] in of_kind("Namespace")


@each_deployment
def test_pods_are_restricted(name: str) -> None:
    pod = pod_of(name)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] in of_kind("ServiceAccount")
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@each_deployment
def test_volumes_are_mounted_and_bounded(name: str) -> None:
    pod = pod_of(name)
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["tmp"]["mountPath"] == "/tmp"  # HOME and the caches of the image
    for volume in volumes.values():
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"]
        else:
            assert volume["persistentVolumeClaim"]["claimName"] in of_kind("PersistentVolumeClaim")
            assert volume["persistentVolumeClaim"]["readOnly"]
            assert mounts[volume["name"]]["readOnly"]


@each_deployment
def test_pods_have_time_to_drain(name: str) -> None:
    pod = pod_of(name)
    (container,) = pod["containers"]
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    if name == "gateway":
        (drain,) = [e["value"] for e in container["env"] if e["name"] == "CAST_SHUTDOWN_GRACE_S"]
    else:
        drain = container["args"][container["args"].index("--shutdown-timeout") + 1]
    assert pre_stop_s == 15
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + int(drain)


def test_the_gateways_probes_are_three_different_questions() -> None:
    (container,) = pod_of("gateway")["containers"]
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    paths = [container[probe]["httpGet"]["path"] for probe in probes]
    assert paths == ["/startupz", "/readyz", "/livez"]


def test_the_variants_differ_in_their_name_alone() -> None:
    dense, sparse = ((BASE / f"worker-{name}.yaml").read_text() for name in ("dense", "sparse"))
    renamed = (
        dense.replace("sparse", "-").replace("dense", "sparse").replace("-.yaml", "dense.yaml")
    )
    assert renamed.splitlines()[2:] == sparse.splitlines()[2:]


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_each_deployment_has_its_own(kind: str) -> None:
    found = of_kind(kind)
    assert set(found) == set(DEPLOYMENTS)
    for name, resource in found.items():
        selector = resource["spec"]["selector"]
        assert selected(selector.get("matchLabels", selector)) == {name}


@each_deployment
def test_selectors_ports_and_images_agree(name: str) -> None:
    spec = DEPLOYMENTS[name]["spec"]
    assert selected(spec["selector"]["matchLabels"]) == {name}
    (container,) = spec["template"]["spec"]["containers"]
    (port,) = container["ports"]
    (service_port,) = of_kind("Service")[name]["spec"]["ports"]
    assert service_port["port"] == port["containerPort"]
    assert service_port["targetPort"] == port["name"]
    _, _, tag = container["image"].partition(":")
    assert tag
    assert tag != "latest"


def test_only_the_needed_connections_are_open() -> None:
    policies = of_kind("NetworkPolicy")
    assert set(policies) == {"default-deny", "gateway", "worker"}
    assert policies["default-deny"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    worker, gateway = policies["worker"]["spec"], policies["gateway"]["spec"]
    assert selected(worker["podSelector"]["matchLabels"]) == {"worker-dense", "worker-sparse"}
    assert selected(gateway["podSelector"]["matchLabels"]) == {"gateway"}
    assert "egress" not in worker
    (rule,) = worker["ingress"]
    assert selected(rule["from"][0]["podSelector"]["matchLabels"]) == {"gateway"}
    assert rule["ports"] == gateway["egress"][0]["ports"] == [{"port": 8001, "protocol": "TCP"}]
    to_workers = gateway["egress"][0]["to"][0]["podSelector"]["matchLabels"]
    assert selected(to_workers) == {"worker-dense", "worker-sparse"}
