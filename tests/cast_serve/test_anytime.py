"""Intervals that hold at every look, against simulation and the likelihood ratio itself."""

import math

import numpy as np
import pytest

from cast_serve import anytime
from cast_serve.intervals import Array

LOOKS = range(4, 61, 2)


@pytest.mark.parametrize("noise", ["normal", "heavy tails"])
def test_one_look_of_many_misses_the_mean_at_most_5_times_in_100(noise: str) -> None:
    rng = np.random.default_rng(0)
    num_missed = num_missed_by_student = 0
    for _ in range(1000):
        values = rng.normal(0, 3, 60) if noise == "normal" else rng.standard_t(4, 60)
        ends = [anytime.interval(list(values[:num]))[1:] for num in LOOKS]
        num_missed += any(low > 0 or high < 0 for low, high in ends)
        for num in LOOKS:  # as who looks at an ordinary interval again and again
            t = values[:num].mean() / values[:num].std(ddof=1) * math.sqrt(num)
            if abs(t) > 2:
                num_missed_by_student += 1
                break
    assert num_missed <= 50
    assert num_missed_by_student > 150


def test_its_ends_are_where_the_likelihood_ratio_is_20() -> None:
    """The ratio by numerical integration over the effect, not by its closed form."""
    values = np.random.default_rng(1).normal(0.3, 1, 9)
    _, low, _ = anytime.interval(list(values))
    moved = values - low
    num = len(moved)
    # The likelihood of effect d under the prior 1 / sigma of the deviation, up to a factor.
    sigma = np.exp(np.linspace(-4, 4, 2001))[:, None]
    logs = -num * np.log(sigma)

    def likelihood(effects: Array) -> Array:
        z = moved[:, None, None] / sigma - effects
        found: Array = np.exp(logs - 0.5 * (z**2).sum(0)).sum(0)
        return found

    effects = np.linspace(-6, 6, 1201)
    weights = np.exp(-(effects**2) / 2) / math.sqrt(2 * math.pi) * (effects[1] - effects[0])
    ratio = (likelihood(effects) * weights).sum() / likelihood(np.zeros(1))[0]
    assert ratio == pytest.approx(20, rel=1e-3)


def test_few_values_reject_nothing() -> None:
    assert anytime.interval([0.5]) == (0.5, -math.inf, math.inf)
    assert anytime.interval([0.1, 0.2, 0.3])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize("values", ["failures", "shares"])
def test_a_share_is_missed_at_most_5_times_in_100(values: str) -> None:
    rng = np.random.default_rng(2)
    num_missed = 0
    for _ in range(300):
        found = rng.random(400) < 0.05 if values == "failures" else rng.beta(0.5, 0.5, 400)
        mean, sums = 0.05 if values == "failures" else 0.5, np.cumsum(found)
        ends = [anytime.share_interval(float(sums[num - 1]), num) for num in range(1, 401, 7)]
        num_missed += any(low > mean or high < mean for low, high in ends)
    assert num_missed <= 15


def test_a_shares_ends_are_where_the_likelihood_ratio_is_20() -> None:
    shares = (np.arange(200_000) + 0.5) / 200_000
    prior = 1 / (math.pi * np.sqrt(shares * (1 - shares)))
    mixture = (shares**2 * (1 - shares) ** 8 * prior).mean()
    for end in anytime.share_interval(2, 10):
        assert mixture / (end**2 * (1 - end) ** 8) == pytest.approx(20, rel=1e-3)


def test_shares_at_the_border() -> None:
    low, high = anytime.share_interval(0, 100)
    assert low == 0
    assert 0.03 < high < 0.1
    low, high = anytime.share_interval(100, 100)
    assert 0.9 < low < 0.97
    assert high == 1
    assert 0 < anytime.share_interval(1, 1_000_000)[0] < 1e-6  # one failure is more than none
