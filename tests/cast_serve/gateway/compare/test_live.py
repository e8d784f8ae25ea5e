import json
import math
import random
from typing import Any

import pytest

from cast_serve.gateway.compare.agreement import Agreement
from cast_serve.gateway.compare.live import Comparison
from cast_serve.latency import RequestTiming


def timing(ttft_s: float, tpot_s: float) -> RequestTiming:
    events = (ttft_s, ttft_s + tpot_s, ttft_s + 2 * tpot_s)
    return RequestTiming(0.0, events, events[-1], 3)


def filled(num_requests: int, window: int = 8) -> Comparison:
    """Dense takes 0.4 s and 0.06 s a token, sparse 0.2 s and 0.02 s."""
    comparison = Comparison(["sparse", "dense"], window)
    for _ in range(num_requests):
        comparison.observe("dense", timing(0.4, 0.06))
        comparison.observe("sparse", timing(0.2, 0.02))
    return comparison


def test_speedups_are_dense_over_sparse() -> None:
    ratios = {(metric, quantile): ratio for metric, quantile, ratio in filled(5).speedups()}
    assert ratios["ttft", 0.5] == pytest.approx(2)
    assert ratios["tpot", 0.95] == pytest.approx(3)
    assert ratios["itl", 0.5] == pytest.approx(3)
    assert ratios["e2e", 0.5] == pytest.approx((0.4 + 0.12) / (0.2 + 0.04))


def test_too_few_samples_say_nothing() -> None:
    comparison = filled(4)  # requests, with two gaps each
    assert list(comparison.speedups()) == []
    assert set(map(str, comparison.snapshot()["speedups"].values())) == {"{}"}


def test_few_samples_have_a_ratio_and_no_interval() -> None:
    snapshot = filled(19, window=32).snapshot()
    assert snapshot["min_requests"] == {"ratio": 5, "interval": 20}
    assert snapshot["speedups"]["ttft"] == {
        name: {"ratio": pytest.approx(2)} for name in ("p50", "p95")
    }
    assert "low" in filled(20, window=32).snapshot()["speedups"]["ttft"]["p50"]


def test_old_samples_leave_the_window() -> None:
    comparison = Comparison(["dense", "sparse"], window=5)
    for ttft_s in (9.0, 9.0, *[0.3] * 5):
        comparison.observe("dense", timing(ttft_s, 0.01))
        comparison.observe("sparse", timing(0.1, 0.01))
    ratios = {(metric, quantile): ratio for metric, quantile, ratio in comparison.speedups()}
    assert ratios["ttft", 0.95] == pytest.approx(3)
    snapshot = comparison.snapshot()
    assert snapshot["variants"]["dense"]["num_requests"] == 7
    assert snapshot["variants"]["dense"]["ttft_s"]["n"] == snapshot["window"] == 5
    assert snapshot["variants"]["dense"]["ttft_s"]["p99"] == pytest.approx(0.3)


def test_a_snapshot_by_hand() -> None:
    comparison = Comparison(["dense", "sparse"], window=32)
    for dense_s, sparse_s in ((0.1, 0.05), (0.2, 0.1), (0.3, 0.15), (0.4, 0.2), (0.5, 9.0)):
        for _ in range(4):
            comparison.observe("dense", timing(dense_s, 0.05))
            comparison.observe("sparse", timing(sparse_s, 0.025))
    snapshot = comparison.snapshot()
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    assert (snapshot["baseline"], snapshot["candidate"], snapshot["window"]) == (
        "dense",
        "sparse",
        32,
    )
    dense = snapshot["variants"]["dense"]
    assert dense["num_requests"] == 20
    assert dense["ttft_s"] == pytest.approx({"p50": 0.3, "p95": 0.5, "p99": 0.5, "n": 20})
    assert dense["e2e_s"]["p50"] == pytest.approx(0.4)
    assert dense["itl_s"]["n"] == 20  # requests, with two gaps each
    assert dense["output_tokens_per_s"]["p50"] == pytest.approx(3 / 0.4)
    ttft = snapshot["speedups"]["ttft"]["p50"]
    assert ttft["ratio"] == pytest.approx(2)
    assert 0.1 / 9 <= ttft["low"] < 2 < ttft["high"] <= 0.5 / 0.05  # the farthest samples
    assert ttft["confidence"] == 0.95
    tpot = {"ratio": 2, "low": 2, "high": 2, "confidence": 0.95}
    assert snapshot["speedups"]["tpot"] == {key: pytest.approx(tpot) for key in ("p50", "p95")}
    itl = {"ratio": pytest.approx(2)}
    assert snapshot["speedups"]["itl"] == {"p50": itl, "p95": itl}
    assert snapshot["agreement"] is None


def test_another_model_begins_anew() -> None:
    comparison = filled(8)
    epoch = comparison.epoch
    comparison.forget("sparse")
    assert comparison.epoch == epoch + 1
    snapshot = comparison.snapshot()["variants"]
    assert (snapshot["sparse"]["num_requests"], snapshot["dense"]["num_requests"]) == (0, 8)


def test_without_requests_all_is_null() -> None:
    snapshot = Comparison(["only"], window=8).snapshot()
    only = snapshot["variants"]["only"]
    empty = {"p50": None, "p95": None, "p99": None, "n": 0}
    assert only.pop("num_requests") == 0
    assert all(each == empty for each in only.values())
    assert snapshot["candidate"] is None
    assert snapshot["speedups"] == {"ttft": {}, "itl": {}, "tpot": {}, "e2e": {}}


def test_an_answer_in_one_event_has_no_ratio_of_infinity() -> None:
    comparison = Comparison(["dense", "sparse"], window=8)
    for _ in range(5):
        comparison.observe("dense", timing(0.4, 0.06))
        comparison.observe("sparse", RequestTiming(0.0, (0.2,), 0.2, 3))
    snapshot = comparison.snapshot()
    json.dumps(snapshot, allow_nan=False)
    assert snapshot["variants"]["sparse"]["tpot_s"]["p50"] == 0
    assert snapshot["speedups"]["tpot"] == {}


def drawn(seed: int, num_requests: int) -> Comparison:
    """Skewed times, of which dense's are 1.5 times as long at every quantile."""
    rng = random.Random(seed)
    comparison = Comparison(["dense", "sparse"], window=512)
    for _ in range(num_requests):
        comparison.observe("dense", timing(1.5 * rng.lognormvariate(-2, 0.5), 0.01))
        comparison.observe("sparse", timing(rng.lognormvariate(-2, 0.5), 0.01))
    return comparison


def test_the_same_window_gives_the_same_interval() -> None:
    comparison = drawn(0, 20)
    assert comparison.snapshot() == comparison.snapshot() == drawn(0, 20).snapshot()
    assert comparison.snapshot()["speedups"] != drawn(1, 20).snapshot()["speedups"]


@pytest.mark.parametrize(("quantile", "num_requests"), [("p50", 40), ("p95", 400)])
def test_the_interval_covers_the_true_ratio(quantile: str, num_requests: int) -> None:
    intervals = [
        drawn(seed, num_requests).snapshot()["speedups"]["ttft"][quantile] for seed in range(100)
    ]
    covering = sum(of["low"] <= 1.5 <= of["high"] for of in intervals)
    assert 90 <= covering < 100, "95 % should, not all"
    assert sum(of["low"] <= 1.0 for of in intervals) < 30, "they are wide enough to say nothing"


def agreement_summary(*agreements: Agreement) -> Any:
    comparison = Comparison(["dense", "sparse"], window=32)
    for agreement in agreements:
        comparison.observe_agreement(agreement)
    return comparison.snapshot()["agreement"]


def test_agreement_weighs_tokens_and_ratios_are_geometric() -> None:
    found = agreement_summary(Agreement(10, 10, 1.0, 2.0, 4.0), Agreement(30, 20, 7.0, 0.5, None))
    assert found == {
        "token_agreement": {"mean": 0.75, "n_requests": 2, "n_tokens": 40},
        "kl_nats": {"mean": pytest.approx(0.2)},
        "ttft_ratio": {"ratio": pytest.approx(1)},
        "e2e_ratio": {"ratio": pytest.approx(4)},
    }


def test_agreement_has_intervals_from_twenty_requests() -> None:
    found = agreement_summary(*[Agreement(10, 9, 0.5, 2.0, 3.0)] * 20)
    assert found["token_agreement"] == pytest.approx(
        {"mean": 0.9, "low": 0.9, "high": 0.9, "n_requests": 20, "n_tokens": 200}
    )
    assert found["e2e_ratio"] == pytest.approx({"ratio": 3, "low": 3, "high": 3})
    mixed = agreement_summary(
        *(Agreement(10, good, 0.1 * good, 2.0, None) for good in range(6) for _ in range(4))
    )
    assert 0 <= mixed["token_agreement"]["low"] < 0.25 < mixed["token_agreement"]["high"] <= 0.5
    assert mixed["kl_nats"]["low"] < 0.025 < mixed["kl_nats"]["high"]
    assert mixed["e2e_ratio"] is None
    few = agreement_summary(*[Agreement(10, 9, 0.5, 2.0, 3.0)] * 19)
    assert "low" not in few["token_agreement"]
    assert few["e2e_ratio"] == {"ratio": pytest.approx(3)}


def test_latency_alone_claims_no_agreement() -> None:
    found = agreement_summary(Agreement(0, 0, 0.0, 1.5, math.e))
    assert found["token_agreement"] is None
    assert found["kl_nats"] is None
    assert found["e2e_ratio"]["ratio"] == pytest.approx(math.e)
