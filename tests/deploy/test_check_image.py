"""scripts/check-image's own parts that need no container engine; the rest is `make check-image`."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.check.image import build, containers, pods

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
    ("said", "holds"),
    [(None, False), ("no such secret cast-check-gateway-worker-key", True), ("no image", False)],
    ids=["it starts", "no secret", "another reason"],
)
def test_a_pod_that_starts_without_its_secret_is_caught(
    canary: pods.Pods, monkeypatch: pytest.MonkeyPatch, said: str | None, holds: bool
) -> None:
    given: list[set[str]] = []

    def play(name: str, secrets: pods.Secrets) -> None:
        given.append(set(secrets))
        if said is not None:
            raise containers.Problem(said)

    removed: list[str] = []
    monkeypatch.setattr(canary, "play", play)
    monkeypatch.setattr(pods, "remove", removed.append)
    if holds:
        canary.check_needs("worker-key", SECRETS)
    else:
        with pytest.raises(containers.Problem, match="Secret worker-key"):
            canary.check_needs("worker-key", SECRETS)
    assert removed == ["gateway"]
    assert given == [{"gateway-api-keys"}]


class Podman:
    """Its lists and `rm`, with things of ours and of others."""

    def __init__(self, stays: str) -> None:
        self.stays = stays
        self.things = {
            "pod": ["pod_cast-check", "pod_cast-serve"],
            "container": ["cast-check_gateway_1", "cast-serve_gateway_1"],
            "network": ["cast-check_front", "podman"],
            "volume": ["cast-check-weights", "prometheus"],
            "secret": ["cast-check-gateway-worker-key", "other"],
        }

    def list(self, kind: str, *_: str) -> str:
        return "\n".join(self.things[kind])

    def remove(self, kind: str, *words: str) -> bool:
        if words[-1] != self.stays:
            self.things[kind].remove(words[-1])
        return True


@pytest.mark.parametrize("stays", ["", "cast-check-weights"])
def test_all_of_ours_is_removed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, stays: str
) -> None:
    podman = Podman(stays)
    others = {kind: names[1:] for kind, names in podman.things.items()}
    monkeypatch.setattr(containers, "podman", podman.list)
    monkeypatch.setattr(containers, "succeeds", podman.remove)
    if stays:
        with pytest.raises(containers.Problem, match=f"volume {stays}"):
            containers.clear()
        others["volume"].insert(0, stays)
    else:
        containers.clear()
    assert podman.things == others


def test_free_ports_are_free() -> None:
    for port in containers.free_ports(2):
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_pips_configuration_is_passed_to_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    listed = f":env:.find-links='{tmp_path}'\nglobal.timeout='180'\n"
    monkeypatch.setattr(build, "run", lambda *_: listed)
    monkeypatch.setattr(build, "WORK", tmp_path)
    flags = list(build.pip_flags())
    assert (tmp_path / "pip.conf").read_text() == (
        f"[global]\nfind-links = {tmp_path}\ntimeout = 180\n"
    )
    assert f"{tmp_path}:{tmp_path}:ro" in flags
    assert f"TORCH_INDEX=file://{tmp_path}" in flags


def test_a_second_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "LOCK", tmp_path / "lock")
    with build.lock(), pytest.raises(SystemExit, match="another one runs"):
        build.lock()
    build.lock().close()


def test_a_program_that_fails_is_a_problem() -> None:
    with pytest.raises(containers.Problem, match="exit 3: why"):
        containers.run(sys.executable, "-c", "import sys; print('why'); sys.exit(3)")


def test_a_base_that_is_asked_for_and_not_to_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "succeeds", lambda *_: False)
    with pytest.raises(containers.Problem, match="nowhere:1 is not here"):
        build.find_base("nowhere:1")


@pytest.mark.parametrize(
    ("words", "said"), [(["--bass"], "--bass"), (["--restarts", "nowhere"], "sparse/")]
)
def test_wrong_use_is_said(words: list[str], said: str) -> None:
    command = [sys.executable, str(ROOT / "scripts/check-image"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
