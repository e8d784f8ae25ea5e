"""Request timings and agreements of the variants -> rolling baseline-over-candidate statistics.

Two kinds of evidence. The *speed-ups* compare live traffic: the variants got different prompts at
different times. The *agreement* and its ratios come from shadow traffic (shadow.py) and are paired:
both variants answered the same prompt. For a controlled measurement use ``cast-loadtest run``.

Intervals are bootstraps with requests as the units (cast_serve/intervals.py), always from the same
seed: the same window gives the same interval. Inter-token gaps of one request depend on each other,
so their ratio comes without one.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cast_serve.gateway.compare.agreement import Agreement
from cast_serve.intervals import (
    CONFIDENCE,
    SEED,
    Array,
    Ratio,
    draws,
    ratio_of_sums,
    resampled_order_statistic,
)
from cast_serve.latency import TIMES, RequestTiming

THROUGHPUT = "output_tokens_per_s"
QUANTILES = (0.5, 0.95)
MIN_SAMPLES = 5  # a side; fewer have no ratio
# A side; of fewer not even one request is expected beyond p95.
MIN_FOR_INTERVAL = 20
MAX_GAPS = 64  # of a request, evenly spaced: they are sorted while requests are served
NUM_RESAMPLES = 200  # a tenth of a load test's: this runs while requests are served


class Comparison:
    """The latest timings of each variant, and the latest agreements.

    Args:
        variants: names; the one called dense, else the first, is the baseline, and the first of
            the others the candidate.
        window: how many requests' values of each metric are kept per variant, and how many
            agreements.

    Attributes:
        epoch: how often `forget` was called; what began in an earlier one is not to be observed.
    """

    def __init__(self, variants: Sequence[str], window: int) -> None:
        self.baseline = "dense" if "dense" in variants else variants[0]
        others = [name for name in variants if name != self.baseline]
        self.candidate = others[0] if others else None
        self.window = window
        self.epoch = 0
        # A request each; of itl its gaps.
        self._samples = {
            name: {
                metric: deque[tuple[float, ...]](maxlen=window) for metric in (*TIMES, THROUGHPUT)
            }
            for name in variants
        }
        self._num_requests = dict.fromkeys(variants, 0)
        self._agreements = deque[Agreement](maxlen=window)

    def observe(self, variant: str, timing: RequestTiming) -> None:
        """Adds one finished request."""
        samples = self._samples[variant]
        self._num_requests[variant] += 1
        for metric, values in times_of(timing).items():
            samples[metric].append(values)
        if timing.output_tokens is not None and timing.e2e_s > 0:
            samples[THROUGHPUT].append((timing.output_tokens / timing.e2e_s,))

    def forget(self, variant: str) -> None:
        """Starts over for a variant that serves another model from now on."""
        self.epoch += 1
        for values in self._samples[variant].values():
            values.clear()
        self._num_requests[variant] = 0
        self._agreements.clear()

    def observe_agreement(self, agreement: Agreement) -> None:
        """Adds one prompt that both variants answered."""
        self._agreements.append(agreement)

    def speedups(self) -> Iterator[tuple[str, float, float]]:
        """(metric, quantile, baseline over candidate) where both have at least 5 requests."""
        for metric in TIMES:
            for quantile, found in _speedups(*self._sides(metric), has_interval=False).items():
                yield metric, quantile, found["ratio"]

    def snapshot(self) -> dict[str, Any]:
        """The body of GET /v1/comparison.

        Ratios are baseline over candidate, above 1 = the candidate is faster: those in `speedups`
        of live traffic, those in `agreement` paired, as geometric means. Below `min_requests.ratio`
        requests a side a speed-up is absent, and below `min_requests.interval` its `low` and `high`
        are, as are an agreement's. `agreement` is None without shadow traffic, and a part of it
        where no request gave one. `num_requests` counts from the start of the model, `n` in the
        window. TTFT, ITL and TPOT are of streamed answers.
        """
        return {
            "baseline": self.baseline,
            "candidate": self.candidate,
            "window": self.window,
            "min_requests": {"ratio": MIN_SAMPLES, "interval": MIN_FOR_INTERVAL},
            "variants": {
                name: {
                    "num_requests": self._num_requests[name],
                    **{f"{metric}_s": _distribution(samples[metric]) for metric in TIMES},
                    THROUGHPUT: _distribution(samples[THROUGHPUT]),
                }
                for name, samples in self._samples.items()
            },
            "speedups": {
                metric: {
                    f"p{quantile * 100:.0f}": found
                    for quantile, found in _speedups(
                        *self._sides(metric), has_interval=metric != "itl"
                    ).items()
                }
                for metric in TIMES
            },
            "agreement": self.agreement(),
        }

    def agreement(self) -> dict[str, Any] | None:
        """That part of `snapshot`."""
        return _summary(self._agreements) if self._agreements else None

    def _sides(self, metric: str) -> tuple[Array, Array, int]:
        """Ascending values of baseline and candidate; the requests of the side with fewer."""
        baseline = self._samples[self.baseline][metric]
        candidate = self._samples[self.candidate][metric] if self.candidate is not None else ()
        num_requests = min(len(baseline), len(candidate))
        return _ascending(baseline), _ascending(candidate), num_requests


def times_of(timing: RequestTiming) -> dict[str, tuple[float, ...]]:
    """Seconds of those of TIMES that a request has: one value, or of itl up to MAX_GAPS gaps."""
    gaps = timing.itl_s
    every = max(1, -(-len(gaps) // MAX_GAPS))
    singles = {"ttft": timing.ttft_s, "tpot": timing.tpot_s, "e2e": timing.e2e_s}
    found: dict[str, tuple[float, ...]] = {
        metric: (value,) for metric, value in singles.items() if value is not None
    }
    return {**found, "itl": tuple(gaps[::every])} if gaps else found


def _ascending(requests: Iterable[tuple[float, ...]]) -> Array:
    return np.sort(np.array([value for values in requests for value in values], float))


def _distribution(requests: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    if not requests:
        return {"p50": None, "p95": None, "p99": None, "n": 0}
    p50, p95, p99 = np.quantile(_ascending(requests), (0.5, 0.95, 0.99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "n": len(requests)}


def _speedups(
    baseline: Array, candidate: Array, num_units: int, has_interval: bool
) -> dict[float, dict[str, Any]]:
    """By quantile, baseline over candidate; of ascending values of so many requests a side."""
    found: dict[float, dict[str, Any]] = {}
    if num_units < MIN_SAMPLES:
        return found
    rng = np.random.default_rng(SEED)
    for quantile in QUANTILES:
        divisor = np.quantile(candidate, quantile)
        if divisor <= 0:  # as the TPOT of an answer that came in one event
            continue
        value = float(np.quantile(baseline, quantile) / divisor)
        found[quantile] = {"ratio": value}
        if has_interval and num_units >= MIN_FOR_INTERVAL:
            above = resampled_order_statistic(baseline, quantile, NUM_RESAMPLES, rng)
            below = resampled_order_statistic(candidate, quantile, NUM_RESAMPLES, rng)
            if below.min() > 0:
                interval = Ratio.of(value, above / below, num_units).about()
                found[quantile] = {**interval, "confidence": CONFIDENCE}
    return found


def _summary(agreements: Iterable[Agreement]) -> dict[str, Any]:
    scored = [agreement for agreement in agreements if agreement.num_tokens]
    tokens = [agreement.num_tokens for agreement in scored]
    shares = _mean([agreement.num_agreeing for agreement in scored], tokens)
    if shares is not None:
        shares |= {"n_requests": len(scored), "n_tokens": sum(tokens)}
    return {
        "token_agreement": shares,
        "kl_nats": _mean([agreement.kl_nats for agreement in scored], tokens),
        "ttft_ratio": _geometric_mean(agreement.ttft_ratio for agreement in agreements),
        "e2e_ratio": _geometric_mean(agreement.e2e_ratio for agreement in agreements),
    }


def _mean(totals: Sequence[float], counts: Sequence[float]) -> dict[str, Any] | None:
    """Sum of totals over sum of counts, which hold one number a request; None without any."""
    if not totals:
        return None
    if len(totals) < MIN_FOR_INTERVAL:
        return {"mean": sum(totals) / sum(counts)}
    resamples = draws(len(totals), NUM_RESAMPLES)
    mean = ratio_of_sums(np.array(totals, float), np.array(counts, float), resamples)
    return {"mean": mean.value, "low": mean.low, "high": mean.high}


def _geometric_mean(ratios: Iterable[float | None]) -> dict[str, float] | None:
    logs = [math.log(ratio) for ratio in ratios if ratio]
    found = _mean(logs, [1] * len(logs))
    return found and {key.replace("mean", "ratio"): math.exp(log) for key, log in found.items()}
