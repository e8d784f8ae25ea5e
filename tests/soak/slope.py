"""Samples over requests -> what grows with each 1,000 of them, with its standard error.

Least squares on the means of NUM_BATCHES stretches of the run: neighbouring samples depend on each
other, and a line through all of them would promise too small an error. The first WARM_UP of the run
is left out: caches and windows fill up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_BATCHES = 10
WARM_UP = 0.3
SURE = 3.0  # standard errors above 0


@dataclass(frozen=True)
class Slope:
    """Growth for each 1,000 requests.

    Attributes:
        value: of the line.
        error: its standard error.
        growth: over all that was looked at, by the line.
    """

    value: float
    error: float
    growth: float

    def grows(self, allowed: float) -> bool:
        """Whether it surely rises, and by more than is allowed over the run."""
        return self.value > SURE * self.error and self.growth > allowed


def slope(num_requests: Sequence[int], values: Sequence[float]) -> Slope | None:
    """The line through the batch means; None for fewer than three samples a batch."""
    start = int(len(values) * WARM_UP)
    x = np.asarray(num_requests[start:], dtype=float) / 1000
    y = np.asarray(values[start:], dtype=float)
    if len(y) < 3 * NUM_BATCHES or x[-1] == x[0]:
        return None
    x_means = np.array([part.mean() for part in np.array_split(x, NUM_BATCHES)])
    y_means = np.array([part.mean() for part in np.array_split(y, NUM_BATCHES)])
    centred = x_means - x_means.mean()
    spread = float((centred**2).sum())
    value = float((centred * y_means).sum()) / spread
    rest = y_means - y_means.mean() - value * centred
    error = float(np.sqrt((rest**2).sum() / (NUM_BATCHES - 2) / spread))
    return Slope(value, error, value * float(x[-1] - x[0]))
