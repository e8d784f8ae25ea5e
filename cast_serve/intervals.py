"""Values in units, for one side or two -> quantiles, and ratios with a bootstrap interval at 95 %.

The *bootstrap*: as many units as there are get drawn with replacement, many times over; the spread
of the resamples shows how far chance moves the figure. A unit is what is independent of the
others: in a load test a block pair, because the requests of one block meet the same state of the
machine, and a pair shares it across the variants; for answers a prompt or a question. If servers
were launched several times, launches are drawn first and then block pairs within them, because a
launch moves all its pairs together (memory layout, cores): then the launch is what is independent.

*Quantiles*: the interval is the middle of the resamples, widened as a t interval is, to the shares
that Student's t puts at 95 % (the expanded percentile interval of Hesterberg, The American
Statistician 69, 2015). *Sums and rates*, and quantiles of fewer than six units: Student's t times
the resamples' standard deviation, on the logarithm of the ratio; the middle of the resamples is too
narrow there, since it cannot be wider than the resamples' range.
`cast-loadtest coverage` simulates how often these hold the truth (table in benchmarks/serving.md).

*Means of a series* whose neighbours are alike, as a text's blocks are: `series_stderr`.

Quantiles interpolate linearly. inf stands for the time of a request that was never answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
SEED = 0

MIN_UNITS = 6  # for a quantile's interval to be the middle of the resamples

# The 97.5th percentile of Student's t where the series in `student` is not yet exact.
STUDENT_FEW = {1: 12.706, 2: 4.303}

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Resamples:
    """Which units each resample holds.

    Attributes:
        counts: how often it holds each, [num_resamples, num_units].
        num_independent: how many things were drawn independently: groups if there are several,
            else units.
    """

    counts: Counts
    num_independent: int


def finite(value: float) -> float | None:
    """The value, or None for inf and nan, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def quantile(ascending: Array, share: float) -> float:
    """The value below which that share of at least one value lies; inf where it touches an inf."""
    rank = share * (len(ascending) - 1)
    below, part = int(rank), rank - int(rank)
    return float(_between(ascending[below], ascending[min(below + 1, len(ascending) - 1)], part))


def _between(low: Any, high: Any, part: Any) -> Any:
    with np.errstate(invalid="ignore"):  # inf - inf and 0 * inf, which are not taken
        return np.where((part == 0) | (low == high), low, low + part * (high - low))


def draws(
    num_units: int, num_resamples: int = NUM_RESAMPLES, groups: Sequence[int] | None = None
) -> Resamples:
    """Draws units with replacement; the same arguments always give the same resamples.

    Args:
        num_units: at least one.
        num_resamples: how many.
        groups: the group of each unit, [num_units]: groups are drawn first, and then units within
            each group that was drawn. None, or a single one: units are independent.
    """
    rng = np.random.default_rng(SEED)
    names = sorted(set(groups or ()))
    if len(names) < 2:
        counts = rng.multinomial(num_units, [1 / num_units] * num_units, num_resamples)
        return Resamples(counts, num_units)
    group_of = np.array(groups)
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), num_resamples)
    counts = np.zeros((num_resamples, num_units), np.int64)
    for place, name in enumerate(names):
        units = np.flatnonzero(group_of == name)
        size = len(units)
        counts[:, units] = rng.multinomial(size * drawn[:, place], [1 / size] * size)
    return Resamples(counts, len(names))


def resampled_quantile(blocks: Sequence[Array], counts: Counts, share: float) -> Array:
    """One quantile of every resample of blocks of values.

    No resample is built. A block that is drawn k times has each of its values k times, so how many
    values of a resample lie at or below some value follows from one binary search a block, and the
    quantile is found by bisection over all values.

    Args:
        blocks: ascending values of each block; a block is a unit.
        counts: of `draws`.
        share: which quantile.

    Returns:
        [num_resamples]; nan where a resample has no values.
    """
    all_values = np.unique(np.concatenate(blocks))
    num_values = counts @ np.array([len(block) for block in blocks])
    rank = share * (num_values - 1).clip(min=0)

    def at(position: Counts) -> Array:
        """The value at that position of each resample, in ascending order."""
        low = np.zeros(len(counts), np.int64)
        high = np.full(len(counts), len(all_values) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            num_below = np.zeros(len(counts), np.int64)
            for block, drawn in zip(blocks, counts.T, strict=True):
                num_below += drawn * np.searchsorted(block, all_values[middle], side="right")
            is_enough = num_below > position
            low, high = np.where(is_enough, low, middle + 1), np.where(is_enough, middle, high)
        return all_values[low]

    below = rank.astype(np.int64)
    found = _between(at(below), at(np.minimum(below + 1, num_values - 1)), rank - below)
    return np.where(num_values > 0, found, np.nan)


def resampled_order_statistic(
    ascending: Array, share: float, num_resamples: int, rng: np.random.Generator
) -> Array:
    """One quantile of every resample of single values, each a unit; much cheaper than the above.

    A resample of n values draws n ranks at random, and the k-th smallest of n uniform numbers is
    distributed as Beta(k, n + 1 - k). So one draw a resample gives the value at the quantile's
    place (the nearest, without interpolation), whatever n is: the gateway computes this while it
    serves, and `resampled_quantile` with a block for each value would cost it n times as much.

    Args:
        ascending: the values, at least one.
        share: which quantile.
        num_resamples: how many.
        rng: two sides that are compared take one after the other from the same generator, so that
            they are independent.

    Returns:
        [num_resamples].
    """
    n = len(ascending)
    k = round(share * (n - 1)) + 1
    ranks: Array = rng.beta(k, n + 1 - k, num_resamples) * n
    return ascending[ranks.astype(int).clip(max=n - 1)]


def student(num_independent: int) -> float:
    """Student's t at 97.5 %, for the mean of that many values, at least two."""
    freedom, z = num_independent - 1, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    if freedom in STUDENT_FEW:
        return STUDENT_FEW[freedom]
    return (  # Cornish-Fisher: Abramowitz and Stegun 26.7.5
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def series_stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean of a series whose neighbours may be correlated.

    Newey and West's (Econometrica 55, 1987): the variance is summed over lags below 1.3 sqrt(n),
    each weighted less than the one before, as Lazarus, Lewis, Stock and Watson advise (Journal of
    Business & Economic Statistics 36, 2018). Estimated from so few values it is uncertain itself;
    so it is widened by Kiefer and Vogelsang's quantile (Econometric Theory 21, 2005) over 1.96, as
    a t interval is, and 1.96 of it on either side hold the true mean about 95 times in 100.

    Args:
        values: in the order of the text, one for each block.

    Returns:
        None of fewer than two values.
    """
    num = len(values)
    if num < 2:
        return None
    apart = np.asarray(values, np.float64) - np.mean(values)
    bandwidth = ceil(1.3 * sqrt(num))
    total = float(apart @ apart)
    for lag in range(1, bandwidth):
        total += 2 * (1 - lag / bandwidth) * float(apart[lag:] @ apart[:-lag])
    b = bandwidth / num
    widened = (1.9600 + 2.9694 * b + 0.4160 * b**2 - 0.5324 * b**3) / 1.9600
    return widened * sqrt(max(total, 0.0) / (num * (num - 1)))


def tail(num_independent: int) -> float:
    """The share of resamples left out at each end of the interval; 0.025 for many units."""
    if num_independent < 2:
        return 0.0
    widened = sqrt(num_independent / (num_independent - 1))
    return NormalDist().cdf(-student(num_independent) * widened)


@dataclass(frozen=True)
class Ratio:
    """A ratio and its interval.

    Attributes:
        value: of everything that was measured.
        low: lower end of the interval.
        high: its upper end. All three are None where failed requests leave them unknown.
        resampled: the resamples' ratios, [num_resamples].
    """

    value: float | None
    low: float | None
    high: float | None
    resampled: Array

    @classmethod
    def of(cls, value: float, resampled: Array, num_independent: int) -> "Ratio":
        """The interval is the middle of the resamples; fewer units make it wider (`tail`)."""
        low = high = np.nan
        if not np.isnan(resampled).any():
            ordered, left_out = np.sort(resampled), tail(num_independent)
            low, high = quantile(ordered, left_out), quantile(ordered, 1 - left_out)
        return cls(finite(value), finite(low), finite(high), resampled)

    @classmethod
    def of_quantiles(cls, value: float, resampled: Array, num_independent: int) -> "Ratio":
        """As `of`, and of few units as `of_sums`."""
        interval = cls.of if num_independent >= MIN_UNITS else cls.of_sums
        return interval(value, resampled, num_independent)

    @classmethod
    def of_sums(cls, value: float, resampled: Array, num_independent: int) -> "Ratio":
        """The interval is symmetric on the logarithm; unknown if a resample is 0 or not known."""
        low = high = np.nan
        is_known = np.isfinite(resampled).all() and (resampled > 0).all()
        if value > 0 and num_independent > 1 and is_known:
            widened = sqrt(num_independent / (num_independent - 1))
            reach = student(num_independent) * widened * float(np.log(resampled).std())
            low, high = value * np.exp(-reach), value * np.exp(reach)
        return cls(finite(value), finite(low), finite(high), resampled)

    def about(self) -> dict[str, float | None]:
        """As in result.json."""
        return {"ratio": self.value, "low": self.low, "high": self.high}


def ratio_of_sums(above: Array, below: Array, resamples: Resamples) -> Ratio:
    """The sum of `above` over the sum of `below`: a mean, if these are totals and their numbers.

    The terms may be 0 or negative, so the interval is the middle of the resamples.

    Args:
        above: a number for each unit, [num_units].
        below: likewise.
        resamples: of `draws`.
    """
    resampled = (resamples.counts @ above) / (resamples.counts @ below)
    return Ratio.of(above.sum() / below.sum(), resampled, resamples.num_independent)


def ratio_of_quantiles(
    above: Sequence[Array], below: Sequence[Array], resamples: Resamples, share: float
) -> Ratio:
    """One side's quantile over the other's.

    Args:
        above: ascending values of each block.
        below: likewise, of the other side; the same units.
        resamples: of `draws`.
        share: which quantile.
    """
    counts = _with_everything(resamples.counts)
    above_quantiles = resampled_quantile(above, counts, share)
    below_quantiles = resampled_quantile(below, counts, share)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above_quantiles / below_quantiles
    return Ratio.of_quantiles(ratios[0], ratios[1:], resamples.num_independent)


def ratio_of_rates(
    above: Sequence[tuple[float, float]],
    below: Sequence[tuple[float, float]],
    resamples: Resamples,
) -> Ratio:
    """One side's sum of amounts over its sum of seconds, over the same of the other side.

    Args:
        above: (amount, seconds) of each block.
        below: likewise, of the other side; the same units.
        resamples: of `draws`.
    """
    counts = _with_everything(resamples.counts)
    above_sums, below_sums = counts @ np.array(above, float), counts @ np.array(below, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        above_rates = above_sums[:, 0] / above_sums[:, 1]
        ratios = above_rates / (below_sums[:, 0] / below_sums[:, 1])
    return Ratio.of_sums(ratios[0], ratios[1:], resamples.num_independent)


def _with_everything(counts: Counts) -> Counts:
    """The resamples, and before them everything that was measured: each unit once."""
    return np.vstack([np.ones_like(counts[:1]), counts])
