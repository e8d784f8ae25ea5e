"""A load -> its streams read at once: CPU time of what they went through, delays, tokens a second.

CPU time is the process's own clock (clock_getcpuclockid), from when every stream has its first
token until one has its last but one: that of tokens, and of what the way does beside them. A delay
runs from the begin of the worker's step until the client reads the token, and holds the wait for
the other tokens of the same step.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.gateway.fake_worker import MODEL, STAMP, STAMP_DIGITS, Load
from benchmarks.gateway.ways import Way
from cast_serve import sse
from loadtest.send.connection import Pool, TransportError

TIMEOUT_S = 60


@dataclass
class Seen:
    """What the client saw of one load on one way.

    Attributes:
        cpu_s: of the way's process, while `delays_s` came.
        delays_s: of each token in the time that counts.
        tokens_per_s: of all tokens, from the first to the last.
    """

    cpu_s: float
    delays_s: list[float] = field(repr=False)
    tokens_per_s: float

    @property
    def cpu_us(self) -> float:
        """Of a token."""
        return 1e6 * self.cpu_s / len(self.delays_s)


class Reading:
    """One load on one way.

    Args:
        load: what is asked for.
        tokens: of each stream.
        way: whose CPU time counts.
    """

    def __init__(self, load: Load, tokens: int, way: Way) -> None:
        self._load = load
        self._tokens = tokens
        self._cpu_s = way.cpu_s
        self._num_begun = 0
        self._first_s = 0.0  # when the first token left
        self._begun_cpu_s: float | None = None
        self._ended_cpu_s: float | None = None
        self._delays_s: list[float] = []

    async def run(self, pool: Pool) -> Seen:
        """All streams, over connections to the way.

        Raises:
            RuntimeError: if one is not whole and in order, or they did not run together.
        """
        streams = [Stream(self._on_token) for _ in range(self._load.streams)]
        await asyncio.gather(*(s.read(pool, self._load, self._tokens) for s in streams))
        wall_s = time.perf_counter() - self._first_s
        if self._begun_cpu_s is None or self._ended_cpu_s is None:
            raise RuntimeError(
                f"{self._load.name}: one stream ended before another began; leave the machine alone"
            )
        rate = self._load.streams * self._tokens / wall_s
        return Seen(self._ended_cpu_s - self._begun_cpu_s, self._delays_s, rate)

    def _on_token(self, number: int, sent_s: float, now_s: float) -> None:
        if self._begun_cpu_s is not None and self._ended_cpu_s is None:
            self._delays_s.append(now_s - sent_s)
        if number == 1:
            self._first_s = self._first_s or sent_s
            self._num_begun += 1
            if self._num_begun == self._load.streams:
                self._begun_cpu_s = self._cpu_s()
        elif number == self._tokens - 1 and self._ended_cpu_s is None:
            self._ended_cpu_s = self._cpu_s()


class Stream:
    """Reads one answer.

    Args:
        on_token: called with its number from 1, when it left the worker, and the time now.
    """

    def __init__(self, on_token: Callable[[int, float, float], None]) -> None:
        self._on_token = on_token
        self._reader = sse.Reader()
        self._last_s = 0.0
        self._num_tokens = 0
        self._is_done = False

    async def read(self, pool: Pool, load: Load, tokens: int) -> None:
        """Asks for it.

        Raises:
            RuntimeError: if it is not whole and in order.
        """
        asked = {"model": MODEL, "prompt": load.name, "max_tokens": tokens, "stream": True}
        body = json.dumps(asked).encode()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await pool.exchange("POST", "/v1/completions", body, self.feed)
        except (TimeoutError, TransportError) as error:
            raise RuntimeError(f"{load.name}: a stream failed: {error or 'timeout'}") from None
        if found.status != 200 or self._num_tokens != tokens or not self._is_done:
            raise RuntimeError(
                f"{load.name}: status {found.status}, {self._num_tokens} of {tokens} tokens"
            )

    def feed(self, piece: bytes) -> None:
        now_s = time.perf_counter()
        for data in self._reader.feed(piece):
            at = data.find(STAMP)
            if at < 0:
                self._is_done = self._is_done or data == sse.DONE
                continue
            sent_s = float(data[at + len(STAMP) : at + len(STAMP) + STAMP_DIGITS])
            if sent_s < self._last_s or self._is_done:
                raise RuntimeError("tokens came out of order")
            self._last_s = sent_s
            self._num_tokens += 1
            self._on_token(self._num_tokens, sent_s, now_s)


def spread(values: list[float]) -> dict[str, float]:
    """Of rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def added_ms(over: Seen, direct: Seen, percent: int) -> float:
    """How much later that percentile of the tokens came."""
    way_s, direct_s = (_percentile(seen.delays_s, percent) for seen in (over, direct))
    return 1e3 * (way_s - direct_s)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
