"""Words and table cells for results made by hand."""

from typing import Any

import pytest

from loadtest.report.result import result_of
from loadtest.report.warnings import warnings
from loadtest.report.words import (
    Row,
    facts,
    guard_rails,
    headline,
    notes,
    origin,
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
    assert headline(RESULT) == (
        "sparse is 2.00x (2.00 to 2.00) as fast per token as dense and 2.83x (1.85 to 4.33) to the "
        "first token, with 2.11x (1.54 to 2.89) the tokens per second."
    )
    assert headline(result_of(two_pairs(harness={"is_void": True}))).startswith("VOID: sparse is")
    few = headline(result_of(two_pairs()))
    assert few.startswith("sparse is 2.00x (no interval) as fast per token as dense")
    same = headline(result_of(two_pairs(is_aa=True)))
    assert same.startswith("one model under two names: sparse is")
    empty = result_of(recorded([request(None, None, "dense", None)]))
    assert headline(empty) == "Nothing was measured: the warm-up failed."


def test_the_verdict_rests_on_what_was_set() -> None:
    assert verdict(RESULT) == "NO GUARD RAIL SET"
    (text,) = guard_rails(RESULT)
    assert text.startswith("No limit on speed or quality was set (--guard FILE)")
    failed = result_of(four_pairs(harness={"is_void": True, "why": "too slow"}))
    assert verdict(failed) == "NOT PASSED"
    assert guard_rails(failed)[0] == "NOT HELD: void: too slow"
    guarded = result_of(four_pairs(guard={"min_speedup": {"tpot_p50": 1.2}}))
    assert verdict(guarded) == "PASSED"
    assert guard_rails(guarded) == [
        "held: min_speedup.tpot_p50: 2.000 (2.000 to 2.000): its lower end must reach 1.2"
    ]


def test_the_origin_names_machine_and_date() -> None:
    machine = {"cpu": "AMD EPYC", "family": "25", "model": "17", "flags": []}
    found = result_of(two_pairs(machine={**machine, "cores": [0, 1], "load_average": [0, 0]}))
    assert (
        origin(found)
        == "Load test of 2026-11-25 10:00 UTC, AMD EPYC (family 25, model 17), 2 cores"
    )
    assert origin(RESULT) == "Load test of 2026-11-25 10:00 UTC, machine not recorded"


def test_ratios_that_failures_hide_are_told() -> None:
    assert times(None) == "an unknown number of times"
    assert times({"ratio": 0.0, "low": 0.0, "high": 0.0}) == "an unknown number of times"
    assert times({"ratio": 1.2, "low": None, "high": None}) == "1.20x (no interval)"


def test_a_row_by_hand() -> None:
    found = row(RESULT, "TTFT p95, ms")
    assert (found.baseline, found.candidate, found.n) == ("9000", "5000", (12, 12))
    assert (found.speedup, found.interval) == ("1.80x (no interval)", None)  # of 12 requests
    found = row(RESULT, "TTFT p50, ms")
    assert found.interval == pytest.approx((8.5 / 3, 1.854, 4.329), rel=1e-3)
    assert found.speedup == "2.83x (1.85 to 4.33)"
    assert row(RESULT, "TPOT p50, ms").candidate == "250.00"
    assert row(RESULT, "output tokens/s").candidate == "2.0"
    assert [each.label for each in rows(RESULT)][-1] == "output tokens/s"


def test_a_percentile_among_failures_reads_failed() -> None:
    run = two_pairs()
    failed = [request(1, 0, "sparse", None, sent_s=100.0) for _ in range(9)]
    result = result_of(recorded([*run.requests, *failed]))
    found = row(result, "TTFT p99, ms")
    assert (found.candidate, found.speedup, found.interval) == ("failed", "failed", None)
    assert found.n == (6, 15)


def test_goodput_has_rows_of_its_own() -> None:
    result = result_of(two_pairs(slo={"ttft_s": 3.0, "tpot_s": None}))
    assert row(result, "goodput, requests/s").candidate == f"{5 / 9:.3f}"
    assert row(result, "within the limits").baseline == "16.7%"
    assert ("limits", "good is TTFT 3000 ms at most") in facts(result)


def test_a_sound_run_has_no_warnings() -> None:
    assert warnings(result_of(simulated(1, drift=0.0))) == []


def test_tokens_that_arrive_in_one_piece_are_warned_of() -> None:
    requests = [
        request(block, 0, variant, 1.0, itl_s, sent_s=100.0 * block)
        for block, (variant, itl_s) in enumerate((("dense", 1e-5), ("sparse", 0.02)))
    ]
    found = warnings(result_of(recorded(requests)))
    assert found[0].startswith("The tokens of dense arrive in one piece, so TPOT and TTFT say")


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
    starts = [
        "VOID. The harness did not keep up: slip p99 30 ms.",
        "1 of 14 requests failed (dense: timeout x1).",
        "1 of 14 answers do not have the 3 tokens asked for",
        "sparse has no sparse layer",
        "2 block pairs are too few for an interval; give --blocks 4",
        "The run drifted, later half of the blocks over the earlier: dense TTFT",
    ]
    found = warnings(result)
    assert len(found) == len(starts)
    for text, start in zip(found, starts, strict=True):
        assert text.startswith(start)


def test_a_failed_warmup_is_the_only_warning() -> None:
    result = result_of(recorded([request(None, None, "dense", None)]))
    (found,) = warnings(result)
    assert found.startswith("The warm-up failed (dense: http_503 x1).")
    assert notes(result) == []


def test_a_launch_whose_warmup_failed_is_warned_of() -> None:
    lost = recorded([request(None, None, "dense", None)])
    run = joined([simulated(1, drift=0.0), lost, simulated(2, drift=0.0)], simulated(1).about)
    result = result_of(run)
    (found,) = warnings(result)
    assert found.startswith("1 warm-up requests failed, so their launches of the servers were not")
    assert "were not measured; 2 were (all that failed: dense: http_503 x1)." in found
    assert verdict(result) == "NOT PASSED"


def test_a_calibration_says_what_to_expect() -> None:
    aa = result_of(simulated(3, is_aa=True))
    (note,) = (text for text in notes(aa) if text.startswith("A/A"))
    known = aa["speedups"].values()
    num = sum(each["low"] <= 1 <= each["high"] for each in known)
    assert "95 of 100 intervals should hold it" in note
    assert f"here {num} of {len(known)} do" in note


def test_how_it_was_measured() -> None:
    found = dict(facts(result_of(two_pairs(served=SERVED))))
    assert found["load"] == "closed loop, 1 in flight"
    assert found["lengths"] == "10 prompt tokens (median), 3 output tokens each"
    assert found["harness"] == (
        "1 process, requests left 0.40 ms late (p99), 12% of a core (busiest process)"
    )
    assert found["sparse"] == "kernel cast, num_sparse_layers 0"
    found = dict(facts(result_of(two_pairs(schedule="poisson", rate_per_s=4.0))))
    assert found["load"] == "poisson, 4 requests/s on average"


def test_quality_in_a_sentence() -> None:
    assert quality_text(RESULT) is None
    each = {"token_agreement": 0.5, "kl_nats_per_token": 0.25, "num_tokens": 8}
    text = quality_text(result_of(two_pairs(quality=[each, each])))
    assert text is not None
    assert "at 50.0% (50.0% to 50.0%) of the 16 tokens" in text
    assert "0.250 (0.250 to 0.250) nats per token; 2 of 2 prompts" in text
    nothing = {"token_agreement": None, "kl_nats_per_token": None, "num_tokens": 0}
    text = quality_text(result_of(two_pairs(quality=[nothing])))
    assert text == "None of 1 prompts could be compared token by token."
