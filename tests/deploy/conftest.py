"""scripts/check-deploy as a module, and what it renders."""

from typing import Any

import pytest

from tests.programs import need
from tests.scripts import load_script

Resource = dict[str, Any]


@pytest.fixture(scope="session")
def check() -> Any:
    return load_script("check-deploy")


@pytest.fixture(scope="session")
def npm() -> str:
    """By it scripts/check-deploy installs kubectl and what else it drives, the first time."""
    return need("npm")


@pytest.fixture(scope="session")
def promtool() -> str:
    return need("promtool")


@pytest.fixture(scope="session")
def rendered(npm: str, check: Any) -> dict[str, list[Resource]]:
    """Each overlay's resources by its name."""
    found = dict(check.rendered())
    assert {"cpu", "gpu", "multi-node", "canary", "cpu with all components"} <= set(found)
    return found


@pytest.fixture(scope="session")
def cpu(rendered: dict[str, list[Resource]]) -> dict[tuple[str, str], Resource]:
    """The default overlay's resources by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in rendered["cpu"]}
