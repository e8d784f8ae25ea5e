"""How pytest-xdist deals the tests out (`make test`): the stories to one process, first, in turn.

Stories start vLLM servers, which take gigabytes, and they take about as long as all other tests
together. Of those a file stays whole, since it shares its fixtures.
"""

from typing import Any

import pytest

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
