"""What a run says, against figures worked out by hand; and whether its intervals can be trusted."""

from typing import Any

import pytest

from loadtest.judge.statistics import (
    THROUGHPUT,
    ratios,
    speedups,
    summarise,
    throughput_of,
)
from loadtest.record import Recorded
from tests.loadtest.recordings import four_pairs, joined, recorded, request, simulated, two_pairs

SIDES = ("dense", "sparse")


def summary_of(run: Recorded) -> dict[str, Any]:
    return summarise(run, speedups(run))


def test_ratios_by_hand() -> None:
    run = two_pairs()
    assert ratios(run, "ttft") == [2.0, 3.0]  # 4 / 2, 9 / 3
    assert ratios(run, "tpot") == [2.0, 2.0]
    # Blocks last as long as their slowest answer: TTFT + 2 TPOT = 9, 3.5, 5.5 and 10 s.
    assert ratios(run, THROUGHPUT) == pytest.approx([9 / 3.5, 10 / 5.5])


def test_summary_by_hand() -> None:
    summary = summary_of(two_pairs())
    assert (summary["num_requests"], summary["num_block_pairs"]) == (12, 2)
    assert summary["num_errors"] == 0
    assert summary["error_rate"] == {"dense": 0.0, "sparse": 0.0}
    assert summary["prompt_tokens_per_request"] == 10
    # dense 3 4 8 9 9 9: p95 at rank 4.75, p99 at rank 4.95, both between 9 and 9
    dense = {"median": 8.5, "p95": 9.0, "p99": 9.0, "n": 6, "num_failed": 0}
    # sparse 1 2 3 3 3 5: 3 + 0.75 * 2, 3 + 0.95 * 2
    sparse = {"median": 3.0, "p95": 4.5, "p99": pytest.approx(4.9), "n": 6, "num_failed": 0}
    assert summary["ttft_s"] == {"dense": dense, "sparse": sparse}
    gaps = {"median": 0.25, "p95": 0.25, "p99": 0.25, "n": 12, "num_failed": 0}
    assert summary["itl_s"]["sparse"] == gaps
    assert summary["e2e_s"]["dense"]["median"] == 9.5
    assert summary["output_tokens_per_s"] == {"dense": 18 / 19, "sparse": 18 / 9}
    assert summary["speedups"]["ttft_p50"]["ratio"] == 8.5 / 3.0
    assert summary["speedups"]["throughput"]["ratio"] == pytest.approx(19 / 9)
    assert summary["ratio"]["ttft"] == {
        "median": 2.5,
        "min": 2.0,
        "max": 3.0,
        "num_block_pairs": 2,
        "per_block_pair": [2.0, 3.0],
    }
    assert (summary["slo"], summary["goodput"]) == (None, None)


def test_intervals_of_four_pairs_by_hand() -> None:
    # Pairs 0 and 2 alone give 4 / 2, 1 and 3 alone 9 / 3: so few do not reach as far as chance may.
    found = speedups(four_pairs())
    few = found["ttft_p50"]
    assert (min(few.resampled), max(few.resampled)) == (2.0, 3.0)
    assert few.low is not None
    assert few.high is not None
    assert few.low < 2.0 < 3.0 < few.high
    assert found["tpot_p50"].about() == pytest.approx({"ratio": 2.0, "low": 2.0, "high": 2.0})
    assert found["tpot_p99"].about() == {"ratio": 2.0, "low": None, "high": None}  # 12 requests
    assert (found["itl_p99"].low, found["itl_p95"].low) == (None, None)  # of 24 gaps, as they are
    for few in speedups(two_pairs()).values():
        assert (few.low, few.high) == (None, None)
        assert few.value is not None
    assert min(found["throughput"].resampled) == pytest.approx(10 / 5.5)
    assert max(found["throughput"].resampled) == pytest.approx(9 / 3.5)


def test_failed_requests_are_longer_than_any_answered_one() -> None:
    blocks = {
        (0, 0, "dense"): (1.0, 2.0, 3.0, None),
        (1, 0, "sparse"): (1.0, None, None, None),
        (2, 1, "sparse"): (1.0, 1.0, None, 1.0),
        (3, 1, "dense"): (3.0, 2.0, 1.0, 4.0),
    }
    run = recorded(
        [request(None, None, "sparse", None, error="timeout")]
        + [
            request(*block, ttft_s, sent_s=10.0 * block[0])
            for block, ttfts_s in blocks.items()
            for ttft_s in ttfts_s
        ]
    )
    summary = summary_of(run)
    assert summary["num_errors"] == 5
    assert summary["num_warmup_errors"] == 1
    assert summary["errors"] == {"dense": {"http_503": 1}, "sparse": {"timeout": 1, "http_503": 4}}
    assert summary["error_rate"] == {"dense": 1 / 8, "sparse": 0.5}
    # dense 1 1 2 2 3 3 4 inf: rank 3.5 is 2.5, rank 6.65 touches the failed one
    dense = {"median": 2.5, "p95": None, "p99": None, "n": 8, "num_failed": 1}
    assert summary["ttft_s"]["dense"] == dense
    assert summary["ttft_s"]["sparse"]["median"] is None  # between the fourth 1 and a failed one
    assert summary["itl_s"]["dense"]["num_failed"] == 2  # of three tokens asked for
    assert summary["speedups"]["ttft_p50"]["ratio"] == 0.0
    assert summary["speedups"]["ttft_p99"] == {"ratio": None, "low": None, "high": None}
    assert summary["ratio"]["ttft"]["num_block_pairs"] == 1  # pair 0: sparse has no median


def test_what_has_no_values_has_no_figures() -> None:
    summary = summary_of(recorded([request(None, None, "dense", None)]))
    assert (summary["num_warmup_errors"], summary["speedups"]) == (1, {})
    assert summary["error_rate"] == {"dense": None, "sparse": None}
    run = recorded([request(n, 0, v, 1.0, output_tokens=1) for n, v in enumerate(SIDES)])
    assert summary_of(run)["tpot_s"]["dense"]["median"] is None  # of one token
    assert summary_of(run)["num_unequal_lengths"] == 2
    assert "tpot_p50" not in speedups(run)


def test_drift_by_hand() -> None:
    drift = summary_of(two_pairs())["drift"]["ttft"]["dense"]
    # Blocks at minute 0 and 5 with medians 4 and 9: 1 a minute, of a mean of 6.5.
    assert drift == {
        "per_block_s": [4.0, 9.0],
        "second_half_over_first": 9 / 4,
        "slope_per_minute": pytest.approx(1 / 6.5),
    }


def test_goodput_by_hand() -> None:
    summary = summary_of(two_pairs(slo={"ttft_s": 3.0, "tpot_s": 0.3}))
    # Every dense TPOT is 0.5; five of six sparse TTFTs are 3 at most; blocks last 3.5 and 5.5 s.
    assert summary["goodput"] == {
        "dense": {"requests_per_s": 0.0, "share": 0.0, "n": 6},
        "sparse": {"requests_per_s": pytest.approx(5 / 9), "share": 5 / 6, "n": 6},
    }
    assert summary["speedups"]["goodput"]["ratio"] is None  # over nothing
    summary = summary_of(two_pairs(slo={"ttft_s": 3.0, "tpot_s": None}))
    assert summary["goodput"]["dense"]["share"] == 1 / 6
    assert summary["speedups"]["goodput"]["ratio"] == pytest.approx((5 / 9) / (1 / 19))


@pytest.mark.parametrize("sends_s", [(0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 0.0, 1.0, 1.0, 2.0, 2.0)])
def test_goodput_of_an_open_loop_is_the_rate_that_was_offered(sends_s: tuple[float, ...]) -> None:
    run = recorded(
        [
            request(block, 0, variant, 0.1, sent_s=sent_s)
            for block, variant in enumerate(("dense", "sparse"))
            for sent_s in sends_s
        ],
        schedule="constant",
        rate_per_s=2.0,
        slo={"ttft_s": 1.0, "tpot_s": None},
    )
    assert summary_of(run)["goodput"]["dense"]["requests_per_s"] == pytest.approx(2.0)


def test_a_true_difference_of_5_percent_is_found_in_20_block_pairs() -> None:
    # Requests 5 % noisy, blocks 2 %, eight requests a block, and 20 % drift over the run.
    runs = [speedups(simulated(seed, speedup=1.05)) for seed in range(100, 120)]
    found = sum((run["tpot_p50"].low or 0) > 1 for run in runs)
    ends = [(run["tpot_p50"].low or 0, run["tpot_p50"].high or 0) for run in runs]
    covering = sum(low <= 1.05 <= high for low, high in ends)
    assert found >= 18
    assert covering >= 18


def test_throughput_of_an_open_loop_counts_while_requests_arrive() -> None:
    # Requests leave at 0 and 10 s. Of the baseline's six tokens four have come by then: one answer
    # and one token of the other. The candidate's second answer has not begun.
    found = []
    for block, (variant, ttft_s) in enumerate((("dense", 0.0), ("sparse", 1.0))):
        start_s = 100.0 * block
        found += [
            request(block, 0, variant, ttft_s, 0.25, sent_s=start_s + at_s) for at_s in (0.0, 10.0)
        ]
    run = recorded(found, schedule="constant", rate_per_s=0.1)
    assert [throughput_of(run, block) for block in run.blocks] == [(4.0, 10.0), (3.0, 10.0)]
    assert summary_of(run)["output_tokens_per_s"] == {"dense": 0.4, "sparse": 0.3}
    closed = recorded(found)
    assert [throughput_of(closed, block) for block in closed.blocks] == [(6, 10.5), (6, 11.5)]


def test_launches_are_drawn_before_their_pairs() -> None:
    # In launch 0 the candidate is twice as fast throughout, in launch 1 three times.
    runs = []
    for ttft_s in (2.0, 3.0):
        requests = []
        for pair in range(4):
            requests += [request(2 * pair, pair, "dense", ttft_s, sent_s=20.0 * pair)]
            requests += [request(2 * pair + 1, pair, "sparse", 1.0, sent_s=20.0 * pair + 10)]
        runs.append(recorded(requests))
    run = joined(runs, runs[0].about)
    found = speedups(run)["ttft_p50"]
    assert (found.value, min(found.resampled), max(found.resampled)) == (2.5, 2.0, 3.0)
    assert found.low is not None
    assert found.low < 1  # of two launches, Student's t has one degree of freedom
    summary = summary_of(run)
    assert (summary["num_launches"], summary["num_block_pairs"]) == (2, 8)
    # Dense takes 2 s throughout one launch and 3 s throughout the other: no drift in either.
    drift = summary["drift"]["ttft"]["dense"]
    assert drift["per_block_s"] == [2.0] * 4 + [3.0] * 4
    assert drift["second_half_over_first"] == 1.0
    assert drift["slope_per_minute"] == pytest.approx(0.0, abs=1e-12)


def test_medians_and_rates_of_a_run_that_went_on_have_wider_intervals() -> None:
    once = speedups(simulated(1, num_block_pairs=8))
    found = speedups(simulated(1, num_block_pairs=8, until="certain"))
    for name in ("ttft_p50", "tpot_p50", "throughput"):
        ends = [(each.low or 0.0, each.high or 0.0) for each in (found[name], once[name])]
        assert 0 < ends[0][0] < ends[1][0] < ends[1][1] < ends[0][1]
    assert found["tpot_p95"].low is None
    assert found["tpot_p95"].value == once["tpot_p95"].value
