"""Percentiles and ratios against figures worked out by hand."""

import pytest

from cast_serve.latency import RequestTiming
from loadtest.client import Outcome
from loadtest.paired import Block, PairedRun, Plan
from loadtest.statistics import THROUGHPUT, Distribution, Spread, ratios, summarise


def outcome(variant: str, ttft_s: float | None, tpot_s: float = 0.25, tokens: int = 3) -> Outcome:
    """A response of three tokens from time 0 on, or an error if ttft_s is None."""
    if ttft_s is None:
        return Outcome(variant, 0, None, None, "http_503")
    events = tuple(ttft_s + token * tpot_s for token in range(3))
    return Outcome(variant, 0, RequestTiming(0.0, events, events[-1], tokens), 10, None)


def two_pairs() -> PairedRun:
    """Pair 0: TTFT medians 4 and 2. Pair 1: 9 and 3. TPOT 0.5 and 0.25 throughout."""

    def block(pair: int, variant: str, wall_s: float, *ttfts_s: float) -> Block:
        tpot_s = 0.5 if variant == "dense" else 0.25
        outcomes = tuple(outcome(variant, ttft_s, tpot_s) for ttft_s in ttfts_s)
        return Block(pair, variant, 100.0, 100.0 + wall_s, outcomes)

    blocks = (
        block(0, "dense", 9.0, 3.0, 4.0, 8.0),
        block(0, "sparse", 3.0, 1.0, 2.0, 3.0),
        block(1, "sparse", 3.0, 3.0, 3.0, 5.0),
        block(1, "dense", 18.0, 9.0, 9.0, 9.0),
    )
    return PairedRun(Plan(num_prompts=3, num_block_pairs=2, output_tokens=3), 0.0, (), blocks)


def test_distribution_by_hand() -> None:
    # 95 % of the way from rank 0 to rank 4 is rank 3.8: 4 + 0.8 * (9 - 4) = 8.
    assert Distribution.of([9.0, 1.0, 4.0, 2.0, 3.0]) == Distribution(3.0, pytest.approx(8.0), 5)
    assert Distribution.of([1.0, 2.0]).median == 1.5
    assert Distribution.of([]) == Distribution(None, None, 0)


def test_spread_by_hand() -> None:
    assert Spread.of([2.0, 4.0, 1.0]) == Spread(2.0, 1.0, 4.0, 3, [2.0, 4.0, 1.0])
    assert Spread.of([]) == Spread(None, None, None, 0, [])


def test_ratios_by_hand() -> None:
    run = two_pairs()
    assert ratios(run, "ttft") == [2.0, 3.0]  # 4 / 2, 9 / 3
    assert ratios(run, "tpot") == [2.0, 2.0]
    assert ratios(run, THROUGHPUT) == [3.0, 6.0]  # (9/3) / (9/9), (9/3) / (9/18)


def test_summary_by_hand() -> None:
    summary = summarise(two_pairs())
    assert summary["num_requests"] == 12
    assert summary["num_errors"] == 0
    assert summary["prompt_tokens_per_request"] == 10
    assert summary["ttft_s"]["dense"] == {"median": 8.5, "p95": 9.0, "n": 6}
    assert summary["ttft_s"]["sparse"]["median"] == 3.0
    assert summary["itl_s"]["sparse"] == {"median": 0.25, "p95": 0.25, "n": 12}
    # e2e = ttft + 2 * tpot: dense 4 5 9 10 10 10
    assert summary["e2e_s"]["dense"]["median"] == 9.5
    assert summary["output_tokens_per_s"] == {"dense": 18 / 27, "sparse": 3.0}
    assert summary["ratio"]["ttft"] == {
        "median": 2.5,
        "min": 2.0,
        "max": 3.0,
        "num_block_pairs": 2,
        "per_block_pair": [2.0, 3.0],
    }


def test_errors_count_and_leave_no_values() -> None:
    plan = Plan(num_prompts=2, num_block_pairs=2, output_tokens=3)
    blocks = (
        Block(0, "dense", 0.0, 1.0, (outcome("dense", 1.0), outcome("dense", None))),
        Block(0, "sparse", 1.0, 2.0, (outcome("sparse", 1.0), outcome("sparse", 1.0))),
        Block(1, "sparse", 2.0, 3.0, (outcome("sparse", None), outcome("sparse", None))),
        Block(1, "dense", 3.0, 4.0, (outcome("dense", 1.0), outcome("dense", 1.0, tokens=2))),
    )
    summary = summarise(PairedRun(plan, 0.0, (outcome("sparse", 1.0),), blocks))
    assert summary["num_errors"] == 3
    assert summary["num_unequal_lengths"] == 1
    assert summary["errors"] == {"dense": {"http_503": 1}, "sparse": {"http_503": 2}}
    assert summary["ttft_s"]["sparse"]["n"] == 2
    assert summary["ratio"]["ttft"]["num_block_pairs"] == 1  # pair 1 has no sparse value


def test_failed_warmup_gives_empty_figures() -> None:
    run = PairedRun(Plan(), 0.0, (outcome("dense", None),), ())
    summary = summarise(run)
    assert summary["num_warmup_errors"] == 1
    assert summary["errors"]["dense"] == {"http_503": 1}
    assert summary["output_tokens_per_s"] == {"dense": None, "sparse": None}
    assert summary["ratio"]["tpot"]["median"] is None
