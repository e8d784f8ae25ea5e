"""Programs of the machine that some tests drive: there, or the test is skipped and says what to do.

In CI (the variable CI is "true") a missing one fails the test, so that CI cannot skip unseen.
"""

import os
import shutil
from typing import NoReturn

import pytest

DEBIAN_PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "chromium": "chromium",
    "npm": "npm",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "qemu-aarch64": "qemu-user",
}


def need(name: str) -> str:
    """The path of a program of `DEBIAN_PACKAGES`."""
    if path := shutil.which(name):
        return path
    package = DEBIAN_PACKAGES[name]
    lack(
        f"{name} is missing, which Debian's package {package} has; run scripts/install-packages "
        f"as root, or apt-get install {package}"
    )


def lack(reason: str) -> NoReturn:
    """Skips the test for what the machine lacks; in CI it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true: nothing is skipped for it)", pytrace=False)
    pytest.skip(reason)
