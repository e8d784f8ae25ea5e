"""How pytest-xdist deals the tests out (`make test`), their environment, and a hub.

The stories go to one process, first, in turn: they start vLLM servers, which take gigabytes, and
they take about as long as all other tests together. Of those a file stays whole, since it shares
its fixtures.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cast_serve.gateway.settings import GatewaySettings
from tests.fake_hub import FakeHub, fake_hub

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it

STORIES = "tests/story/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(STORIES))  # stable: else as collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return STORIES if nodeid.startswith(STORIES) else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_caller() -> Iterator[None]:
    """A gateway's settings in the shell that runs the tests are not those of the tests."""
    known = {f"CAST_{field}".upper() for field in GatewaySettings.model_fields}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper() in known]:  # either case counts
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Commands that run in the tests' own process leave denormal numbers to the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cast_train.precision.flush_denormals", lambda: None)
        yield


class Opened(list["subprocess.Popen[Any]"]):
    """Processes that were started."""

    def check_closed(self) -> None:
        """Each has ended and was waited for, and its pipes are closed."""
        for process in self:
            assert process.returncode is not None, process.args
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is None or pipe.closed, process.args


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """The processes that this test's code starts, in their order."""
    found = Opened()

    class Remembered(subprocess.Popen[Any]):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Remembered)
    yield found
    for process in found:  # where the test fails
        process.kill()
        process.wait()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """An empty hub that this process asks, with an empty cache and no token."""
    from huggingface_hub import constants

    with fake_hub() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
