"""The streams are doubled until the gateway adds too much, and no further."""

import asyncio
from typing import Any

import pytest

from benchmarks.gateway import limit
from benchmarks.gateway.fake_worker import Load
from benchmarks.gateway.limit import GATEWAY, Search
from benchmarks.gateway.reading import Seen
from benchmarks.gateway.ways import DIRECT, Way
from loadtest.send.connection import Pool

ROUNDS = 3
WAYS = {name: Way("http://127.0.0.1:1", lambda: 0.0) for name in (DIRECT, GATEWAY)}


def found_with(
    monkeypatch: pytest.MonkeyPatch, added_ms: dict[int, tuple[float, ...]]
) -> dict[str, Any]:
    """What a search finds where the gateway adds this in each round, by the number of streams."""
    rounds = {streams: iter(values) for streams, values in added_ms.items()}

    class Reading:
        def __init__(self, load: Load, tokens: int, way: Way) -> None:
            self._ms = next(rounds[load.streams]) if way is WAYS[GATEWAY] else 0.0
            self._num_delays = load.streams * tokens

        async def run(self, pool: Pool) -> Seen:
            return Seen(1.0, [5.0 + self._ms / 1e3] * self._num_delays, 1.0)

    monkeypatch.setattr(limit, "Reading", Reading)
    steps: list[None] = []
    where = Search((1, 2, 4), step_ms=2, tokens=5)
    found = asyncio.run(limit.search(WAYS, where, ROUNDS, lambda: steps.append(None)))
    assert len(steps) == 2 * ROUNDS * len(found["tried"])
    return found


def test_it_ends_at_the_first_number_that_adds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_with(monkeypatch, {1: (0.1, 0.2, 9.0), 2: (1.1, 0.5, 1.2)})
    assert (found["streams"], found["tokens_per_s"]) == (1, 500)
    first, second = found["tried"]
    assert first["added_p99_ms"] == pytest.approx({"median": 0.2, "low": 0.1, "high": 9.0})
    assert (second["streams"], second["added_p99_ms"]["median"]) == (2, pytest.approx(1.1))


@pytest.mark.parametrize(
    ("added_ms", "most", "num_tried"), [((1.5,) * ROUNDS, 0, 1), ((-0.5,) * ROUNDS, 4, 3)]
)
def test_none_or_all_may_do(
    monkeypatch: pytest.MonkeyPatch, added_ms: tuple[float, ...], most: int, num_tried: int
) -> None:
    found = found_with(monkeypatch, dict.fromkeys((1, 2, 4), added_ms))
    assert (found["streams"], len(found["tried"])) == (most, num_tried)
