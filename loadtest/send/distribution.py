"""What --output-tokens, --prompt-tokens, --turns and --think-s take -> numbers, drawn from a seed.

32                      always the same
16-256                  evenly from all between, both ends included
lognormal:128:0.8       median 128; the logarithm's standard deviation is 0.8; cut at three
"""

import math
import random
from dataclasses import dataclass, field

from loadtest.errors import UsageError

MOST_SIGMAS = 3.0  # of a log-normal: the longest is then known, and fits a model's context or not


@dataclass(frozen=True)
class Distribution:
    """Parsed from its text.

    Attributes:
        text: as above.
        low: the least number drawn.
        high: the greatest.
        median: of a log-normal; None: numbers are drawn evenly.
        sigma: likewise.

    Raises:
        UsageError: if the text is none of the forms, or not between 0 and infinity.
    """

    text: str
    low: float = field(init=False)
    high: float = field(init=False)
    median: float | None = field(init=False, default=None)
    sigma: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            if self.text.startswith("lognormal:"):
                _, *parts = self.text.split(":")
                median, sigma = map(float, parts)
                reach = math.exp(MOST_SIGMAS * sigma)
                found = {"low": median / reach, "high": median * reach}
                found |= {"median": median, "sigma": sigma}
                is_sound = median > 0 and sigma > 0
            else:
                low, _, high = self.text.partition("-")
                found = {"low": float(low), "high": float(high or low)}
                is_sound = 0 <= found["low"] <= found["high"]
        except (ValueError, OverflowError):
            is_sound = False
        if not is_sound or not math.isfinite(found["high"]):
            raise UsageError(
                f"{self.text!r} is not a length; write 32, 16-256, or lognormal:MEDIAN:SIGMA"
            )
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def number(self, seed: str) -> float:
        """The same seed gives the same."""
        rng = random.Random(seed)
        if self.median is None or self.sigma is None:
            return rng.uniform(self.low, self.high)
        return min(max(rng.lognormvariate(math.log(self.median), self.sigma), self.low), self.high)

    def whole(self, seed: str) -> int:
        """As `number`, a whole one of at least 1."""
        if self.median is None:
            return random.Random(seed).randint(math.ceil(self.low), math.floor(self.high))
        return max(round(self.number(seed)), 1)

    @property
    def middle(self) -> int:
        """The median, whole."""
        return round((self.low + self.high) / 2 if self.median is None else self.median)

    def about(self) -> int | str:
        """As run.json has it: a number where it is always the same."""
        return int(self.text) if self.text.isdigit() else self.text


def numbers(flag: str, text: str) -> Distribution:
    """The numbers of a flag.

    Raises:
        UsageError: as `Distribution`, naming the flag.
    """
    try:
        return Distribution(text)
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from None


def lengths(flag: str, text: str, least: int) -> Distribution:
    """The whole numbers of a flag.

    Raises:
        UsageError: naming the flag, if the text is not a distribution of numbers from `least` up.
    """
    found = numbers(flag, text)
    is_whole = found.median is not None or (found.low.is_integer() and found.high.is_integer())
    if not is_whole or round(found.low) < least:
        what = "may be less than" if is_whole else "is not whole numbers of at least"
        raise UsageError(f"{flag} {text} {what} {least}; raise it")
    return found
