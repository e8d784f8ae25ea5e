"""What a record says about its origin: the code's commit, the machine, and its load."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cast_serve import provenance
from cast_serve.provenance import machine, origin, versions

PRINT_VERSIONS = (
    "import json; from cast_serve.provenance import versions; print(json.dumps(versions()))"
)


def test_what_is_known_of_this_machine() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] == sorted(os.sched_getaffinity(0))
    assert versions()["python"] == platform.python_version()


def test_an_origin_is_whole_and_fits_into_json() -> None:
    found = origin()
    assert json.loads(json.dumps(found)) == found
    assert found["date"].endswith("+00:00")
    assert found["versions"] == versions()
    assert found["machine"] == {**machine(), "load_average": found["machine"]["load_average"]}
    assert found["machine"]["load_average"] >= 0


def git(repository: Path, *words: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    command = ["git", *identity, "-C", str(repository), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copied(folder: Path) -> Path:
    """A package of the one module, in a folder of somebody's checkout."""
    package = folder / "cast_serve"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(provenance.__file__, package)
    return package


def versions_in(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PRINT_VERSIONS]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def test_the_commit_says_whether_files_had_been_changed(tmp_path: Path) -> None:
    git(tmp_path, "init")
    package = copied(tmp_path)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert versions_in(tmp_path)["commit"] == commit
    (package / "__init__.py").write_text("# changed\n")
    assert versions_in(tmp_path)["commit"] == f"{commit}-dirty"


def test_code_inside_another_projects_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "another project")
    copied(tmp_path / ".venv" / "site-packages")
    assert "commit" not in versions_in(tmp_path / ".venv" / "site-packages")
