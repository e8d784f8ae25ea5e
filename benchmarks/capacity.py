"""Simulated servers -> how often the intervals of `cast-loadtest capacity` hold the true capacity.

    .venv/bin/python -m benchmarks.capacity [--runs 200] [--out FILE]

Each run searches and measures as the command does, by the same rules (loadtest/judge/capacity.py)
and with its defaults, ten block pairs of 30 s, on two servers, one of them 1.3 times as fast. The
truth is found by bisection over simulations of 160,000 requests.

    one by one        each request takes 0.1 s alone (M/D/1); TTFT within 0.5 s
    one by one, fast  0.01 s and 0.05 s: ten times as many requests in a block
    four by four      four requests at once, 0.8 s each (M/D/4); TTFT within 1 s
    batching          all requests at once, 64 tokens each; a step takes 10 ms, 1 ms more for each
                      request in flight and 5 ms for each new one; TTFT within 0.5 s, TPOT 50 ms
    batching, slow    48 tokens; 30 ms, 8 ms and 30 ms; TTFT within 1 s, TPOT 100 ms; blocks of
                      100 s, as 30 s are 24 requests
    ..., noisy        each block 2 % faster or slower, and each pair another 2 %
    ..., four pairs   the fewest that have an interval
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.coverage import conclude, simulated
from cast_serve.intervals import Array
from cast_serve.options import option
from loadtest.judge import capacity
from loadtest.judge.capacity import Estimate, Posterior, Seen

GOOD = 0.95
SPEEDUP = 1.3
FIGURES = ("baseline", "candidate", "ratio")
NOISE = 0.02

Met = NDArray[np.bool_]
Server = Callable[[Array, float], Met]
"""(arrivals in seconds, factor on all times) -> which requests meet the limits."""

app = typer.Typer(add_completion=False)


def queue(service_s: float, num_at_once: int, ttft_s: float) -> Server:
    """A server that works on so many requests at once, the others wait."""

    def is_good(due_s: Array, factor: float) -> Met:
        free_s, waits_s = [0.0] * num_at_once, []
        for time_s in due_s:
            start_s = max(time_s, free_s[0])
            heapq.heapreplace(free_s, start_s + service_s * factor)
            waits_s.append(start_s - time_s)
        met: Met = np.array(waits_s) <= ttft_s
        return met

    return is_good


def batching(
    step_s: float, each_s: float, new_s: float, tokens: int, ttft_s: float, tpot_s: float
) -> Server:
    """A server that gives each request in flight a token a step; a new one joins the next step."""

    def is_good(due_s: Array, factor: float) -> Met:
        num = len(due_s)
        first_s, last_s, last_step = np.empty(num), np.empty(num), np.empty(num, int)
        now_s, step, come, gone = 0.0, 0, 0, 0
        while gone < num:
            if come == gone and come < num:
                now_s = max(now_s, due_s[come])
            old = come
            while come < num and due_s[come] <= now_s:
                last_step[come] = step + tokens - 1
                come += 1
            now_s += factor * (step_s + each_s * (come - gone) + new_s * (come - old))
            first_s[old:come] = now_s
            while gone < come and last_step[gone] == step:
                last_s[gone] = now_s
                gone += 1
            step += 1
        met: Met = (first_s - due_s <= ttft_s) & ((last_s - first_s) / (tokens - 1) <= tpot_s)
        return met

    return is_good


@dataclass(frozen=True)
class Case:
    """A server, how long a request takes alone, and how it is measured."""

    server: Server
    request_s: float
    block_s: float = 30.0
    noise: float = 0.0
    num_pairs: int = 10


ONE, FOUR = queue(0.1, 1, 0.5), queue(0.8, 4, 1.0)
BATCHING = batching(0.010, 0.001, 0.005, 64, 0.5, 0.05)
CASES = {
    "one by one": Case(ONE, 0.1),
    "one by one, fast": Case(queue(0.01, 1, 0.05), 0.01),
    "four by four": Case(FOUR, 0.8),
    "batching": Case(BATCHING, 0.71),
    "batching, slow": Case(batching(0.03, 0.008, 0.03, 48, 1.0, 0.1), 1.85, block_s=100.0),
    "one by one, noisy": Case(ONE, 0.1, noise=NOISE),
    "batching, noisy": Case(BATCHING, 0.71, noise=NOISE),
    "one by one, four pairs": Case(ONE, 0.1, num_pairs=4),
    "batching, four pairs": Case(BATCHING, 0.71, num_pairs=4),
}


def arrivals(rate: float, seconds: float, rng: np.random.Generator) -> Array:
    """Poisson arrivals; the same generator gives the same pattern at every rate."""
    due_s: Array = rng.exponential(size=int(2 * rate * seconds) + 50).cumsum() / rate
    return due_s[: max(capacity.MIN_REQUESTS, int((due_s < seconds).sum()))]


def observed(server: Server, rate: float, seconds: float, factor: float, seed: int) -> Seen:
    """One block."""
    due_s = arrivals(rate, seconds, np.random.default_rng(seed))
    counts = due_s >= seconds * capacity.FILL_SHARE
    is_good = server(due_s, factor)[counts if counts.any() else slice(None)]
    return Seen(rate, int(is_good.sum()), len(is_good))


def truth(case: Case, speed: float, scale: float = 1.0) -> float:
    """The capacity of a server of that speed.

    Args:
        case: what is simulated.
        speed: 2 halves all times.
        scale: how long to simulate.
    """
    rng = np.random.default_rng(1)
    rounds, length = (8, 20_000) if case.noise == 0 else (60, 3000)
    patterns = [rng.exponential(size=round(length * scale)).cumsum() for _ in range(rounds)]
    factors = np.exp(case.noise * np.sqrt(2) * rng.standard_normal(rounds // 2))
    factors = np.concatenate([factors, 1 / factors]) / speed
    low, high = 0.1, 500.0
    while high / low > 1.002:
        rate = np.sqrt(low * high)
        shares = [
            case.server(due_s / rate, factor)[len(due_s) // 10 :].mean()
            for due_s, factor in zip(patterns, factors, strict=True)
        ]
        low, high = (rate, high) if np.mean(shares) >= GOOD else (low, rate)
    return float(np.sqrt(low * high))


def measured(case: Case, rng: np.random.Generator) -> list[Estimate]:
    """A run as the command has it: both servers' capacities, and the ratio."""

    def seen(rate: float, seconds: float, speed: float, shared: float, seed: int) -> Seen:
        factor = np.exp(case.noise * (shared + rng.standard_normal())) / speed
        return observed(case.server, rate, seconds, float(factor), seed)

    speeds, sides = (1.0, SPEEDUP), []
    for speed in speeds:
        rates = capacity.rates_of(case.request_s / speed, None)
        blocks: list[Seen] = []
        while (rate := capacity.search_rate(blocks, rates, GOOD)) is not None:
            seconds, seed = case.block_s * capacity.SEARCH_SHARE, int(rng.integers(2**32))
            blocks.append(seen(rate, seconds, speed, 0.0, seed))
        sides.append((rates, capacity.centre_of(blocks, GOOD), list[Seen]()))
    for _ in range(case.num_pairs):
        shared, seed = float(rng.standard_normal()), int(rng.integers(2**32))
        for speed, (rates, centre, blocks) in zip(speeds, sides, strict=True):
            rate = capacity.next_rate(blocks, centre, rates, GOOD)
            blocks.append(seen(rate, case.block_s, speed, shared, seed))
    baseline, candidate = (Posterior(blocks, centre, GOOD) for _, centre, blocks in sides)
    return [
        capacity.capacity(baseline, sides[0][0]),
        capacity.capacity(candidate, sides[1][0]),
        capacity.ratio(candidate, baseline),
    ]


def coverage(num_runs: int, seed: int, on_run: Callable[[], None]) -> dict[str, Any]:
    """Simulates every case.

    Args:
        num_runs: simulated runs of each.
        seed: the same seed gives the same result.
        on_run: called after each run, for a progress bar.

    Returns:
        `cases`: by case and by figure (baseline, candidate, ratio) the truth, the share of runs
        whose interval holds it, the mean error of the estimate and the interval's mean width, both
        of the logarithm.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in CASES.items():
        baseline, candidate = truth(case, 1.0), truth(case, SPEEDUP)
        rng = np.random.default_rng(seed)
        runs = []
        for _ in range(num_runs):
            runs.append(measured(case, rng))
            on_run()
        truths = (baseline, candidate, candidate / baseline)
        found[name] = {}
        for place, (figure, true) in enumerate(zip(FIGURES, truths, strict=True)):
            values, lows, highs = np.array([run[place] for run in runs], float).T
            held = (lows <= true) & (true <= highs)
            found[name][figure] = {
                "truth": true,
                "coverage": float(held.mean()),
                "bias": float(np.nanmean(np.log(values / true))),
                "sd": float(np.nanstd(np.log(values / true))),
                "width": float(np.nanmean(np.log(highs / lows))),
            }
    return {
        "cases": found,
        "nominal": 0.95,
        "num_runs": num_runs,
        "seed": seed,
        "good": GOOD,
    }


@app.command()
def simulate(
    runs: Annotated[int, option("N", "Simulated runs per case.", min=1)] = 200,
    seed: Annotated[int, option("N", "Same seed, same result.")] = 0,
    out: Annotated[Path | None, option("FILE", "JSON file to write.", "none")] = None,
) -> None:
    """Simulates how often the 95 % intervals of `cast-loadtest capacity` hold the truth."""
    with simulated(out, runs * len(CASES)) as (begun, advance):
        found = {**begun, **coverage(runs, seed, advance)}
    shares = {
        case: {figure: about["coverage"] for figure, about in figures.items()}
        for case, figures in found["cases"].items()
    }
    conclude(found, "case", shares, out)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.capacity")
