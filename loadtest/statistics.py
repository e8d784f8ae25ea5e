"""A paired run -> medians, 95th percentiles and ratios, all of which can be checked by hand.

Percentiles interpolate linearly between neighbours and always come with their n. A ratio is written
so that above 1 the candidate is better: baseline / candidate for times, candidate / baseline for
tokens per second. It is taken within each block pair, of the two blocks' medians; the median,
smallest and largest over the pairs tell how far it can be trusted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cast_serve.latency import RequestTiming
from loadtest.client import Outcome
from loadtest.paired import Block, PairedRun


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


TIMES: dict[str, Callable[[RequestTiming], list[float]]] = {
    "ttft": lambda timing: _known(timing.ttft_s),
    "tpot": lambda timing: _known(timing.tpot_s),
    "itl": lambda timing: timing.itl_s,
    "e2e": lambda timing: [timing.e2e_s],
}
THROUGHPUT = "output_tokens_per_s"


@dataclass(frozen=True)
class Distribution:
    """Where the values of one metric lie; None where n is 0."""

    median: float | None
    p95: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        """Measures the values."""
        if not values:
            return cls(None, None, 0)
        median, p95 = np.percentile(values, [50, 95])
        return cls(float(median), float(p95), len(values))


@dataclass(frozen=True)
class Spread:
    """A ratio over block pairs; above 1 the candidate is better. None without block pairs."""

    median: float | None
    min: float | None
    max: float | None
    num_block_pairs: int
    per_block_pair: list[float]

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Spread":
        """Measures the ratios, one a block pair."""
        if not ratios:
            return cls(None, None, None, 0, [])
        return cls(float(np.median(ratios)), min(ratios), max(ratios), len(ratios), list(ratios))


def times(outcomes: Iterable[Outcome], metric: str) -> list[float]:
    """The values in seconds of one of TIMES, over complete responses."""
    return [value for o in outcomes if o.timing for value in TIMES[metric](o.timing)]


def ratios(run: PairedRun, metric: str) -> list[float]:
    """One ratio a block pair, above 1 = candidate better; pairs without values on a side drop out.

    Args:
        run: the blocks.
        metric: one of TIMES, or THROUGHPUT.
    """
    sides: dict[tuple[int, str], float] = {}
    for block in run.blocks:
        value = _block_value(block, metric)
        if value:
            sides[block.block_pair, block.variant] = value
    found = []
    for pair in range(run.plan.num_block_pairs):
        baseline = sides.get((pair, run.plan.baseline))
        candidate = sides.get((pair, run.plan.candidate))
        if baseline and candidate:
            found.append(candidate / baseline if metric == THROUGHPUT else baseline / candidate)
    return found


def _block_value(block: Block, metric: str) -> float | None:
    if metric == THROUGHPUT:
        return block.output_tokens_per_s
    return Distribution.of(times(block.outcomes, metric)).median


def summarise(run: PairedRun) -> dict[str, Any]:
    """The part of the result that follows from the measured blocks; see report.py for the rest."""
    plan = run.plan
    variants = (plan.baseline, plan.candidate)
    blocks = {v: [b for b in run.blocks if b.variant == v] for v in variants}
    outcomes = {v: [o for b in blocks[v] for o in b.outcomes] for v in variants}
    measured = [o for v in variants for o in outcomes[v]]
    summary: dict[str, Any] = {
        "num_requests": len(measured),
        "num_errors": sum(o.error is not None for o in measured),
        "num_warmup_errors": sum(o.error is not None for o in run.warmup),
        "num_unequal_lengths": len(run.unequal_lengths()),
        "errors": {
            v: dict(
                Counter(o.error for o in (*run.warmup, *outcomes[v]) if o.error and o.variant == v)
            )
            for v in variants
        },
        "prompt_tokens_per_request": Distribution.of(
            [o.prompt_tokens for o in measured if o.prompt_tokens is not None]
        ).median,
    }
    for metric in TIMES:
        summary[f"{metric}_s"] = {
            v: asdict(Distribution.of(times(outcomes[v], metric))) for v in variants
        }
    summary[THROUGHPUT] = {
        v: sum(b.output_tokens for b in blocks[v]) / sum(b.wall_s for b in blocks[v])
        if blocks[v]
        else None
        for v in variants
    }
    summary["ratio"] = {
        metric: asdict(Spread.of(ratios(run, metric))) for metric in (*TIMES, THROUGHPUT)
    }
    return summary
