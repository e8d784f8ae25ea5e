"""How pytest-xdist deals the tests out (`make test`): the stories to one process, first, in turn.

Stories start vLLM servers, which take gigabytes, and they take about as long as all other tests
together. Of those a file stays whole, since it shares its fixtures.
"""

import pytest


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name != "story")  # stable: else as collected
    for item in items:
        is_story = item.path.parent.name == "story"
        item.add_marker(pytest.mark.xdist_group("story" if is_story else str(item.path)))
