"""scripts/check-image's own parts that need no container engine; the rest is `make check-image`."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.check.image import build, pods

ROOT = Path(__file__).parents[2]
SECRETS = {"gateway-api-keys": {"keys": "sha256:00\n"}, "worker-key": {"key": "k"}}


@pytest.fixture
def canary(npm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pods.Pods:
    monkeypatch.setattr(pods, "WORK", tmp_path)
    return pods.Pods("canary")


@pytest.mark.parametrize("image", build.IMAGES)
def test_the_images_are_composes(image: str) -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    assert build.tag(image).partition(":")[0] == image
    assert build.tag(image) in {service["image"] for service in services.values()}


@pytest.mark.parametrize("name", ["gateway", "worker-canary", "worker-dense"])
def test_a_pod_is_the_manifests_under_names_of_the_check(canary: pods.Pods, name: str) -> None:
    *others, deployment = canary.documents(name, {})
    assert {each["kind"] for each in others} == {"ConfigMap"}
    assert deployment["metadata"]["name"] == f"cast-check-{name}"
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert not [field for field in container if field.endswith("Probe")]
    assert container["image"].startswith("localhost/cast-serve")
    assert container["securityContext"] == canary.spec(name)["securityContext"]
    assert container["args"] == canary.spec(name)["args"]
    caches = {v["name"] for v in pod["volumes"]} & {"compiled"}
    assert bool(caches) == name.startswith("worker")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        named = volume.get("persistentVolumeClaim", {}).get("claimName")
        named = named or volume.get("secret", {}).get("secretName", "cast-check")
        assert named.startswith("cast-check"), volume


@pytest.mark.parametrize(
    ("name", "mounted"),
    [("gateway", ["gateway-api-keys", "worker-key"]), ("worker-dense", ["worker-key"])],
)
def test_a_secret_is_there_if_it_is_mounted_and_given(
    canary: pods.Pods, name: str, mounted: list[str]
) -> None:
    def made(secrets: pods.Secrets) -> list[str]:
        documents = canary.documents(name, secrets)
        return [each["metadata"]["name"] for each in documents if each["kind"] == "Secret"]

    assert made({}) == []
    assert made(SECRETS) == [f"cast-check-{name}-{secret}" for secret in mounted]


@pytest.mark.parametrize(
    ("words", "said"), [(["--bass"], "--bass"), (["--restarts", "nowhere"], "sparse/")]
)
def test_wrong_use_is_said(words: list[str], said: str) -> None:
    command = [sys.executable, str(ROOT / "scripts/check-image"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
