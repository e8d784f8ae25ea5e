"""A finished request -> the same on the other variant: paired latency and agreement.

The client has its answer by then and does not notice.

    client <-- answer -- gateway, variant A
                            | offer(), returns at once
                            v
              1. the request again, on B            the ratio of the two latencies
              2. prompt and A's answer, on both     what each would have said at every token

Step 2 needs a completion with one prompt and one choice; chats and long texts give latency alone
(agreement.py).
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cast_serve.gateway.compare.agreement import (
    COMPLETIONS,
    MAX_TOKENS,
    Agreement,
    Complete,
    RefusedError,
    agreements,
    is_scorable,
)
from cast_serve.gateway.compare.canary import Canary
from cast_serve.gateway.compare.live import Comparison
from cast_serve.latency import RequestTiming

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0


class Shadow:
    """Repeats a share of the finished requests on the other variant, within a budget.

    Args:
        fraction: share of the requests, 0 to 1; 0 does nothing.
        max_concurrent: how many may be repeated at once; more are dropped and counted.
        comparison: where the agreements go.
        complete: streams if the body says so.
        max_tokens: of prompt and answer together, for agreement; see `max_scored_tokens`.
        canary: where the agreements go, too.
        seed: of the choice of requests.

    Attributes:
        outcomes: how many chosen requests were repeated and observed (`finished`), not repeated for
            want of room (`dropped`), repeated without success (`failed`).
    """

    def __init__(
        self,
        fraction: float,
        max_concurrent: int,
        comparison: Comparison,
        complete: Complete,
        max_tokens: Callable[[], int] = lambda: MAX_TOKENS,
        canary: Canary | None = None,
        seed: int = 0,
    ) -> None:
        self.outcomes = {"finished": 0, "failed": 0, "dropped": 0}
        self._fraction = fraction
        self._max_concurrent = max_concurrent
        self._comparison = comparison
        self._complete = complete
        self._canary = canary
        self._max_tokens = max_tokens
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._logged_s = -math.inf

    @property
    def is_on(self) -> bool:
        """Whether an offer can lead to anything."""
        return self._fraction > 0 and self._comparison.candidate is not None

    def offer(
        self,
        route: str,
        body: Mapping[str, Any],
        variant: str,
        answer_text: str,
        timing: RequestTiming,
    ) -> None:
        """Takes note of a finished request; returns at once and never raises.

        Args:
            route: where it came in, as /v1/completions.
            body: what the client sent.
            variant: who answered.
            answer_text: the first choice's text.
            timing: from when the worker got it, as a repetition does not queue at the gateway.
        """
        comparison = self._comparison
        if not self.is_on or variant not in (comparison.baseline, comparison.candidate):
            return
        if self._random.random() >= self._fraction:
            return
        if len(self._running) >= self._max_concurrent:
            self.outcomes["dropped"] += 1
            return
        task = asyncio.create_task(self._run(route, dict(body), variant, answer_text, timing))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancels what runs; later offers do nothing."""
        self._fraction = 0
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(
        self, route: str, body: dict[str, Any], variant: str, text: str, timing: RequestTiming
    ) -> None:
        epoch = self._comparison.epoch
        try:
            agreement = await self._measure(route, body, variant, text, timing)
        except Exception as error:  # whatever it is, no client may notice
            self.outcomes["failed"] += 1
            self._warn(
                f"{self.outcomes['failed']} shadow requests failed so far, the last with "
                f"{type(error).__name__}: {str(error)[:200]}"
            )
        else:
            self.outcomes["finished"] += 1
            if epoch == self._comparison.epoch:
                self._comparison.observe_agreement(agreement)
                if self._canary is not None:
                    self._canary.observe_agreement(agreement)

    async def _measure(
        self, route: str, body: dict[str, Any], variant: str, text: str, timing: RequestTiming
    ) -> Agreement:
        baseline, candidate = self._comparison.baseline, self._comparison.candidate
        assert candidate is not None
        other = candidate if variant == baseline else baseline
        answer, other_timing = await self._complete(other, body, route)
        timings = {variant: timing, other: other_timing}

        agreement = None
        if route == COMPLETIONS and text and is_scorable(body):
            num_tokens = answer["usage"]["prompt_tokens"], timing.output_tokens or 0
            pair, limit = (baseline, candidate), self._max_tokens()
            try:
                found = await agreements(body, text, *num_tokens, pair, self._complete, limit)
                agreement = found[candidate]
            except RefusedError as error:
                self._warn(f"shadow requests give only latency: {str(error)[:200]}")
        of_baseline, of_candidate = timings[baseline], timings[candidate]
        has_same_length = of_baseline.output_tokens == of_candidate.output_tokens
        return replace(
            agreement or Agreement(0, 0, 0.0, None, None),
            ttft_ratio=_ratio(of_baseline.ttft_s, of_candidate.ttft_s),
            e2e_ratio=_ratio(of_baseline.e2e_s, of_candidate.e2e_s) if has_same_length else None,
        )

    def _warn(self, text: str) -> None:
        """Logs a warning, unless the last one was less than `LOG_INTERVAL_S` ago."""
        if time.monotonic() - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            logger.warning("%s", text)


def _ratio(baseline_s: float | None, candidate_s: float | None) -> float | None:
    return baseline_s / candidate_s if baseline_s and candidate_s else None
