"""Our gateway and bare pass-throughs -> CPU time of a token and a request, delay, tokens a second.

    this process, the client -> gateway | Starlette + httpx | aiohttp | nothing -> fake worker

Each is a process of its own. With two cores or more, what stands between has one for itself, and
client and worker share the others. In a round each load goes all ways, one after the other, in
turned order from round to round; a ratio is one of two ways of the same round.

CPU time is the process's own clock (clock_getcpuclockid), from when every stream has its first
token until one has its last but one: that of tokens, and of what the way does beside them. That of
a request is what an answer of two tokens takes in all. A delay runs from the begin of the worker's
step until the client reads the token, and holds the wait for the other tokens of the same step.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from cast_serve import sse
from loadtest.bench.gateway.fake_worker import MODEL, STAMP, STAMP_DIGITS, Load
from loadtest.bench.gateway.ways import DIRECT, WAYS, Way, started
from loadtest.provenance import machine, versions
from loadtest.send.connection import Pool, TransportError

SHORT = Load(1, 1)  # two tokens of it are a short answer
MIN_TOKENS = 8  # of a stream
TIMEOUT_S = 60
PACKAGES = ("aiohttp", "httptools", "httpx", "starlette", "uvicorn", "uvloop")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: 2 or more.
        loads: below what any way carries.
        load_s: seconds of tokens a load and way, but `MIN_TOKENS` a stream at least.
        flood: a load above what any way carries.
        flood_tokens: a stream of it.
        requests: short answers a way.
        at_once: of these.
    """

    rounds: int = 3
    loads: tuple[Load, ...] = (Load(1, 2), Load(64, 20), Load(512, 250))
    load_s: float = 1.2
    flood: Load = Load(64, 1)
    flood_tokens: int = 300
    requests: int = 256
    at_once: int = 16

    @property
    def num_steps(self) -> int:
        """How often `measure` calls `on_step`."""
        return self.rounds * ((len(self.loads) + 1) * (len(WAYS) + 1) + len(WAYS))


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


@dataclass(frozen=True)
class Round:
    """One round: by way."""

    loads: Mapping[Load, Mapping[str, Seen]]
    flood: Mapping[str, Seen]
    request_cpu_us: Mapping[str, float]


def measure(plan: Plan, on_step: Callable[[], None]) -> dict[str, Any]:
    """Starts all processes, measures, ends them.

    Args:
        plan: how much.
        on_step: called after each of `plan.num_steps`.

    Returns:
        Medians over rounds, with the least and the greatest.

    Raises:
        ValueError: if the plan is too small.
        RuntimeError: if a process does not answer, or an answer is not whole and in order.
    """
    if plan.rounds < 2 or plan.load_s <= 0:
        raise ValueError(
            f"{plan.rounds} rounds of {plan.load_s:g} s are too few; give 2 or more of more than 0"
        )
    with ExitStack() as stack:
        ways = started(stack)
        rounds = asyncio.run(_rounds(ways, plan, on_step))
    return {
        "rounds": plan.rounds,
        "machine": machine(),
        "versions": {**versions(), **{name: version(name) for name in PACKAGES}},
        "loads": [_summary(load, rounds) for load in plan.loads],
        "flood": {
            "streams": plan.flood.streams,
            "offered_tokens_per_s": 1e3 * plan.flood.streams / plan.flood.step_ms,
            "tokens_per_s": {
                way: _spread([each.flood[way].tokens_per_s for each in rounds])
                for way in (DIRECT, *WAYS)
            },
        },
        "cpu_us_per_request": {
            way: _spread([each.request_cpu_us[way] for each in rounds]) for way in WAYS
        },
        "cpu_ratio_per_request": _ratios([each.request_cpu_us for each in rounds]),
    }


async def _rounds(ways: Mapping[str, Way], plan: Plan, on_step: Callable[[], None]) -> list[Round]:
    pools = {name: Pool(way.url, {}) for name, way in ways.items()}
    for pool in pools.values():
        await _short_answers(pool, 2 * plan.at_once, plan.at_once)  # warms up
    rounds: list[Round] = []
    for number in range(plan.rounds):
        order = list(ways)[:: 1 if number % 2 == 0 else -1]
        found: dict[Load, dict[str, Seen]] = {}
        for load in (*plan.loads, plan.flood):
            tokens = max(MIN_TOKENS, round(1e3 * plan.load_s / load.step_ms))
            if load is plan.flood:
                tokens = plan.flood_tokens
            found[load] = {}
            for name in order:
                found[load][name] = await _Reading(load, tokens, ways[name]).run(pools[name])
                on_step()
        request_cpu_us = {}
        for name in (name for name in order if name in WAYS):
            begun_s = ways[name].cpu_s()
            await _short_answers(pools[name], plan.requests, plan.at_once)
            request_cpu_us[name] = 1e6 * (ways[name].cpu_s() - begun_s) / plan.requests
            on_step()
        flood = found.pop(plan.flood)
        rounds.append(Round(found, flood, request_cpu_us))
    for pool in pools.values():
        pool.close()
    return rounds


async def _short_answers(pool: Pool, number: int, at_once: int) -> None:
    left = iter(range(number))

    async def ask() -> None:
        for _ in left:
            await Stream(lambda *_: None).read(pool, SHORT, 2)

    await asyncio.gather(*(ask() for _ in range(at_once)))


class _Reading:
    """One load on one way."""

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


def _summary(load: Load, rounds: list[Round]) -> dict[str, Any]:
    cpu_us = [{way: each.loads[load][way].cpu_us for way in WAYS} for each in rounds]
    added_ms: dict[str, dict[str, dict[str, float]]] = {}
    for way in WAYS:
        added_ms[way] = {}
        for percent in (50, 99):
            added = [
                _percentile(each.loads[load][way].delays_s, percent)
                - _percentile(each.loads[load][DIRECT].delays_s, percent)
                for each in rounds
            ]
            added_ms[way][f"p{percent}"] = _spread([1e3 * delay_s for delay_s in added])
    return {
        "streams": load.streams,
        "step_ms": load.step_ms,
        "cpu_us_per_token": {way: _spread([each[way] for each in cpu_us]) for way in WAYS},
        "cpu_ratio": _ratios(cpu_us),
        "added_delay_ms": added_ms,
    }


def _ratios(rounds: list[Any]) -> dict[str, dict[str, float]]:
    """Of the gateway over each other way, round by round."""
    ours, *others = WAYS
    return {way: _spread([each[ours] / each[way] for each in rounds]) for way in others}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
