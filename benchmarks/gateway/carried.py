"""Our gateway and bare pass-throughs -> CPU time of a token and a request, delay, tokens a second.

    .venv/bin/python -m benchmarks.gateway.carried [--rounds 3] [--out FILE]

    this process, the client -> gateway | Starlette + httpx | aiohttp | nothing -> fake worker

Each is a process of its own. With two cores or more, what stands between has one for itself, and
client and worker share the others. In a round each load goes all ways, one after the other, in
turned order from round to round; a ratio is one of two ways of the same round.

reading.py says what CPU time and delay are; the CPU time of a request is what an answer of two
tokens takes in all. At the end limit.py doubles the streams until the gateway adds too much. The
machine should do nothing else.
"""

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.gateway import limit
from benchmarks.gateway.fake_worker import Load
from benchmarks.gateway.limit import Search
from benchmarks.gateway.reading import Reading, Seen, Stream, added_ms, spread
from benchmarks.gateway.ways import DIRECT, WAYS, Way, started
from cast_serve.provenance import origin
from loadtest.report.directory import check_file
from loadtest.send.connection import Pool

SHORT = Load(1, 1)  # two tokens of it are a short answer
MIN_TOKENS = 8  # of a stream
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
        search: for the streams at which too much delay is added.
    """

    rounds: int = 3
    loads: tuple[Load, ...] = (Load(1, 2), Load(64, 20), Load(512, 250))
    load_s: float = 1.2
    flood: Load = Load(64, 1)
    flood_tokens: int = 300
    requests: int = 256
    at_once: int = 16
    search: Search = Search()

    @property
    def num_steps(self) -> int:
        """How often `measure` calls `on_step` at most."""
        return self.rounds * (
            (len(self.loads) + 1) * (len(WAYS) + 1) + len(WAYS) + 2 * len(self.search.streams)
        )


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
        on_step: called after each step, `plan.num_steps` times at most.

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
    begun = origin()
    with ExitStack() as stack:
        ways = started(stack)
        rounds = asyncio.run(_rounds(ways, plan, on_step))
        most = asyncio.run(limit.search(ways, plan.search, plan.rounds, on_step))
    return {
        **begun,
        "versions": {**begun["versions"], **{name: version(name) for name in PACKAGES}},
        "num_launches": 1,
        "rounds": plan.rounds,
        "loads": [_summary(load, rounds) for load in plan.loads],
        "flood": {
            "streams": plan.flood.streams,
            "offered_tokens_per_s": 1e3 * plan.flood.streams / plan.flood.step_ms,
            "tokens_per_s": {
                way: spread([each.flood[way].tokens_per_s for each in rounds])
                for way in (DIRECT, *WAYS)
            },
        },
        "limit": most,
        "cpu_us_per_request": {
            way: spread([each.request_cpu_us[way] for each in rounds]) for way in WAYS
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
                found[load][name] = await Reading(load, tokens, ways[name]).run(pools[name])
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


def _summary(load: Load, rounds: list[Round]) -> dict[str, Any]:
    cpu_us = [{way: each.loads[load][way].cpu_us for way in WAYS} for each in rounds]
    delays: dict[str, dict[str, dict[str, float]]] = {}
    for way in WAYS:
        delays[way] = {}
        for percent in (50, 99):
            found = [each.loads[load] for each in rounds]
            added = [added_ms(seen[way], seen[DIRECT], percent) for seen in found]
            delays[way][f"p{percent}"] = spread(added)
    return {
        "streams": load.streams,
        "step_ms": load.step_ms,
        "cpu_us_per_token": {way: spread([each[way] for each in cpu_us]) for way in WAYS},
        "cpu_ratio": _ratios(cpu_us),
        "added_delay_ms": delays,
    }


def _ratios(rounds: list[Any]) -> dict[str, dict[str, float]]:
    """Of the gateway over each other way, round by round."""
    ours, *others = WAYS
    return {way: spread([each[ours] / each[way] for each in rounds]) for way in others}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its servers are ended too
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--load-s", type=float, default=Plan.load_s, help="of a load and way")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    if args.out is not None:
        try:
            check_file("--out", args.out)
        except ValueError as error:
            parser.error(str(error))
    plan = Plan(rounds=args.rounds, load_s=args.load_s)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("loads x ways", total=plan.num_steps)
            found = measure(plan, lambda: progress.advance(task))
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        sys.exit(f"benchmarks.gateway.carried: {error}")
    command = shlex.join(["python", "-m", "benchmarks.gateway.carried", *sys.argv[1:]])
    result = {"command": command, **found}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
