"""Streams, doubled -> the most at which the gateway adds no more than 1 ms to the p99 of a token.

All streams get a token in one step, as those of one engine that batches: the last token of a step
waits for all others, which is the worst that so many streams can do. Each number of streams goes
through the gateway and directly, in alternating order; what is added is the median
over rounds of the difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gateway.fake_worker import Load
from benchmarks.gateway.reading import Reading, added_ms, spread
from benchmarks.gateway.ways import DIRECT, WAYS, Way
from loadtest.send.connection import Pool

GATEWAY = WAYS[0]


@dataclass(frozen=True)
class Search:
    """Where to search.

    Attributes:
        streams: the numbers, rising; none after the first that adds too much.
        step_ms: from a token of a stream to its next.
        tokens: of each stream.
        limit_ms: what the gateway may add.
    """

    streams: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    step_ms: int = 20
    tokens: int = 150
    limit_ms: float = 1.0


async def search(
    ways: Mapping[str, Way], search: Search, rounds: int, on_step: Callable[[], None]
) -> dict[str, Any]:
    """Goes through the numbers of streams.

    Args:
        ways: `DIRECT` and the gateway; others are left alone.
        search: where.
        rounds: of each number.
        on_step: called after each number and way of a round.

    Returns:
        What each number added, and the greatest below the limit: 0 if already the first adds more.

    Raises:
        RuntimeError: if an answer is not whole and in order.
    """
    pools = {name: Pool(ways[name].url, {}) for name in (DIRECT, GATEWAY)}
    tried: list[dict[str, Any]] = []
    most = 0
    for streams in search.streams:
        load = Load(streams, search.step_ms)
        added = []
        for number in range(rounds):
            seen = {}
            for name in list(pools)[:: 1 if number % 2 == 0 else -1]:
                seen[name] = await Reading(load, search.tokens, ways[name]).run(pools[name])
                on_step()
            added.append(added_ms(seen[GATEWAY], seen[DIRECT], 99))
        tried.append({"streams": streams, "added_p99_ms": spread(added)})
        if tried[-1]["added_p99_ms"]["median"] > search.limit_ms:
            break
        most = streams
    for pool in pools.values():
        pool.close()
    return {
        "limit_ms": search.limit_ms,
        "step_ms": search.step_ms,
        "tokens": search.tokens,
        "tried": tried,
        "streams": most,
        "tokens_per_s": 1e3 * most / search.step_ms,
    }
