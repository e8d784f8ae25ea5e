"""scripts/check-image's own parts that need no container engine; the rest is `make check-image`."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.check.image import build, containers, pods

ROOT = Path(__file__).parents[2]
KEYS = "sha256:00\n"


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
    *others, deployment = canary.documents(name, None)
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


def test_the_secret_is_there_only_if_it_is_given(canary: pods.Pods) -> None:
    kinds = [[each["kind"] for each in canary.documents("gateway", k)] for k in (None, KEYS)]
    assert kinds == [["ConfigMap", "Deployment"], ["ConfigMap", "Secret", "Deployment"]]


@pytest.mark.parametrize(
    ("said", "holds"),
    [(None, False), ("no such secret", True), ("no such image", False)],
    ids=["it starts", "no secret", "another reason"],
)
def test_a_pod_that_starts_without_its_secret_is_caught(
    canary: pods.Pods, monkeypatch: pytest.MonkeyPatch, said: str | None, holds: bool
) -> None:
    def play(name: str) -> None:
        if said is not None:
            raise containers.Problem(said)

    removed: list[str] = []
    monkeypatch.setattr(canary, "play", play)
    monkeypatch.setattr(pods, "remove", removed.append)
    if holds:
        canary.check_needs_keys()
    else:
        with pytest.raises(containers.Problem, match="Secret"):
            canary.check_needs_keys()
    assert removed == ["gateway"]


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


def test_a_program_that_fails_is_a_problem() -> None:
    with pytest.raises(containers.Problem, match="exit 3: why"):
        containers.run(sys.executable, "-c", "import sys; print('why'); sys.exit(3)")


def test_a_base_that_is_asked_for_and_not_to_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "succeeds", lambda *_: False)
    with pytest.raises(containers.Problem, match="nowhere:1 is not here"):
        build.find_base("nowhere:1")


def test_wrong_use_is_said() -> None:
    words = [sys.executable, str(ROOT / "scripts/check-image"), "--bass"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--bass" in done.stderr
