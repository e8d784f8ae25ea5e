"""The rendered manifests against what is expected of a deployment, and against each other."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from cast_serve.gateway.settings import GatewaySettings
from cast_serve.worker_key import OPEN_PATHS

Resource = dict[str, Any]
Rendered = dict[str, list[Resource]]
Named = dict[tuple[str, str], Resource]


def templates(resources: list[Resource]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template by a name for it."""
    for resource in resources:
        name = resource["metadata"]["name"]
        if resource["kind"] == "Deployment":
            yield name, resource["spec"]["template"]
        elif resource["kind"] == "LeaderWorkerSet":
            for role in ("leader", "worker"):
                yield f"{name} {role}", resource["spec"]["leaderWorkerTemplate"][f"{role}Template"]


def every_template(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    for overlay, resources in rendered.items():
        found = dict(templates(resources))
        assert len(found) >= 3, overlay  # the gateway and two workers
        for name, template in found.items():
            yield f"{overlay}: {name}", template


def kind(resources: list[Resource], wanted: str) -> dict[str, Resource]:
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == wanted}


def selected(resources: list[Resource], labels: dict[str, str]) -> set[str]:
    """The pods with these labels; the label that a LeaderWorkerSet's controller adds left out."""
    own = {key: value for key, value in labels.items() if "leaderworkerset" not in key}
    return {n for n, t in templates(resources) if own.items() <= t["metadata"]["labels"].items()}


def test_pods_are_restricted(rendered: Rendered) -> None:
    for name, template in every_template(rendered):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        for bound in ("requests", "limits"):
            wanted = {"cpu", "memory", "ephemeral-storage"}
            assert wanted <= set(container["resources"][bound]), name


def test_accounts_exist_and_hold_no_token(cpu: Named, rendered: Rendered) -> None:
    for name, template in every_template(rendered):
        account = cpu["ServiceAccount", template["spec"]["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is False, name


def test_volumes_are_mounted_and_bounded(rendered: Rendered) -> None:
    for name, template in every_template(rendered):
        (container,) = template["spec"]["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert set(mounts) == set(volumes), name
        assert mounts["tmp"]["mountPath"] == "/tmp", name  # HOME and the caches of the image
        for volume in volumes.values():
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], name
            elif volume["name"] == "compiled":  # components/compile-cache
                assert container["name"] == "worker", name
                assert mounts["compiled"]["subPathExpr"] == "$(VARIANT)", name  # a folder a variant
                assert template["spec"]["securityContext"]["fsGroup"] == 10001, name
            else:
                assert mounts[volume["name"]]["readOnly"], name
        if container["name"] == "worker":
            assert mounts["shm"]["mountPath"] == "/dev/shm", name
            assert "image" in volumes["weights"] or "persistentVolumeClaim" in volumes["weights"]


def test_pods_have_time_to_drain(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        (settings,) = [
            each["data"]
            for name, each in kind(resources, "ConfigMap").items()
            if name.startswith("gateway-settings")
        ]
        for name, template in templates(resources):
            (container,) = template["spec"]["containers"]
            pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            args = container["args"]
            if name == "gateway":
                drain_s = int(settings["CAST_SHUTDOWN_GRACE_S"])
            elif "--headless" in args:
                drain_s = 0  # it waits until rank 0 has drained
                assert pre_stop_s > 15 + int(settings["CAST_SHUTDOWN_GRACE_S"])
            else:
                drain_s = int(args[args.index("--shutdown-timeout") + 1])
            assert pre_stop_s >= 15
            grace_s = template["spec"]["terminationGracePeriodSeconds"]
            assert grace_s > pre_stop_s + drain_s, f"{overlay}: {name}"


def test_probes_ask_three_different_questions(rendered: Rendered) -> None:
    for name, template in every_template(rendered):
        (container,) = template["spec"]["containers"]
        if "--headless" in container["args"]:
            continue
        probes = ("startupProbe", "readinessProbe", "livenessProbe")
        paths = [container[probe]["httpGet"]["path"] for probe in probes]
        is_gateway = container["name"] == "gateway"
        expected = ["/startupz", "/readyz", "/livez"] if is_gateway else None
        assert paths == (expected or ["/health", "/health", "/version"]), name
        if not is_gateway:
            assert set(paths) == set(OPEN_PATHS), name  # all others want the key


def test_the_variants_differ_in_name_and_directory_alone(rendered: Rendered) -> None:
    for overlay in ("cpu", "gpu", "multi-node"):
        dense, sparse = (
            repr([each for each in rendered[overlay] if each["metadata"]["name"].endswith(end)])
            for end in ("-dense", "-sparse")
        )
        assert dense != "[]"
        assert dense.replace("dense", "sparse") == sparse


def test_services_and_budgets_find_their_pods(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        pods = dict(templates(resources))
        for service in kind(resources, "Service").values():
            found = selected(resources, service["spec"]["selector"])
            assert found, f"{overlay}: {service['metadata']['name']}"
            (port,) = service["spec"]["ports"]
            served = [pods[name]["spec"]["containers"][0].get("ports", []) for name in found]
            ports = list(itertools.chain.from_iterable(served))
            assert ports == [{"name": port["targetPort"], "containerPort": port["port"]}]
        budgets = kind(resources, "PodDisruptionBudget").values()
        covered = [selected(resources, b["spec"]["selector"]["matchLabels"]) for b in budgets]
        assert set().union(*covered) == set(pods), overlay


def test_the_gateway_knows_every_worker(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        (container,) = dict(templates(resources))["gateway"]["spec"]["containers"]
        known = re.findall(r"(\w+)=http://([\w-]+):(\d+)", " ".join(container["args"]))
        services = kind(resources, "Service")
        assert {host for _, host, _ in known} == set(services) - {"gateway"}, overlay
        for variant, host, port in known:
            spec = services[host]["spec"]
            assert spec["ports"][0]["port"] == int(port)
            for name in selected(resources, spec["selector"]):
                args = dict(templates(resources))[name]["spec"]["containers"][0]["args"]
                assert args[:4] == ["worker", f"/models/{variant}", "--name", variant], overlay


def test_settings_hold_together(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        (container,) = dict(templates(resources))["gateway"]["spec"]["containers"]
        (source,) = container["envFrom"]
        data = kind(resources, "ConfigMap")[source["configMapRef"]["name"]]["data"]
        fields = {key.removeprefix("CAST_").lower(): value for key, value in data.items()}
        assert set(fields) <= set(GatewaySettings.model_fields), overlay
        settings = GatewaySettings(**fields)
        variants = set(re.findall(r"(\w+)=http", " ".join(container["args"])))
        assert set(settings.split_weights["default"]) <= variants
        assert set(settings.fallbacks) == variants - {"dense"}, overlay
        keys = next(m for m in container["volumeMounts"] if m["name"] == "api-keys")
        assert str(settings.api_keys_file) == f"{keys['mountPath']}/keys"


def test_gateway_and_workers_have_one_key(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        maps = kind(resources, "ConfigMap")
        for name, template in templates(resources):
            (container,) = template["spec"]["containers"]
            env = {each["name"]: each.get("value") for each in container.get("env", [])}
            for source in container.get("envFrom", []):
                env |= maps[source["configMapRef"]["name"]]["data"]
            (mount,) = (m for m in container["volumeMounts"] if m["name"] == "worker-key")
            (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "worker-key")
            assert volume["secret"] == {"secretName": "worker-key"}, f"{overlay}: {name}"
            assert env["CAST_WORKER_KEY_FILE"] == f"{mount['mountPath']}/key", f"{overlay}: {name}"
        for monitor in kind(resources, "PodMonitor").values():
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            assert endpoint["authorization"]["credentials"] == {"name": "worker-key", "key": "key"}


def test_shadow_traffic_compares_dense_with_the_canary(rendered: Rendered) -> None:
    (container,) = dict(templates(rendered["canary"]))["gateway"]["spec"]["containers"]
    variants = re.findall(r"(\w+)=http", " ".join(container["args"]))
    assert variants == ["dense", "canary", "sparse"]  # compare/live.py takes the first two


def test_only_the_needed_connections_are_open(rendered: Rendered) -> None:
    for overlay, resources in rendered.items():
        policies = {n: p["spec"] for n, p in kind(resources, "NetworkPolicy").items()}
        assert policies["default-deny"] == {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
        }
        worker, gateway = policies["worker"], policies["gateway"]
        pods = {name for name, _ in templates(resources)}
        assert selected(resources, worker["podSelector"]["matchLabels"]) == pods - {"gateway"}
        assert selected(resources, gateway["podSelector"]["matchLabels"]) == {"gateway"}
        assert "egress" not in worker, overlay
        (rule,) = worker["ingress"]
        sources = rule["from"][0]["podSelector"]["matchLabels"]
        assert selected(resources, sources) == {"gateway"}
        assert rule["ports"] == gateway["egress"][0]["ports"] == [{"port": 8001, "protocol": "TCP"}]


def test_a_groups_ranks_reach_each_other_and_no_other_group(rendered: Rendered) -> None:
    resources = rendered["multi-node"]
    for group in ("group-dense", "group-sparse"):
        policy = kind(resources, "NetworkPolicy")[group]["spec"]
        own = policy["podSelector"]
        assert selected(resources, own["matchLabels"]) == {f"{group} leader", f"{group} worker"}
        assert own["matchLabels"]["leaderworkerset.sigs.k8s.io/group-index"] == "0"
        assert policy["ingress"] == [{"from": [{"podSelector": own}]}]
        assert policy["egress"][0] == {"to": [{"podSelector": own}]}
        assert kind(resources, "LeaderWorkerSet")[group]["spec"]["replicas"] == 1


def test_images_are_pinned(rendered: Rendered) -> None:
    for overlay, template in every_template(rendered):
        (container,) = template["spec"]["containers"]
        images = [container["image"]]
        images += [v["image"]["reference"] for v in template["spec"]["volumes"] if "image" in v]
        for image in images:
            tag = image.rpartition("/")[2].partition(":")[2]
            assert tag, overlay
            assert tag != "latest", overlay
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert wants_gpu == (container["image"].endswith("-gpu") and container["name"] == "worker")


def test_workers_are_counted_by_one_alone(rendered: Rendered) -> None:
    """A number in the Deployment would fight with the autoscaler at every apply."""
    for overlay, resources in rendered.items():
        scalers = [
            *kind(resources, "HorizontalPodAutoscaler").values(),
            *kind(resources, "ScaledObject").values(),
        ]
        scaled = {each["spec"]["scaleTargetRef"]["name"] for each in scalers}
        for name, deployment in kind(resources, "Deployment").items():
            assert ("replicas" in deployment["spec"]) == (name not in scaled), f"{overlay}: {name}"
