"""Words and table cells for results made by hand."""

from dataclasses import replace
from typing import Any

from loadtest.record import Recorded
from loadtest.report.result import result_of
from loadtest.report.warnings import warnings
from loadtest.report.words import (
    Row,
    facts,
    guard_rails,
    headline,
    notes,
    quality_text,
    rows,
    times,
    verdict,
)
from tests.loadtest.recordings import four_pairs, joined, recorded, request, simulated, two_pairs

RESULT = result_of(four_pairs())
SERVED = {"dense": {"kernel": "dense"}, "sparse": {"kernel": "cast", "num_sparse_layers": "0"}}


def row(result: dict[str, Any], label: str) -> Row:
    (found,) = (each for each in rows(result) if each.label == label)
    return found


def test_headline_by_hand() -> None:
    text = headline(RESULT)
    for part in ("2.00x (2.00 to 2.00)", "2.83x (1.85 to 4.33)", "2.11x (1.54 to 2.89)"):
        assert part in text
    void = two_pairs(harness={"is_void": True, "why": "slow"}, is_aa=True)
    assert headline(result_of(void)).startswith("VOID: one model under two names: sparse is")
    assert "2.00x (no interval)" in headline(result_of(two_pairs()))
    empty = result_of(recorded([request(None, None, "dense", None)]))
    assert headline(empty) == "Nothing was measured: the warm-up failed."
    assert times({"ratio": 0.0, "low": 0.0, "high": 0.0}) == "an unknown number of times"


def test_the_verdict_rests_on_what_was_set() -> None:
    assert verdict(RESULT) == "NO GUARD RAIL SET"
    assert len(guard_rails(RESULT)) == 1
    failed = result_of(four_pairs(harness={"is_void": True, "why": "too slow"}))
    assert verdict(failed) == "INCONCLUSIVE"
    assert guard_rails(failed)[0] == "INCONCLUSIVE: void: too slow"
    guarded = result_of(four_pairs(guard={"min_speedup": {"tpot_p50": 1.2}}))
    assert verdict(guarded) == "PASS"
    (rail,) = guard_rails(guarded)
    assert rail.startswith("pass: min_speedup.tpot_p50: 2.000 (2.000 to 2.000)")


def test_rows_of_failures_and_of_goodput() -> None:
    run = two_pairs()
    failed = [request(1, 0, "sparse", None, sent_s=100.0) for _ in range(9)]
    found = row(result_of(recorded([*run.requests, *failed])), "TTFT p99, ms")
    assert (found.candidate, found.speedup, found.interval) == ("failed", "failed", None)
    assert found.n == (6, 15)
    result = result_of(two_pairs(slo={"ttft_s": 3.0, "tpot_s": None}))
    assert row(result, "goodput, requests/s").candidate == f"{5 / 9:.3f}"
    assert row(result, "within the limits").baseline == "16.7%"
    assert ("limits", "a good request has at most TTFT 3000 ms") in facts(result)


def test_whatever_misleads_is_warned_of_gravest_first() -> None:
    run = two_pairs()
    failed = request(0, 0, "dense", None, error="timeout")
    short = request(1, 0, "sparse", 2.0, output_tokens=2, sent_s=100.0)
    result = result_of(
        recorded(
            [*run.requests, failed, short],
            harness={"is_void": True, "why": "slip p99 30 ms"},
            served=SERVED,
        )
    )
    parts = [
        "VOID: the harness did not keep up: slip p99 30 ms",
        "1 of 14 requests failed: dense timeout x1",
        "1 of 14 responses do not have as many tokens as they were asked for",
        "sparse has no sparse layer",
        "2 block pairs are too few for an interval",
        "The run drifted",
    ]
    for text, part in zip(warnings(result), parts, strict=True):
        assert part in text
    drafted = {**result, "served": {"sparse": {"num_sparse_layers": "0", "draft": "48:64"}}}
    assert len(warnings(drafted)) == len(parts) - 1
    assert warnings(result_of(simulated(1, drift=0.0))) == []
    requests = [
        request(block, 0, variant, 1.0, itl_s, sent_s=100.0 * block)
        for block, (variant, itl_s) in enumerate((("dense", 1e-5), ("sparse", 0.02)))
    ]
    assert "tokens of dense arrive all at once" in warnings(result_of(recorded(requests)))[0]
    run = simulated(1, drift=0.0)
    uncounted = tuple(replace(each, prompt_tokens=None) for each in run.requests)
    (found,) = warnings(result_of(Recorded(run.about, uncounted)))
    assert "no `usage`, so each piece of a stream counts as a token" in found


def test_a_failed_warmup_is_warned_of() -> None:
    lost = recorded([request(None, None, "dense", None)])
    (found,) = warnings(result_of(lost))
    assert "warm-up failed, so nothing was measured: dense http_503 x1" in found
    run = joined([simulated(1, drift=0.0), lost, simulated(2, drift=0.0)], simulated(1).about)
    result = result_of(run)
    (found,) = warnings(result)
    assert "1 warm-up requests failed" in found
    assert "and 2 were; all failures: dense http_503 x1" in found
    assert verdict(result) == "FAIL"


def test_a_calibration_counts_the_intervals_that_hold_1() -> None:
    aa = result_of(simulated(3, is_aa=True))
    (note,) = (text for text in notes(aa) if text.startswith("A/A"))
    known = aa["speedups"].values()
    num = sum(each["low"] <= 1 <= each["high"] for each in known)
    assert f"here {num} of {len(known)} do" in note


def test_facts_and_quality_have_their_figures() -> None:
    found = dict(facts(result_of(two_pairs(served=SERVED))))
    assert found["load"] == "closed loop, 1 in flight"
    assert "0.40 ms late (p99), 12% of a core" in found["harness"]
    assert found["sparse"] == "kernel cast, num_sparse_layers 0"
    found = dict(facts(result_of(two_pairs(schedule="poisson", rate_per_s=4.0))))
    assert found["load"] == "poisson, 4 requests/s on average"
    assert quality_text(RESULT) is None
    each = {"token_agreement": 0.5, "kl_nats_per_token": 0.25, "num_tokens": 8}
    text = quality_text(result_of(two_pairs(quality=[each, each])))
    for part in ("50.0% (50.0% to 50.0%)", "16 tokens", "0.250 (0.250 to 0.250)", "2 of 2"):
        assert part in str(text)
    nothing = {"token_agreement": None, "kl_nats_per_token": None, "num_tokens": 0}
    assert "None of 1 prompts" in str(quality_text(result_of(two_pairs(quality=[nothing]))))
