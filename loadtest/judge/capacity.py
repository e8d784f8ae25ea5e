"""Blocks of requests at several rates -> the next rate to try, and a variant's capacity.

*Capacity* is the highest Poisson arrival rate at which a share `good` of the requests meets every
limit. `search_rate` doubles the rate until a block is clearly bad; from there on `next_rate` puts
blocks around the estimate.

**Model.** The log odds of a good request fall on a line as the log of the rate rises:

    logit P(good | rate) = logit(good) + slope * (log capacity - log rate)

Requests of one block meet the same bursts, so the number of good ones is beta-binomial, with an
unknown correlation between them. The posterior over log capacity, slope and correlation is summed
on a grid; its median is the estimate. A likelihood does not mind that each rate was chosen by what
came before, and stays wide where few requests were late. A bootstrap over blocks has neither
property: its intervals held the truth in 50 to 85 % of simulated runs.

**Interval.** The middle 95 % of the posterior, widened by MODEL_ERROR: no queue follows the line
exactly. `python -m benchmarks.capacity` simulates how often intervals hold the truth.

**Ratio.** The blocks of a pair share their arrivals and the machine's state, so the errors of both
estimates partly cancel. How much follows from the correlation of both blocks' residuals over pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from statistics import NormalDist

import numpy as np

from cast_serve.intervals import Array
from loadtest.judge.proportions import Z, wilson

FILL_SHARE = 0.2  # of a block; requests that arrive in it meet an emptier server and do not count
SEARCH_SHARE = 1 / 3  # length of a block of the search over that of a measured one
START_SHARE = 0.25  # of the rate that a server carries which takes one request after the other
MIN_REQUESTS = 4  # in a block; of fewer, one late request is clearly bad
STEP = 2.0  # of the rate, from block to block of the search
MAX_STEP = 1.5  # of a measured block's rate above the highest before
AIMS = (0.0, 1.0, 0.5, -0.5)  # log odds below `good` at which blocks aim, in turn
MIN_SLOPE = 6.0  # that turns an aim into a rate: at most 1.2 times the estimate

# The prior: log-normal around the search and a slope of 10, log-uniform for the correlation.
CAPACITY_LOG_SD, SLOPE_LOG_SD = 1.0, 0.6
SLOPES = 10 * np.exp(np.linspace(-1.5, 1.5, 13))
CORRELATIONS = np.geomspace(0.002, 0.4, 9)
NUM_CAPACITIES = 101
MODEL_ERROR = 0.01  # standard deviation of log capacity, chosen by simulation

Estimate = tuple[float | None, float | None, float | None]
"""A value with the ends of its 95 % interval; None: not known."""


@dataclass(frozen=True)
class Seen:
    """One block.

    Attributes:
        rate_per_s: of arrivals.
        num_good: counted requests that met every limit.
        num: counted requests.
    """

    rate_per_s: float
    num_good: int
    num: int

    def is_bad(self, good: float) -> bool:
        """Whether the share's 95 % interval lies below `good`."""
        return wilson(self.num_good, self.num)[1] < good


def rates_of(request_s: float, max_rate: float | None) -> tuple[float, float]:
    """Lowest and highest rate to try, of a server that answers one request in `request_s`."""
    lowest = START_SHARE / request_s
    return (lowest, 2**10 * lowest) if max_rate is None else (min(lowest, max_rate), max_rate)


def longest_search(rates: tuple[float, float]) -> list[float]:
    """The rates of a search in which no block is bad."""
    num_steps = ceil(log(rates[1] / rates[0], STEP) - 1e-9)
    return [min(rates[0] * STEP**n, rates[1]) for n in range(num_steps + 1)]


def search_rate(seen: Sequence[Seen], rates: tuple[float, float], good: float) -> float | None:
    """The next rate of a search over `rates`, lowest and highest; None once it is over."""
    if not seen:
        return rates[0]
    last = seen[-1].rate_per_s
    return None if seen[-1].is_bad(good) or last >= rates[1] else min(STEP * last, rates[1])


def centre_of(seen: Sequence[Seen], good: float) -> float:
    """The rate at which a search that is over puts the capacity."""
    is_between = len(seen) > 1 and seen[-1].is_bad(good)
    return seen[-1].rate_per_s / (sqrt(STEP) if is_between else 1)


class Posterior:
    """What measured blocks tell of a variant's capacity.

    Args:
        seen: the blocks, in any order.
        centre: of the prior, a rate.
        good: share of requests that must meet every limit.

    Attributes:
        logs: the grid's log capacities, [NUM_CAPACITIES].
        shares: their probabilities.
        slope: its mean.
        residuals: by block, its share of good requests minus the expected one, over the standard
            deviation that the correlation gives it; in the order of `seen`.
    """

    def __init__(self, seen: Sequence[Seen], centre: float, good: float) -> None:
        middle, reach = log(centre), 3 * CAPACITY_LOG_SD
        for _ in range(2):  # over the whole prior, then where the probability is
            self.logs = middle + np.linspace(-reach, reach, NUM_CAPACITIES)
            logs, slopes = self.logs[:, None, None], SLOPES[:, None]
            odds = [
                log(good / (1 - good)) + slopes * (logs - log(each.rate_per_s)) for each in seen
            ]
            expected = [1 / (1 + np.exp(-each.clip(-20, 20))) for each in odds]
            posterior = -0.5 * (
                ((logs - log(centre)) / CAPACITY_LOG_SD) ** 2
                + (np.log(slopes / 10) / SLOPE_LOG_SD) ** 2
                + np.zeros_like(CORRELATIONS)
            )
            for block, share in zip(seen, expected, strict=True):
                posterior += _beta_binomial(block, share)
            posterior = np.exp(posterior - posterior.max())
            posterior /= posterior.sum()
            self.shares = posterior.sum(axis=(1, 2))
            middle, reach = self.quantile(0.5), max(6 * self.sd, 0.02)
        self.slope = float(posterior.sum(axis=(0, 2)) @ SLOPES)
        self.residuals = np.array(
            [
                (block.num_good / block.num - (posterior * share).sum())
                / sqrt((posterior * share * (1 - share) * (1 / block.num + CORRELATIONS)).sum())
                for block, share in zip(seen, expected, strict=True)
            ]
        )

    def quantile(self, share: float) -> float:
        """Log capacity below which that share of the probability lies."""
        return float(np.interp(share, self.shares.cumsum() - self.shares / 2, self.logs))

    @property
    def sd(self) -> float:
        """Standard deviation of the log capacity."""
        return sqrt(self.shares @ (self.logs - self.shares @ self.logs) ** 2)


def _beta_binomial(block: Seen, share: Array) -> Array:
    """Log likelihood of a block by mean share, [..., 1], and CORRELATIONS; up to a constant."""
    total = 1 / CORRELATIONS - 1  # alpha + beta of the beta distribution
    found: Array = (
        _log_rising(share * total, block.num_good)
        + _log_rising((1 - share) * total, block.num - block.num_good)
        - _log_rising(total, block.num)
    )
    return found


def _log_rising(base: Array, num: int) -> Array:
    """Log of base * (base + 1) * ... * (base + num - 1), by Stirling's series for log gamma."""

    def log_gamma(x: Array) -> Array:
        y = x + 6  # where the series is exact to 1e-10
        series = (y - 0.5) * np.log(y) - y + 1 / (12 * y) - 1 / (360 * y**3)
        return series - np.log(x * (x + 1) * (x + 2) * (x + 3) * (x + 4) * (x + 5))

    return log_gamma(base + num) - log_gamma(base)


def next_rate(
    seen: Sequence[Seen], centre: float, rates: tuple[float, float], good: float
) -> float:
    """Where the next measured block tells most, within `rates`; `centre` as for Posterior."""
    posterior = Posterior(seen, centre, good)
    highest = max((block.rate_per_s for block in seen), default=centre)
    aim = AIMS[len(seen) % len(AIMS)] / max(posterior.slope, MIN_SLOPE)
    rate = min(exp(posterior.quantile(0.5)), MAX_STEP * highest) * exp(aim)
    return min(max(rate, rates[0]), rates[1])


def capacity(posterior: Posterior, rates: tuple[float, float]) -> Estimate:
    """The estimate; beyond `rates`, lowest and highest, only a bound."""
    tail = NormalDist().cdf(-Z * sqrt(1 + (MODEL_ERROR / posterior.sd) ** 2))
    value, low, high = (exp(posterior.quantile(share)) for share in (0.5, tail, 1 - tail))
    if value > rates[1]:
        return None, min(low, rates[1]), None
    if value < rates[0]:
        return None, None, max(high, rates[0])
    return value, low, high


def ratio(candidate: Posterior, baseline: Posterior) -> Estimate:
    """The candidate's capacity over the baseline's; both of the same pairs, in the same order."""
    ours, theirs = candidate.residuals, baseline.residuals
    alike = (ours @ theirs) / sqrt((ours @ ours) * (theirs @ theirs))
    alike = max(0.0, float(alike)) * (1 - 1 / len(ours))  # of few pairs it proves little
    variance = candidate.sd**2 + baseline.sd**2 - 2 * alike * candidate.sd * baseline.sd
    reach = Z * sqrt(variance)
    middle = candidate.quantile(0.5) - baseline.quantile(0.5)
    return exp(middle), exp(middle - reach), exp(middle + reach)
