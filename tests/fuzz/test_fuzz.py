"""A few inputs of each target, the same each time; `make fuzz` draws others for CPU minutes."""

import pytest

from tests.fuzz import bodies, directories, streams, weights
from tests.fuzz.target import Target

TARGETS = [*bodies.TARGETS, *streams.TARGETS, *weights.TARGETS, *directories.TARGETS]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_is_borne(target: Target) -> None:
    target.run(40)
