"""A few inputs of each target, the same each time; `make fuzz` draws others for CPU minutes."""

import time

import pytest
from hypothesis.strategies import just

from tests.fuzz import bodies, directories, streams, target, weights
from tests.fuzz.target import HangsError, Target

TARGETS = [*bodies.TARGETS, *streams.TARGETS, *weights.TARGETS, *directories.TARGETS]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_is_borne(target: Target) -> None:
    target.run(40)


def test_what_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "TICK_S", 0.2)
    monkeypatch.setattr(target, "LIMIT_S", 1)
    with pytest.raises(HangsError, match="no end within 1 s"):
        Target("sleeps", just(60), time.sleep).run(1)
