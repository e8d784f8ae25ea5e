"""What the image promises to the manifests that run it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FINAL_STAGE = DOCKERFILE.split("\nFROM ")[-1]


def instructions(text: str, name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", text, flags=re.MULTILINE)


def test_the_image_runs_as_the_manifests_user() -> None:
    assert instructions(FINAL_STAGE, "USER") == ["10001:10001"]


def test_the_entry_point_is_a_command_of_the_package() -> None:
    assert instructions(FINAL_STAGE, "ENTRYPOINT") == ['["cast-serve"]']
    assert "cast-serve" in PROJECT["project"]["scripts"]


def test_the_version_is_the_packages() -> None:
    assert f"VERSION={PROJECT['project']['version']}" in instructions(FINAL_STAGE, "ARG")


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
    assert sorted(copied) == sorted(allowed)
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.removesuffix("*") for pattern in patterns}
    assert packages == {"cast_train", "cast_serve", "loadtest"}
    assert packages <= set(copied)


def test_caches_lie_where_a_read_only_image_may_write() -> None:
    environment = dict(re.findall(r"(\w+)=(/\S+)", FINAL_STAGE))
    caches = {name: path for name, path in environment.items() if "CACHE" in name or name == "HOME"}
    assert len(caches) == 5
    assert all(path.startswith("/tmp") for path in caches.values()), caches


def test_the_kernel_is_found_where_it_was_built() -> None:
    before_builder = DOCKERFILE.split("AS builder")[0]
    assert "CAST_KERNEL_CACHE=/opt/cast/kernels" in before_builder
    assert "g++" in before_builder  # the cache is filed under the compiler's version
    assert instructions(FINAL_STAGE, "COPY") == ["--from=builder /opt/cast /opt/cast"]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_lock_has_what_the_package_asks_for(extra: str) -> None:
    text = (ROOT / f"deploy/requirements/{extra}.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))
    project = PROJECT["project"]
    for wanted in (*project["dependencies"], *project["optional-dependencies"][extra]):
        requirement = Requirement(wanted)
        assert requirement.specifier.contains(pins[requirement.name]), wanted
    (build,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert build.specifier.contains(pins[build.name])


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_lock_has_hashes_and_no_addresses(extra: str) -> None:
    text = (ROOT / f"deploy/requirements/{extra}.txt").read_text()
    entries = re.split(r"\n(?=\S)", text.partition("\n")[2].strip())
    for entry in entries:
        assert re.fullmatch(
            r"\S+==\S+( ; [^\n\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry
        ), entry


def test_no_cuda_torchaudio_beside_a_cpu_torch() -> None:
    text = (ROOT / "deploy/requirements/cpu.txt").read_text()
    assert "torch==2.13.0+cpu " in text
    assert "torchaudio" not in text
    assert "torchcodec" not in text
