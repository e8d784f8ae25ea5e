"""Percentiles and intervals against figures worked out by hand, and against drawing for real."""

import math

import numpy as np
import pytest

from cast_serve.intervals import (
    NUM_RESAMPLES,
    Ratio,
    draws,
    quantile,
    ratio_of_quantiles,
    ratio_of_rates,
    ratio_of_sums,
    resampled_order_statistic,
    resampled_quantile,
    series_stderr,
    student,
    tail,
)

INF = math.inf


def test_quantile_by_hand() -> None:
    five = np.array([1.0, 2.0, 3.0, 4.0, 9.0])
    assert quantile(five, 0.5) == 3.0
    assert quantile(five, 0.95) == pytest.approx(8.0)  # rank 3.8: 4 + 0.8 * (9 - 4)
    assert quantile(np.array([1.0, 2.0]), 0.5) == 1.5
    assert quantile(np.array([7.0]), 0.99) == 7.0


def test_quantile_beside_infinity() -> None:
    assert quantile(np.array([1.0, 2.0, INF]), 0.5) == 2.0  # exactly on the 2
    assert quantile(np.array([1.0, INF]), 0.5) == INF
    assert quantile(np.array([INF, INF]), 0.5) == INF


def test_draws_take_as_many_units_as_there_are_and_are_always_the_same() -> None:
    resamples = draws(5)
    counts = resamples.counts
    assert counts.shape == (NUM_RESAMPLES, 5)
    assert (counts.sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.1)
    assert (counts == draws(5).counts).all()
    assert resamples.num_independent == 5
    assert (draws(5, groups=[3] * 5).counts == counts).all()  # one group: units are independent


def test_groups_are_drawn_first_and_their_units_within_them() -> None:
    # Group 0 has units 0, 1, 4 and group 1 units 2, 3: in a quarter of the cases 0 is not drawn.
    resamples = draws(5, groups=[0, 0, 1, 1, 0])
    assert resamples.num_independent == 2
    of_first = resamples.counts[:, [0, 1, 4]].sum(axis=1)
    of_second = resamples.counts[:, [2, 3]].sum(axis=1)
    drawn = {(int(a), int(b)) for a, b in zip(of_first, of_second, strict=True)}
    assert drawn == {(6, 0), (3, 2), (0, 4)}
    assert (of_first == 0).mean() == pytest.approx(0.25, abs=0.04)
    assert resamples.counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.1)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_resampled_quantiles_equal_those_of_values_drawn_for_real(share: float) -> None:
    rng = np.random.default_rng(3)
    # Blocks of unequal size, with values that many of them share.
    blocks = [np.sort(rng.integers(0, 30, size=size) / 7) for size in (1, 4, 9, 30)]
    counts = draws(4).counts
    found = resampled_quantile(blocks, counts, share)
    for drawn, value in list(zip(counts, found, strict=True))[:200]:
        pooled = np.concatenate([np.repeat(b, n) for b, n in zip(blocks, drawn, strict=True)])
        assert value == pytest.approx(np.quantile(pooled, share), rel=1e-12)


def test_resampled_quantiles_beside_infinity_and_nothing() -> None:
    blocks = [np.array([1.0, INF]), np.array([])]
    found = resampled_quantile(blocks, np.array([[2, 0], [1, 1], [0, 2]]), 0.5)
    assert found.tolist()[:2] == [INF, INF]
    assert math.isnan(found[2])


def test_interval_by_hand() -> None:
    # 41 ratios from 1.00 to 1.40: 2.5 % of the way lies at rank 1, 97.5 % at rank 39.
    ratio = Ratio.of(1.2, 1 + np.arange(41) / 100, 10**9)
    assert ratio.about() == {"ratio": 1.2, "low": pytest.approx(1.01), "high": pytest.approx(1.39)}


def test_the_tail_is_that_of_students_t() -> None:
    # t(0.975) = 2.262 with 9 degrees of freedom: Phi(-2.262 * sqrt(10 / 9)) = Phi(-2.3844)
    assert tail(10) == pytest.approx(0.00855, rel=2e-3)
    # 2.093 with 19: Phi(-2.1474)
    assert tail(20) == pytest.approx(0.01588, rel=2e-3)
    assert tail(10**6) == pytest.approx(0.025, rel=1e-3)
    assert tail(1) == 0


def test_students_t_by_table() -> None:
    for num_independent, t in ((2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (10, 2.262)):
        assert student(num_independent) == pytest.approx(t, rel=0.01)


def test_interval_of_sums_by_hand() -> None:
    # Logarithms 0.1 from the middle: t(0.975) = 2.262 times 0.1 times sqrt(10 / 9) is 0.2384.
    resampled = np.exp(np.array([-0.1, 0.1] * 50))
    ratio = Ratio.of_sums(2.0, resampled, 10)
    assert ratio.low == pytest.approx(2 * math.exp(-0.2384), rel=1e-3)
    assert ratio.high == pytest.approx(2 * math.exp(0.2384), rel=1e-3)
    for unknown in ([1.0, 0.0], [1.0, INF], [1.0, math.nan]):
        assert Ratio.of_sums(2.0, np.array(unknown), 10).about() == {
            "ratio": 2.0,
            "low": None,
            "high": None,
        }


def test_two_units_by_hand() -> None:
    # Drawn: both (ratio 2.5) in half the cases, one alone (2 or 3) in a quarter each.
    sides = ([np.array([4.0]), np.array([6.0])], [np.array([2.0]), np.array([2.0])])
    ratio = ratio_of_quantiles(*sides, draws(2), 0.5)
    assert (ratio.value, set(ratio.resampled)) == (2.5, {2.0, 2.5, 3.0})
    assert ratio == Ratio.of_sums(2.5, ratio.resampled, 2)  # their middle is too narrow
    assert ratio.low is not None
    assert ratio.low < 1


def test_of_six_units_and_more_the_middle_of_the_resamples_is_taken() -> None:
    above, below = [np.array([2.0 + unit]) for unit in range(6)], [np.array([2.0])] * 6
    ratio = ratio_of_quantiles(above, below, draws(6), 0.5)
    assert ratio == Ratio.of(2.25, ratio.resampled, 6)


def test_rates_by_hand() -> None:
    # 30 tokens in 10 s over 20 tokens in 20 s: 3. Alone: 10/5 over 10/10, and 20/5 over 10/10.
    fast, slow = [(10.0, 5.0), (20.0, 5.0)], [(10.0, 10.0), (10.0, 10.0)]
    ratio = ratio_of_rates(fast, slow, draws(2))
    assert (ratio.value, set(ratio.resampled)) == (3.0, {2.0, 3.0, 4.0})
    assert ratio == Ratio.of_sums(3.0, ratio.resampled, 2)
    assert ratio.low is not None
    assert ratio.low < 1  # two units say next to nothing


def test_what_failures_leave_unknown_is_none() -> None:
    failed, answered = [np.array([INF])], [np.array([2.0])]
    counts = draws(1)
    assert ratio_of_quantiles(answered, failed, counts, 0.5).value == 0.0
    none = {"ratio": None, "low": None, "high": None}
    assert ratio_of_quantiles(failed, answered, counts, 0.5).about() == none
    assert ratio_of_quantiles(failed, failed, counts, 0.5).about() == none


def test_sums_by_hand() -> None:
    # 1 + 6 over 1 + 2. Alone: 1 over 1, and 6 over 2.
    ratio = ratio_of_sums(np.array([1.0, 6.0]), np.array([1.0, 2.0]), draws(2))
    assert ratio.about() == {"ratio": pytest.approx(7 / 3), "low": 1.0, "high": 3.0}


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_order_statistics_are_distributed_as_quantiles_of_values_drawn_for_real(
    share: float,
) -> None:
    rng = np.random.default_rng(7)
    values = np.sort(rng.lognormal(size=101))
    found = resampled_order_statistic(values, share, 4000, rng)
    picked = np.quantile(rng.choice(values, (4000, 101)), share, axis=1)
    for part in (0.1, 0.5, 0.9):
        # 0.03 is almost three standard errors of the difference of two such shares.
        at = np.quantile(picked, part)
        assert (found <= at).mean() == pytest.approx((picked <= at).mean(), abs=0.03)
    assert set(found) <= set(values)


def test_the_order_statistic_of_one_value_is_that_value() -> None:
    rng = np.random.default_rng(0)
    assert resampled_order_statistic(np.array([2.0]), 0.95, 3, rng).tolist() == [2.0, 2.0, 2.0]


def test_the_standard_error_of_a_series_by_hand() -> None:
    # About the mean: -0.1, 0.1, 0. Bandwidth 3; lag 1 sums to -0.01 and weighs 2/3, lag 2 to 0.
    variance = (0.02 - 2 * (2 / 3) * 0.01) / (3 * 2)
    widened = (1.96 + 2.9694 + 0.416 - 0.5324) / 1.96  # as many lags as values
    assert series_stderr([0.1, 0.3, 0.2]) == pytest.approx(widened * math.sqrt(variance))
    assert series_stderr([5.0] * 9) == 0
    assert series_stderr([1.0]) is None


@pytest.mark.parametrize("num_blocks", [128, 896])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5, 0.7])
def test_intervals_of_a_correlated_series_hold_the_mean(
    correlation: float, num_blocks: int
) -> None:
    """Blocks of a text: one that is harder than the mean stands beside others that are."""
    rng = np.random.default_rng(0)
    num_held = num_held_as_if_independent = 0
    for _ in range(1000):
        series = rng.standard_normal(num_blocks + 50)
        for place in range(1, len(series)):
            series[place] += correlation * series[place - 1]
        losses = series[50:]  # without the beginning, which has no neighbour before it
        reach, apart = 1.96 * (series_stderr(losses.tolist()) or 0), abs(losses.mean())
        num_held += apart < reach
        num_held_as_if_independent += apart < 1.96 * losses.std(ddof=1) / math.sqrt(num_blocks)
    assert 900 <= num_held <= 970
    assert (num_held_as_if_independent < 870) == (correlation > 0)
