"""The rendered overlays -> their Deployments run by `podman kube play`, and checked."""

import base64
import copy
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import yaml

from deploy.check.image.containers import (
    GATEWAY,
    GATEWAY_PORT,
    PREFIX,
    ROOT,
    WORK,
    Problem,
    ask,
    check_answers,
    check_drain,
    check_hardened,
    check_kernels,
    check_metrics,
    expect,
    is_healthy,
    is_ready,
    podman,
    run,
    succeeds,
    wait_until,
)

NETWORK = f"{PREFIX}-pods"
WEIGHTS = f"{PREFIX}-weights"

Resource = dict[str, Any]
Secrets = dict[str, dict[str, str]]  # contents by the name in the manifests and the key in it


def rendered(overlay: str) -> dict[tuple[str, str], Resource]:
    """What `kubectl apply -k` of it and components/compile-cache would send, by kind and name."""
    run(ROOT / "deploy/check/install", sys.executable)
    folder = WORK / overlay
    folder.mkdir(exist_ok=True)
    k8s = os.path.relpath(ROOT / "deploy/k8s", folder)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{k8s}/overlays/{overlay}"],
        "components": [f"{k8s}/components/compile-cache"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    text = run(ROOT / "build/check-deploy/kubectl", "kustomize", folder)
    found = [each for each in yaml.safe_load_all(text) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod_of(name: str) -> str:
    return f"{PREFIX}-{name}-pod"


def remove(name: str) -> None:
    """A Deployment's pod, with the volumes and secrets that podman made for it."""
    succeeds("pod", "rm", "--force", "--time", "2", pod_of(name))
    for volume in podman("volume", "ls", "--quiet").split():
        if volume.startswith(f"{PREFIX}-{name}-"):
            succeeds("volume", "rm", volume)
    for secret in podman("secret", "ls", "--format", "{{.Name}}").split():
        if secret.startswith(f"{PREFIX}-{name}-"):
            succeeds("secret", "rm", secret)


class Pods:
    """An overlay's Deployments as pods on a network of their own, with Services as aliases."""

    def __init__(self, overlay: str) -> None:
        self.resources = rendered(overlay)

    def spec(self, name: str) -> dict[str, Any]:
        (found,) = self.resources["Deployment", name]["spec"]["template"]["spec"]["containers"]
        return dict(found)

    def container(self, name: str) -> str:
        return f"{pod_of(name)}-{self.spec(name)['name']}"

    def play(self, name: str, secrets: Secrets) -> None:
        path = WORK / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(self.documents(name, secrets)))
        published = ["--publish", f"127.0.0.1:{GATEWAY_PORT}:8000"] if name == "gateway" else []
        podman("kube", "play", "--network", f"{NETWORK}:alias={name}", *published, path)

    def documents(self, name: str, secrets: Secrets) -> list[Resource]:
        """A Deployment and what it mounts, under names of our own, with this machine's cores.

        Without the probes: podman would ask by curl, which the images have not. Each worker has a
        cache volume of its own, as podman knows no subPathExpr.
        """
        deployment = copy.deepcopy(self.resources["Deployment", name])
        deployment["metadata"]["name"] = f"{PREFIX}-{name}"
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        documents = [r for (kind, _), r in self.resources.items() if kind == "ConfigMap"]
        container["image"] = container["image"].replace("registry.example.com", "localhost")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            del container[probe]
        for bound in container["resources"].values():
            if bound["cpu"].isdigit():
                bound["cpu"] = str(min(int(bound["cpu"]), os.cpu_count() or 1))
        for mount in container["volumeMounts"]:
            mount.pop("subPathExpr", None)
        for volume in pod["volumes"]:
            if volume["name"] == "weights":
                volume["persistentVolumeClaim"]["claimName"] = WEIGHTS
            if volume["name"] == "compiled":
                volume["persistentVolumeClaim"]["claimName"] = f"{PREFIX}-{name}-compiled"
            if "emptyDir" in volume:  # podman names its volume so, and two pods would share it
                own = f"{PREFIX}-{name}-{volume['name']}"
                for mount in container["volumeMounts"]:
                    if mount["name"] == volume["name"]:
                        mount["name"] = own
                volume["name"] = own
            if "secret" in volume:
                secret = volume["secret"]["secretName"]
                own = volume["secret"]["secretName"] = f"{PREFIX}-{name}-{secret}"
                if secret in secrets:
                    data = {
                        k: base64.b64encode(v.encode()).decode() for k, v in secrets[secret].items()
                    }
                    head = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": own}}
                    documents.append({**head, "data": data})
        return [*documents, deployment]

    def check_needs(self, secret: str, secrets: Secrets) -> None:
        """The gateway's pod does not start while one of its Secrets is missing."""
        others = {name: content for name, content in secrets.items() if name != secret}
        try:
            self.play("gateway", others)
        except Problem as problem:
            expect(secret in str(problem), f"not for want of its Secret {secret}: {problem}")
        else:
            raise Problem(f"the gateway's pod started without its Secret {secret}")
        finally:
            remove("gateway")

    def check_probes(self, name: str, asker: str) -> None:
        """The URLs that the kubelet would ask."""
        container = self.spec(name)
        port = container["ports"][0]["containerPort"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            url = f"http://{name}:{port}{container[probe]['httpGet']['path']}"
            expect(is_healthy(asker, url), f"{probe} of {name}: {url} does not answer 2xx")


def check_pods(folder: Path) -> None:
    key = token_hex(32)
    keys = f"sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    secrets = {"gateway-api-keys": {"keys": keys}, "worker-key": {"key": token_hex(32)}}
    headers = {"Authorization": f"Bearer {key}"}
    pods, canary = Pods("cpu"), Pods("canary")
    names = ["worker-dense", "worker-sparse", "gateway"]
    podman("network", "create", NETWORK)
    podman("volume", "create", WEIGHTS)
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        run("tar", "--directory", folder, "--create", "--file", archive.name, ".")
        podman("volume", "import", WEIGHTS, archive.name)
    for secret in secrets:
        pods.check_needs(secret, secrets)
    for name in names:
        pods.play(name, secrets)
    containers = [pods.container(name) for name in names]
    wait_until(is_ready, "the pods of overlays/cpu", containers)
    for name, container in zip(names, containers, strict=True):
        check_hardened(container)
        pods.check_probes(name, containers[-1])
    check_kernels(containers[1])
    for wrong in ({}, {"Authorization": "Bearer wrong"}):
        code = ask("dense", wrong).status_code
        expect(code == 401, f"without a key: {code}")
    expect(httpx.get(f"{GATEWAY}/metrics").status_code == 401, "/metrics asks for no key")
    check_answers({"dense": "dense", "sparse": "sparse", "default": "sparse"}, headers)
    check_metrics(("dense", "sparse"), headers)
    print(f"{'cpu':<12}Secret, answers, keys, probes, hardening, metrics", flush=True)

    remove("gateway")
    canary.play("worker-canary", secrets)
    canary.play("gateway", secrets)
    containers = [canary.container(name) for name in ("worker-canary", "gateway")]
    wait_until(is_ready, "the pods of overlays/canary", containers)
    canary.check_probes("worker-canary", containers[-1])
    check_answers({"dense": "dense", "sparse": "sparse", "canary": "canary"}, headers)
    check_metrics(("dense", "canary", "sparse"), headers)
    num = check_drain(containers[0], "canary", headers)
    print(f"{'canary':<12}answers; its worker stopped in mid-stream: {num} chunks after it")
