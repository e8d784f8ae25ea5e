"""Values that keep coming -> an interval of their mean that holds however often one looks.

A 95 % interval that is looked at after each block until it says what one hopes for misses the truth
far more often than 5 times in 100. This one does not: over all looks together it misses the mean of
normal values, of whatever variance, at most 5 times in 100. It is the sequential t-test: the ratio
of the likelihood where the standardised effect (mean over standard deviation) is drawn from a
normal distribution to that where it is 0, under the same scale-invariant prior of the variance,
is a martingale that starts at 1, so it reaches 20 at most once in 20 series (Ville's inequality).
The interval holds the means that it does not reject. Sources: Lai, "On confidence sequences", The
Annals of Statistics 4, 1976; Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for
Gaussian means with unknown variance", 2023. `cast-loadtest coverage` simulates it.
"""

from collections.abc import Sequence
from math import inf, sqrt
from statistics import fmean, stdev

from cast_serve.intervals import CONFIDENCE

PRIOR_VARIANCE = 1.0  # of the standardised effect; a larger one favours large effects


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high at 95 %; the ends are infinite where so few values cannot reject any mean.

    Args:
        values: at least one, independent and about normal, such as logarithms of ratios.
    """
    num, mean = len(values), fmean(values)
    growth = 1 + num * PRIOR_VARIANCE
    # The likelihood ratio at a squared t of (num - 1) x is
    # ((1 + x) / (1 + x / growth)) ** (num / 2) / sqrt(growth); it is 1 / (1 - CONFIDENCE) at:
    limit = (growth / (1 - CONFIDENCE) ** 2) ** (1 / num)
    if num < 2 or limit >= growth:
        return mean, -inf, inf
    x = (limit - 1) / (1 - limit / growth)
    reach = sqrt(x * (num - 1) / num) * stdev(values)
    return mean, mean - reach, mean + reach
