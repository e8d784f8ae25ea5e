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

`share_interval` does the same for values between 0 and 1, without the assumption that they are
normal: the ratio compares a Beta mixture of shares to one share, again from 1 on. Sources: Robbins,
"Statistical methods related to the law of the iterated logarithm", The Annals of Mathematical
Statistics 41, 1970; for values that are not only 0 and 1, Waudby-Smith and Ramdas, "Estimating
means of bounded random variables by betting", JRSS B 86, 2024.
"""

from collections.abc import Sequence
from math import inf, lgamma, log, pi, sqrt
from statistics import fmean, stdev

from cast_serve.intervals import CONFIDENCE

PRIOR_VARIANCE = 1.0  # of the standardised effect; a larger one favours large effects


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean, low and high; the ends are infinite where so few values cannot reject any mean.

    Args:
        values: at least one, independent and about normal, such as logarithms of ratios.
        confidence: over all looks together.
    """
    num, mean = len(values), fmean(values)
    growth = 1 + num * PRIOR_VARIANCE
    # The likelihood ratio at a squared t of (num - 1) x is
    # ((1 + x) / (1 + x / growth)) ** (num / 2) / sqrt(growth); it is 1 / (1 - confidence) at:
    limit = (growth / (1 - confidence) ** 2) ** (1 / num)
    if num < 2 or limit >= growth:
        return mean, -inf, inf
    x = (limit - 1) / (1 - limit / growth)
    reach = sqrt(x * (num - 1) / num) * stdev(values)
    return mean, mean - reach, mean + reach


def share_interval(total: float, num: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Low and high of the mean of values between 0 and 1, such as failures.

    Args:
        total: sum of the values.
        num: how many they are, at least one.
        confidence: over all looks together.
    """
    # Logarithm of the likelihood under the mixture Beta(1/2, 1/2).
    mixture = lgamma(total + 0.5) + lgamma(num - total + 0.5) - lgamma(num + 1) - log(pi)

    def is_rejected(share: float) -> bool:
        likelihood = total * log(share) + (num - total) * log(1 - share)
        return mixture - likelihood >= -log(1 - confidence)

    def end(outside: float) -> float:
        """Between the observed share and 0 or 1, where the rejected shares begin, by bisection."""
        inside = total / num
        for _ in range(50):
            middle = (inside + outside) / 2
            if middle in (inside, outside):
                break
            inside, outside = (inside, middle) if is_rejected(middle) else (middle, outside)
        return outside

    return end(0.0), end(1.0)
