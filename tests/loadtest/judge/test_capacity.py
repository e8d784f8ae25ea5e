"""Blocks -> rates and capacities: against sums by hand, and against queues of known capacity."""

from math import exp, lgamma, log

import numpy as np
import pytest

from benchmarks.capacity import CASES, measured, truth
from loadtest.judge.capacity import (
    CORRELATIONS,
    SLOPES,
    Posterior,
    Seen,
    capacity,
    centre_of,
    longest_search,
    next_rate,
    rates_of,
    ratio,
    search_rate,
)

GOOD = 0.95
ANY = (0.001, 1000.0)
AROUND_8 = [Seen(6, 40, 40), Seen(8, 38, 40), Seen(10, 31, 40), Seen(7.5, 39, 40), Seen(9, 35, 40)]


def search(capacity_per_s: float, rates: tuple[float, float]) -> list[Seen]:
    """A search in which every request is good up to the capacity and bad above it."""
    seen: list[Seen] = []
    while (rate := search_rate(seen, rates, GOOD)) is not None:
        seen.append(Seen(rate, 20 if rate <= capacity_per_s else 0, 20))
    return seen


def test_a_search_doubles_until_a_block_is_bad() -> None:
    seen = search(5.0, (1.0, 100.0))
    assert [block.rate_per_s for block in seen] == [1, 2, 4, 8]
    assert centre_of(seen, GOOD) == pytest.approx(4 * 2**0.5)


def test_a_search_ends_at_the_highest_rate_and_at_the_lowest() -> None:
    assert [block.rate_per_s for block in search(50.0, (1.0, 6.0))] == [1, 2, 4, 6]
    assert centre_of(search(50.0, (1.0, 6.0)), GOOD) == 6
    assert [block.rate_per_s for block in search(0.1, (1.0, 6.0))] == [1]
    assert centre_of(search(0.1, (1.0, 6.0)), GOOD) == 1


@pytest.mark.parametrize(("request_s", "max_rate"), [(0.5, None), (0.5, 6.0), (0.5, 0.2)])
def test_a_search_takes_no_more_blocks_than_it_says(
    request_s: float, max_rate: float | None
) -> None:
    rates = rates_of(request_s, max_rate)
    assert [block.rate_per_s for block in search(1e9, rates)] == longest_search(rates)
    assert rates[0] == min(0.5, max_rate or 1)


def test_one_late_request_of_few_does_not_end_a_search() -> None:
    assert not Seen(1.0, 3, 4).is_bad(GOOD)
    assert Seen(1.0, 2, 4).is_bad(GOOD)


def test_the_posterior_is_that_of_a_sum_by_hand() -> None:
    """With the log gamma function of the library, on a grid of its own."""
    logs = [log(8) + n / 60 for n in range(-150, 151)]
    shares = []
    for capacity_log in logs:
        total = 0.0
        for slope in SLOPES:
            for correlation in CORRELATIONS:
                prior = (capacity_log - log(7)) ** 2 + (log(slope / 10) / 0.6) ** 2
                found = -0.5 * prior
                for block in AROUND_8:
                    odds = log(19) + slope * (capacity_log - log(block.rate_per_s))
                    odds = max(-20.0, min(odds, 20.0))
                    both = 1 / correlation - 1
                    good, bad = both / (1 + exp(-odds)), both / (1 + exp(odds))
                    found += lgamma(good + block.num_good) - lgamma(good)
                    found += lgamma(bad + block.num - block.num_good) - lgamma(bad)
                    found -= lgamma(both + block.num) - lgamma(both)
                total += exp(found)
        shares.append(total)
    below = np.cumsum(shares) / sum(shares)
    posterior = Posterior(AROUND_8, 7.0, GOOD)
    for share in (0.025, 0.5, 0.975):
        by_hand = float(np.interp(share, below, logs)) + 0.5 / 60  # a cell's end
        assert posterior.quantile(share) == pytest.approx(by_hand, abs=0.005)


def test_blocks_narrow_an_interval() -> None:
    few, many = (capacity(Posterior(seen, 8.0, GOOD), ANY) for seen in (AROUND_8[:3], AROUND_8 * 4))
    assert few[0] is not None
    assert many[0] is not None
    assert few[1] < many[1] < 8 < many[2] < few[2]  # type: ignore[operator]


def test_beyond_the_rates_that_were_tried_there_is_only_a_bound() -> None:
    good = Posterior([Seen(4.0, 50, 50)] * 4, 4.0, GOOD)
    value, low, high = capacity(good, (1.0, 4.0))
    assert (value, high) == (None, None)
    assert 0 < (low or 0) <= 4
    bad = Posterior([Seen(1.0, 0, 20)] * 4, 1.0, GOOD)
    value, low, high = capacity(bad, (1.0, 4.0))
    assert (value, low) == (None, None)
    assert (high or 0) >= 1


def test_a_ratio_of_the_same_blocks_is_one_and_of_twice_the_rate_two() -> None:
    twice = [Seen(2 * block.rate_per_s, block.num_good, block.num) for block in AROUND_8]
    baseline = Posterior(AROUND_8, 7.0, GOOD)
    assert ratio(baseline, baseline)[0] == pytest.approx(1)
    assert ratio(Posterior(twice, 14.0, GOOD), baseline)[0] == pytest.approx(2)


def test_a_ratio_is_surer_where_pairs_agree() -> None:
    seen = [Seen(8.0, num_good, 40) for num_good in (40, 40, 40, 40, 28, 24)]
    baseline, apart = Posterior(seen, 8.0, GOOD), Posterior(seen[::-1], 8.0, GOOD)
    _, *together = ratio(baseline, baseline)
    _, *against = ratio(apart, baseline)
    assert against[0] < together[0] < 1 < together[1] < against[1]  # type: ignore[operator]


def test_the_next_rate_is_near_the_estimate_and_within_the_rates() -> None:
    middle = exp(Posterior(AROUND_8[:4], 7.0, GOOD).quantile(0.5))
    assert next_rate(AROUND_8[:4], 7.0, ANY, GOOD) == pytest.approx(middle)
    assert middle < next_rate(AROUND_8, 7.0, ANY, GOOD) < 1.3 * middle
    assert next_rate(AROUND_8, 7.0, (1.0, 7.0), GOOD) == 7
    assert next_rate([], 7.0, ANY, GOOD) == pytest.approx(7)


@pytest.mark.parametrize("name", ["one by one", "four by four"])
def test_a_queue_of_known_capacity(name: str) -> None:
    """As the mock with max_concurrency: 20 runs of ten pairs, in a simulation."""
    case = CASES[name]
    known = truth(case, 1.0, scale=0.3)
    runs = [measured(case, np.random.default_rng(seed))[0] for seed in range(20)]
    errors = np.array([run[0] for run in runs], float) / known - 1
    assert abs(np.median(errors)) < 0.06
    assert abs(errors).max() < 0.25
    assert sum((run[1] or 0) <= known <= (run[2] or 0) for run in runs) >= 16
