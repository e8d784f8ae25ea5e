"""An interval that holds at every look, against simulation and the likelihood ratio itself."""

import math

import numpy as np
import pytest

from cast_serve.intervals import Array
from loadtest.judge import anytime
from loadtest.judge.statistics import speedups
from tests.loadtest.recordings import simulated

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


def test_medians_and_rates_of_a_run_that_went_on_have_wider_intervals() -> None:
    once = speedups(simulated(1, num_block_pairs=8))
    found = speedups(simulated(1, num_block_pairs=8, until="certain"))
    for name in ("ttft_p50", "tpot_p50", "throughput"):
        ends = [(each.low or 0.0, each.high or 0.0) for each in (found[name], once[name])]
        assert 0 < ends[0][0] < ends[1][0] < ends[1][1] < ends[0][1]
    assert found["tpot_p95"].low is None
    assert found["tpot_p95"].value == once["tpot_p95"].value
