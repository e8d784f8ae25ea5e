"""Shares and pairs against published values, and the interval's coverage."""

from math import comb

import numpy as np
import pytest

from loadtest.judge.proportions import Pairs, wilson


def test_wilson_as_published() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_pairs_as_published() -> None:
    # Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8.
    pairs = Pairs(both=59, only_baseline=6, only_candidate=16, neither=80)
    assert pairs.difference == pytest.approx((0.0621, 0.0046, 0.1186), abs=5e-5)
    assert pairs.p == pytest.approx(0.0525, abs=5e-5)


def test_p_is_the_binomial_s_two_tails() -> None:
    for baseline, candidate in ((0, 5), (3, 9), (7, 7), (0, 0)):
        num = baseline + candidate
        tails = [
            comb(num, k) / 2**num
            for k in range(num + 1)
            if abs(k - num / 2) >= abs(baseline - num / 2)
        ]
        assert Pairs(4, baseline, candidate, 2).p == pytest.approx(sum(tails))


def test_the_sides_can_be_swapped() -> None:
    mean, low, high = Pairs(7, 1, 5, 3).difference
    assert Pairs(7, 5, 1, 3).difference == pytest.approx((-mean, -high, -low))
    assert Pairs(7, 5, 1, 3).p == Pairs(7, 1, 5, 3).p


def test_pairs_are_counted() -> None:
    found = Pairs.of([True, True, False, False, True], [True, False, True, False, False])
    assert found == Pairs(both=1, only_baseline=2, only_candidate=1, neither=1)
    assert found.about()["difference"]["mean"] == pytest.approx(-0.2)


@pytest.mark.parametrize("pairs", [Pairs(0, 0, 0, 9), Pairs(9, 0, 0, 0)])
def test_no_difference_is_not_certainty(pairs: Pairs) -> None:
    mean, low, high = pairs.difference
    assert mean == 0
    assert low < -0.2 < 0.2 < high
    assert pairs.p == 1


def test_the_interval_holds_the_truth() -> None:
    rng, shares = np.random.default_rng(0), (0.5, 0.1, 0.06, 0.34)
    truth = shares[2] - shares[1]
    tables = rng.multinomial(164, shares, 2000)
    ends = [Pairs(*(int(count) for count in table)).difference[1:] for table in tables]
    held = np.mean([low <= truth <= high for low, high in ends])
    assert 0.94 < held < 0.97
