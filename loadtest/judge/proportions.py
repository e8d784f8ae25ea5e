"""Passes and failures -> a share with its interval, and how two sides differ on the same items.

A *share*: Wilson's interval (JASA 22, 1927). *Paired*: only the items that one side alone passes
say which side is better, so the p value is McNemar's, exact: what a fair coin gives over those
items. The difference of the shares has Newcombe's interval for pairs (Statistics in Medicine 17,
1998, method 10): both sides' Wilson intervals, narrowed by how much the sides agree. Unlike
Student's t, it keeps a width when no item, or every item, is passed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

from cast_serve.intervals import CONFIDENCE

Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(num_passed: int, num: int) -> tuple[float, float]:
    """Both ends of the interval of a share; of at least one item."""
    share, widened = num_passed / num, Z**2 / num
    middle = share + widened / 2
    reach = Z * sqrt(share * (1 - share) / num + widened / (4 * num))
    return max(0.0, (middle - reach) / (1 + widened)), min(1.0, (middle + reach) / (1 + widened))


@dataclass(frozen=True)
class Pairs:
    """How many items two sides pass.

    Attributes:
        both: passed by both sides.
        only_baseline: by the baseline alone.
        only_candidate: by the candidate alone.
        neither: by neither.
    """

    both: int
    only_baseline: int
    only_candidate: int
    neither: int

    @classmethod
    def of(cls, baseline: Sequence[bool], candidate: Sequence[bool]) -> "Pairs":
        """Counts them; the same items in the same order, at least one."""
        pairs = list(zip(baseline, candidate, strict=True))
        ways = ((True, True), (True, False), (False, True), (False, False))
        return cls(*(pairs.count(way) for way in ways))

    @property
    def num(self) -> int:
        """Items."""
        return self.both + self.only_baseline + self.only_candidate + self.neither

    @property
    def p(self) -> float:
        """McNemar's exact p value, two-sided."""
        num = self.only_baseline + self.only_candidate
        fewer = min(self.only_baseline, self.only_candidate)
        return min(1.0, 2 * sum(comb(num, k) for k in range(fewer + 1)) / 2**num)

    @property
    def difference(self) -> tuple[float, float, float]:
        """The candidate's share minus the baseline's, and both ends of its interval."""
        num = self.num
        ours, theirs = self.both + self.only_candidate, self.both + self.only_baseline
        our_low, our_high = (abs(end - ours / num) for end in wilson(ours, num))
        their_low, their_high = (abs(end - theirs / num) for end in wilson(theirs, num))
        phi = self._phi(ours, theirs)
        mean = (ours - theirs) / num
        below = sqrt(our_low**2 - 2 * phi * our_low * their_high + their_high**2)
        above = sqrt(our_high**2 - 2 * phi * our_high * their_low + their_low**2)
        return mean, max(-1.0, mean - below), min(1.0, mean + above)

    def _phi(self, ours: int, theirs: int) -> float:
        """How much the sides agree, -1 to 1, with Newcombe's correction for continuity."""
        margins = ours * (self.num - ours) * theirs * (self.num - theirs)
        if not margins:
            return 0.0
        cross = self.both * self.neither - self.only_baseline * self.only_candidate
        corrected = max(0.0, cross - self.num / 2) if cross > 0 else float(cross)
        return corrected / sqrt(margins)

    def about(self) -> dict[str, Any]:
        """As in tasks.json."""
        mean, low, high = self.difference
        return {
            **asdict(self),
            "p_mcnemar": self.p,
            "difference": {"mean": mean, "low": low, "high": high},
        }
