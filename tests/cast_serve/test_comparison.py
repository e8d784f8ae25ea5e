import pytest

from cast_serve.comparison import Comparison
from cast_serve.latency import RequestTiming


def timing(ttft_s: float, tpot_s: float) -> RequestTiming:
    events = (ttft_s, ttft_s + tpot_s, ttft_s + 2 * tpot_s)
    return RequestTiming(0.0, events, events[-1], 3)


def test_speedups_are_dense_over_sparse() -> None:
    comparison = Comparison(["sparse", "dense"], window=8)
    for _ in range(5):
        comparison.observe("dense", timing(0.4, 0.06))
        comparison.observe("sparse", timing(0.2, 0.02))
    ratios = {(metric, quantile): ratio for metric, quantile, ratio in comparison.speedups()}
    assert ratios["ttft", 0.5] == pytest.approx(2)
    assert ratios["tpot", 0.95] == pytest.approx(3)
    assert ratios["itl", 0.5] == pytest.approx(3)
    assert ratios["e2e", 0.5] == pytest.approx((0.4 + 0.12) / (0.2 + 0.04))


def test_too_few_samples_say_nothing() -> None:
    comparison = Comparison(["dense", "sparse"], window=8)
    for _ in range(4):
        comparison.observe("dense", timing(0.4, 0.06))
        comparison.observe("sparse", timing(0.2, 0.02))
    assert "ttft" not in {metric for metric, _, _ in comparison.speedups()}


def test_old_samples_leave_the_window() -> None:
    comparison = Comparison(["dense", "sparse"], window=5)
    for ttft_s in (9.0, 9.0, *[0.3] * 5):
        comparison.observe("dense", timing(ttft_s, 0.01))
        comparison.observe("sparse", timing(0.1, 0.01))
    ratios = {(metric, quantile): ratio for metric, quantile, ratio in comparison.speedups()}
    assert ratios["ttft", 0.95] == pytest.approx(3)


def test_one_variant_has_nothing_to_compare_with() -> None:
    comparison = Comparison(["only"], window=5)
    for _ in range(5):
        comparison.observe("only", timing(0.1, 0.1))
    assert list(comparison.speedups()) == []
