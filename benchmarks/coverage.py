"""Kinds of noise -> how often a load test's intervals hold the truth.

    .venv/bin/python -m benchmarks.coverage [--runs 1000] [--out FILE]

`cast-loadtest coverage` is the same.

Runs are simulated whose true speed-up is known, with the default of six block pairs, and intervals
are made of them as judge/statistics.py makes them. A 95 % interval should hold the truth in 95 of
100 runs, whatever the machine's noise is like. All noise is multiplicative:

    independent   every request by itself, log-normal, 5 %
    blocks        5 % a request, and 5 % on top that a block's requests share
    correlated    5 % a request, and 8 % that carries over from block to block (correlation 0.8)
    heavy tails   every request by itself, Student's t with 2 degrees of freedom times 5 %
    disturbed     5 % a request, and one block in six takes 1.5 times as long
    launches      5 % a request, 2 % a block, and 4 % by which each variant differs from launch to
                  launch of the servers: with one launch no interval can know it
    few blocks    as blocks, with four block pairs, the fewest that have an interval

*until certain*: the share of runs whose interval of `--until certain` (cast_serve/anytime.py) holds
the truth at every look, from four block pairs to thirty, two more at a time; not of launches, of
which such a run has one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cast_serve import anytime
from cast_serve.intervals import Array, Ratio, draws, ratio_of_quantiles, ratio_of_rates
from cast_serve.latency import QUANTILES
from cast_serve.options import option
from cast_serve.provenance import origin
from loadtest.judge.statistics import MIN_BLOCK_PAIRS
from loadtest.progress import progress
from loadtest.report import commands
from loadtest.report.directory import check_file

TRUTH = 1.3
NUM_PAIRS = 6
MOST_PAIRS = 30  # of a run that goes on until it is certain
UNTIL_CERTAIN = "until certain"
NUM_PROMPTS = 20  # a block; 120 a variant, enough for a p99
LAUNCHES = {f"launches, {n} launch{'es' * (n > 1)}": n for n in (1, 2, 3, 6)}
NOISES = (
    *("independent", "blocks", "correlated", "heavy tails", "disturbed", "few blocks"),
    *LAUNCHES,
)

app = typer.Typer(add_completion=False)


def coverage(num_runs: int, seed: int, on_run: Callable[[], None]) -> dict[str, Any]:
    """Simulates every kind of noise.

    Args:
        num_runs: simulated runs of each.
        seed: the same seed gives the same result.
        on_run: called after each run, for a progress bar.

    Returns:
        `coverage`: by noise and by figure (p50, p95, p99 of a time; rate), the share of runs whose
        interval holds the truth; and what was simulated.
    """
    found: dict[str, dict[str, float]] = {}
    for noise in NOISES:
        rng = np.random.default_rng(seed)
        num_held = dict.fromkeys([*QUANTILES, "rate"], 0)
        if noise not in LAUNCHES:
            num_held[UNTIL_CERTAIN] = 0
        for _ in range(num_runs):
            for name, ratio in _intervals(_simulated(noise, rng), LAUNCHES.get(noise, 1)).items():
                num_held[name] += (ratio.low or 0.0) <= TRUTH <= (ratio.high or 0.0)
            on_run()
        for _ in range(num_runs * (noise not in LAUNCHES)):
            num_held[UNTIL_CERTAIN] += _holds_at_every_look(_simulated(noise, rng, MOST_PAIRS))
        found[noise] = {name: number / num_runs for name, number in num_held.items()}
    return {
        "coverage": found,
        "nominal": 0.95,
        "num_runs": num_runs,
        "seed": seed,
        "num_block_pairs": NUM_PAIRS,
        "num_prompts": NUM_PROMPTS,
        "true_speedup": TRUTH,
    }


def _simulated(noise: str, rng: np.random.Generator, num_pairs: int | None = None) -> Array:
    """Times of baseline and candidate, [2, num_pairs, num_prompts]; None: as many as usual."""
    num_launches = LAUNCHES.get(noise, 1)
    if num_pairs is None:
        num_pairs = MIN_BLOCK_PAIRS if noise == "few blocks" else NUM_PAIRS * num_launches
    logs = rng.normal(0, 0.05, (2, num_pairs, NUM_PROMPTS))
    if noise in ("blocks", "few blocks"):
        logs += rng.normal(0, 0.05, (2, num_pairs, 1))
    elif noise == "correlated":
        shared = np.empty(2 * num_pairs)  # in the order in which blocks run
        shared[0] = rng.normal(0, 0.08)
        for block in range(1, len(shared)):
            shared[block] = 0.8 * shared[block - 1] + rng.normal(0, 0.08 * 0.6)
        in_pairs = shared.reshape(num_pairs, 2)
        in_pairs[1::2] = in_pairs[1::2, ::-1].copy()  # ABBA: the candidate goes first
        logs += in_pairs.T[:, :, None]
    elif noise == "heavy tails":
        logs = 0.05 * rng.standard_t(2, logs.shape)
    elif noise == "disturbed":
        logs += np.log(1.5) * (rng.random((2, num_pairs, 1)) < 1 / 6)
    elif noise in LAUNCHES:
        logs += rng.normal(0, 0.02, (2, num_pairs, 1))
        of_launch = rng.normal(0, 0.04, (2, num_launches))
        logs += np.repeat(of_launch, NUM_PAIRS, axis=1)[:, :, None]
    logs[1] -= np.log(TRUTH)
    return np.exp(logs)


def _intervals(times: Array, num_launches: int) -> dict[str, Ratio]:
    num_pairs = times.shape[1]
    launch_of_pair = [pair // NUM_PAIRS for pair in range(num_pairs)]
    resamples = draws(num_pairs, groups=launch_of_pair if num_launches > 1 else None)
    baseline, candidate = np.sort(times, axis=2)
    found = {
        name: ratio_of_quantiles(list(baseline), list(candidate), resamples, share)
        for name, share in QUANTILES.items()
    }
    rates = [[(float(NUM_PROMPTS), float(block.sum())) for block in side] for side in times]
    found["rate"] = ratio_of_rates(rates[1], rates[0], resamples)
    return found


def _holds_at_every_look(times: Array) -> bool:
    """Whether the interval of the median's ratio holds the truth after every other block pair."""
    baseline, candidate = np.median(times, axis=2)
    logs = [float(log) for log in np.log(baseline / candidate)]
    ends = (anytime.interval(logs[:num])[1:] for num in range(MIN_BLOCK_PAIRS, len(logs) + 1, 2))
    return all(low <= np.log(TRUTH) <= high for low, high in ends)


@app.command()
def simulate(
    runs: Annotated[int, option("N", "Simulated runs per kind of noise.", min=1)] = 1000,
    seed: Annotated[int, option("N", "Same seed, same result.")] = 0,
    out: Annotated[Path | None, option("FILE", "JSON file to write.", "none")] = None,
) -> None:
    """Simulates how often a report's 95 % intervals hold the truth, by kind of noise."""
    with simulated(out, runs * len(NOISES)) as (begun, advance):
        found = {**begun, **coverage(runs, seed, advance)}
    conclude(found, "noise", found["coverage"], out)


@contextmanager
def simulated(
    out: Path | None, num_runs: int
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Refuses an --out that cannot be written; gives the record's origin, and what counts a run."""
    try:
        if out is not None:
            check_file("--out", out)
    except ValueError as error:
        commands.refuse(error)
    begun = origin()
    with progress("runs", num_runs) as (advance, _):
        yield begun, advance


def conclude(
    found: dict[str, Any], what: str, shares: Mapping[str, Mapping[str, float]], out: Path | None
) -> None:
    """Prints the shares, by `what` and figure, writes what was found, and ends the command."""
    table = Table(caption="share of runs whose interval holds the truth; it should be 95 %")
    for heading in (what, *next(iter(shares.values()))):
        table.add_column(heading)
    for name, by_figure in shares.items():
        table.add_row(name, *(f"{share:.1%}" for share in by_figure.values()))
    Console().print(table)
    failures = []
    if out is not None:
        text = json.dumps(found, indent=2) + "\n"
        failures = commands.attempt(f"--out {out}", lambda: out.write_text(text, encoding="utf-8"))
    commands.finish(found, failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process with the exit code.

    Args:
        arguments: None for those of this process.
    """
    app(arguments, prog_name="python -m benchmarks.coverage")


if __name__ == "__main__":
    main()
