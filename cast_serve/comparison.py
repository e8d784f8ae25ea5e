"""Request timings of the variants -> rolling dense-over-sparse speed-ups.

The windows hold live traffic: variants may have met other prompts at other times. For a paired
measurement use ``cast-loadtest run``.
"""

import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from cast_serve.latency import RequestTiming

QUANTILES = (0.5, 0.95)
METRICS = ("ttft", "itl", "tpot", "e2e")
MIN_SAMPLES = 5


class Comparison:
    """The latest timings of each variant.

    Args:
        variants: names; the one called dense, else the first, is the baseline, and the first of
            the others the candidate.
        window: how many timings of each metric are kept per variant.
    """

    def __init__(self, variants: Sequence[str], window: int) -> None:
        self.baseline = "dense" if "dense" in variants else variants[0]
        others = [name for name in variants if name != self.baseline]
        self.candidate = others[0] if others else None
        self._samples = {
            name: {metric: deque[float](maxlen=window) for metric in METRICS} for name in variants
        }

    def observe(self, variant: str, timing: RequestTiming) -> None:
        """Adds one finished request."""
        samples = self._samples[variant]
        samples["e2e"].append(timing.e2e_s)
        samples["itl"].extend(timing.itl_s)
        if timing.ttft_s is not None:
            samples["ttft"].append(timing.ttft_s)
        if timing.tpot_s is not None:
            samples["tpot"].append(timing.tpot_s)

    def speedups(self) -> Iterator[tuple[str, float, float]]:
        """(metric, quantile, baseline over candidate) where both have at least 5 samples."""
        if self.candidate is None:
            return
        for metric in METRICS:
            slow = self._samples[self.baseline][metric]
            fast = self._samples[self.candidate][metric]
            if min(len(slow), len(fast)) < MIN_SAMPLES:
                continue
            for quantile in QUANTILES:
                divisor = _quantile(fast, quantile)
                if divisor > 0:
                    yield metric, quantile, _quantile(slow, quantile) / divisor


def _quantile(samples: Sequence[float], quantile: float) -> float:
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return cuts[round(quantile * 100) - 1]
