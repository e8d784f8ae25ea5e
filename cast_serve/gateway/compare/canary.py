"""A split's finished requests -> one variant's share of them: up step by step, or back to 0.

The *canary* is compared with the split's other variant, the *stable* one, on the requests that name
the split: chance, or the client's sticky key, has sent them to either. Time is cut into blocks, and
in each both meet the same load. A block gives a value for each speed limit: the logarithm of the
stable variant's quantile over the canary's. The values since the share was last changed give an
interval that holds at every look (cast_serve/anytime.py). One limit that fails (guard.py) sends all
requests to the stable variant until the gateway starts again; all that pass raise the share. At the
last share they begin anew, so that old evidence does not hide new harm, each time at a higher
confidence: the chances of a false alarm sum to 5 % for as long as the share lasts. At a share of 1
speed has nothing to be compared with.

Few values have too low a high quantile, and the canary has few. So both sides' quantiles are taken
over equally many requests, the stable one's as a mean over several such groups: without a
difference between the variants, the expected logarithm is 0.

The interval takes blocks for independent. A *failure* is a request for the canary that ended with
500, 502 or 503, or in whose place its fallback answered. One that the client broke off, whose time
was up, or that found no place in the queue is neither a failure nor an answer.
"""

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from cast_serve import anytime
from cast_serve.errors import UsageError
from cast_serve.gateway.compare.agreement import Agreement
from cast_serve.gateway.compare.live import MIN_SAMPLES, Comparison, times_of
from cast_serve.gateway.exchange import GENERATING, Exchange
from cast_serve.gateway.settings import CanaryPlan, GatewaySettings
from cast_serve.guard import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    RATES,
    Check,
    Guard,
    SpeedLimit,
    agreement_check,
)
from cast_serve.intervals import CONFIDENCE
from cast_serve.latency import QUANTILES

logger = logging.getLogger(__name__)

WAITING, RAISING, LAST, ROLLED_BACK = "waiting", "raising", "last share", "rolled back"
MIN_BLOCKS = 5  # before the share is raised; fewer have no interval either
MAX_ANSWERS = 1000  # per variant that a block keeps

Times = dict[str, tuple[float, ...]]
"""Seconds of one request, of `times_of`."""


@dataclass
class _Evidence:
    """What was seen since the share was last changed.

    Attributes:
        logs: of each speed limit, by its name, a value per block.
        num_blocks: those in which each variant with a share had at least MIN_SAMPLES answers.
        num_answers: of the canary.
        num_failed: likewise.
        agreement: sum of the prompts' shares of tokens that agree; prompts count alike, however
            many tokens they have.
        num_prompts: that have one.
    """

    logs: dict[str, list[float]]
    num_blocks: int = 0
    num_answers: int = 0
    num_failed: int = 0
    agreement: float = 0.0
    num_prompts: int = 0


@dataclass
class _Block:
    """When it ends, and the answers of each variant, or MAX_ANSWERS of them."""

    end_s: float
    answers: dict[str, list[Times]]
    num_answers: Counter[str] = field(default_factory=Counter)

    def add(self, variant: str, times: Times) -> None:
        """Keeps every answer with the same probability (reservoir sampling)."""
        kept = self.answers[variant]
        self.num_answers[variant] += 1
        if len(kept) < MAX_ANSWERS:
            kept.append(times)
        elif (place := random.randrange(self.num_answers[variant])) < MAX_ANSWERS:
            kept[place] = times


class Canary:
    """Moves one split.

    Args:
        plan: the split, its variant and the variant's shares.
        shares: the split's, {variant: share}; changed in place.
        guard: see `canary_of`.
        interval_s: length of a block.
        clock: monotonic seconds.

    Attributes:
        state: WAITING until `begin`, with a share of 0; RAISING; LAST; ROLLED_BACK.
        checks: as of the latest block.
    """

    def __init__(
        self,
        plan: CanaryPlan,
        shares: dict[str, float],
        guard: Guard,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.state = WAITING
        self.checks: list[Check] = []
        self._stable = next(name for name in shares if name != plan.variant)
        self._shares = shares
        self._guard = guard
        self._interval_s = interval_s
        self._clock = clock
        self._step = 0
        self._num_passed = 0  # how often all passed at the last share
        self._start_over(0.0)

    @property
    def share(self) -> float:
        """The canary's, of the split's requests."""
        return self._shares[self.plan.variant]

    def about(self) -> dict[str, Any]:
        """As in GET /v1/comparison."""
        return {
            "model": self.plan.model,
            "variant": self.plan.variant,
            "state": self.state,
            "share": self.share,
            "num_blocks": self._seen.num_blocks,
            "checks": [asdict(check) for check in self.checks],
        }

    def begin(self) -> None:
        """Starts at the first share; call it once all variants are up."""
        self._take(0)
        text = "canary: %s begins at %g of %s, whatever the split's weights are"
        logger.info(text, self.plan.variant, self.share, self.plan.model)

    def forget(self, variant: str) -> None:
        """Starts over for a variant that serves another model from now on; not once rolled back."""
        if variant in self._shares and self.state in (RAISING, LAST):
            logger.info("canary: %s serves another model", variant)
            self.begin()

    def observe(self, exchange: Exchange) -> None:
        """Takes note of a request that has ended."""
        is_ours = exchange.body.get("model") == self.plan.model and exchange.route in GENERATING
        if not is_ours or self.state not in (RAISING, LAST):
            return
        is_canary, has_failed = exchange.variant == self.plan.variant, False
        if exchange.status == 200 and exchange.answered_by == exchange.variant:
            assert exchange.timing is not None
            self._block.add(exchange.variant, times_of(exchange.timing))
            self._seen.num_answers += is_canary
        elif is_canary:
            has_failed = _has_failed(exchange)
            self._seen.num_failed += has_failed
        if self._clock() >= self._block.end_s:
            self._end_block()
        elif has_failed and self._error_check().verdict == FAIL:
            self._judge()

    def observe_agreement(self, agreement: Agreement) -> None:
        """Takes note of a prompt that both variants of the shadow traffic answered."""
        if agreement.num_tokens:
            self._seen.agreement += agreement.num_agreeing / agreement.num_tokens
            self._seen.num_prompts += 1

    @property
    def _confidence(self) -> float:
        if self.state != LAST:
            return CONFIDENCE
        return 1 - (1 - CONFIDENCE) / ((self._num_passed + 1) * (self._num_passed + 2))

    def _take(self, step: int) -> None:
        is_again = step == self._step and self.state == LAST
        self._num_passed = self._num_passed + 1 if is_again else 0
        self._step = step
        self.state = LAST if step == len(self.plan.steps) - 1 else RAISING
        self._start_over(self.plan.steps[step])

    def _start_over(self, share: float) -> None:
        """Gives the canary a share, of which nothing is known yet."""
        self._shares.update({self.plan.variant: share, self._stable: 1 - share})
        self._seen = _Evidence({limit.name: [] for limit in self._guard.speed_limits})
        self._start_block()
        self.checks = list(self._checks())

    def _start_block(self) -> None:
        answers: dict[str, list[Times]] = {self.plan.variant: [], self._stable: []}
        self._block = _Block(self._clock() + self._interval_s, answers)

    def _end_block(self) -> None:
        answers = self._block.answers
        with_share = [answers[name] for name, share in self._shares.items() if share]
        self._seen.num_blocks += min(map(len, with_share)) >= MIN_SAMPLES
        ours, theirs = answers[self.plan.variant], answers[self._stable]
        for limit in self._guard.speed_limits:
            log = _log_ratio(limit.metric, theirs, ours)
            if log is not None:
                self._seen.logs[limit.name].append(log)
        self._start_block()
        self._judge()

    def _judge(self) -> None:
        self.checks = list(self._checks())
        plan, was = self.plan, self.share
        if failed := [check for check in self.checks if check.verdict == FAIL]:
            self.state = ROLLED_BACK
            self._shares.update({plan.variant: 0.0, self._stable: 1.0})
            why = "; ".join(f"{check.name}: {check.why}" for check in failed)
            text = "canary: %s is rolled back from %g of %s to 0: %s"
            logger.error(text, plan.variant, was, plan.model, why)
        elif self._seen.num_blocks >= MIN_BLOCKS and {c.verdict for c in self.checks} == {PASS}:
            self._take(min(self._step + 1, len(plan.steps) - 1))
            if self.share > was:
                text = "canary: %s is raised from %g of %s to %g"
                logger.info(text, plan.variant, was, plan.model, self.share)

    def _checks(self) -> Iterator[Check]:
        yield self._error_check()
        if self.share < 1:
            yield from map(self._speed_check, self._guard.speed_limits)
        if (limit := self._guard.min_token_agreement) is not None:
            yield self._agreement_check(limit)

    def _error_check(self) -> Check:
        limit, num_failed = self._guard.max_error_rate, self._seen.num_failed
        num = num_failed + self._seen.num_answers
        if not num:
            return Check("error_rate", limit, None, INCONCLUSIVE, "no request has ended")
        low, high = anytime.share_interval(num_failed, num, self._confidence)
        rate = num_failed / num
        # Of fewer answers not even one failure is expected at the limit.
        has_passed = rate <= limit and (num * limit >= 1 or not limit)
        verdict = FAIL if low > limit else PASS if has_passed else INCONCLUSIVE
        why = (
            f"{num_failed} of {num} requests failed ({low:.4f} to {high:.4f}): the rate must not "
            f"exceed {limit:g}"
        )
        return Check("error_rate", limit, rate, verdict, why)

    def _agreement_check(self, limit: float) -> Check:
        total, num = self._seen.agreement, self._seen.num_prompts
        if not num:
            why = "no shadow request has been scored"
            return Check("min_token_agreement", limit, None, INCONCLUSIVE, why)
        low, high = anytime.share_interval(total, num, self._confidence)
        return agreement_check(limit, total / num, low, high, num)

    def _speed_check(self, limit: SpeedLimit) -> Check:
        logs = self._seen.logs[limit.name]
        if len(logs) < MIN_BLOCKS:
            _, quantile = limit.metric.split("_")
            why = (
                f"{len(logs)} of {MIN_BLOCKS} blocks; one needs {_least(quantile)} answers of each "
                "variant that have this time"
            )
            return Check(limit.name, limit.limit, None, INCONCLUSIVE, why)
        return limit.check(*map(math.exp, anytime.interval(logs, self._confidence)))


def _has_failed(exchange: Exchange) -> bool:
    """Whether a request that its variant did not answer is a failure of the variant's."""
    return bool(exchange.answered_by) or exchange.status in (500, 502, 503)


def _least(quantile: str) -> int:
    """Answers a side; of fewer not even one is expected beyond the quantile."""
    return max(MIN_SAMPLES, round(1 / (1 - QUANTILES[quantile])))


def _log_ratio(metric: str, stable: Sequence[Times], canary: Sequence[Times]) -> float | None:
    """Logarithm of stable over canary, of a metric such as ttft_p95; None of too few answers."""
    name, quantile = metric.split("_")
    sides = [[times[name] for times in side if name in times] for side in (stable, canary)]
    num = min(map(len, sides))
    if num < _least(quantile):
        return None
    above, below = (_log_quantile(side, QUANTILES[quantile], num) for side in sides)
    return above - below if math.isfinite(above) and math.isfinite(below) else None


def _log_quantile(requests: Sequence[tuple[float, ...]], share: float, num: int) -> float:
    """Logarithm of a quantile of so many requests, as a mean over as many such groups as there are.

    -inf if it is 0, as the TPOT of answers that came in one event.
    """
    num_groups = len(requests) // num
    with np.errstate(divide="ignore"):
        return fmean(
            float(np.log(np.quantile(np.concatenate(requests[first::num_groups][:num]), share)))
            for first in range(num_groups)
        )


def canary_of(
    settings: GatewaySettings, split: Mapping[str, dict[str, float]], comparison: Comparison
) -> Canary | None:
    """The canary that the settings ask for, if any.

    Args:
        settings: of the gateway.
        split: the router's; the canary changes its shares.
        comparison: whose variants the shadow traffic compares.

    Raises:
        UsageError: if the guard rails cannot be read, or live traffic cannot measure one of them.
    """
    plan, path = settings.canary_plan, settings.canary_guard
    if plan is None:
        return None
    assert path is not None  # as canary_plan has checked
    guard = Guard.read(path)
    if not guard.is_set and guard.max_error_rate == 1:
        raise UsageError(
            f"canary_guard {path} limits nothing; give, for example, max_error_rate = 0.01"
        )
    unmeasured = [limit.name for limit in guard.speed_limits if limit.metric in RATES]
    unmeasured += ["max_accuracy_loss"] if guard.max_accuracy_loss is not None else []
    unmeasured += ["allow_void"] if guard.allow_void else []
    if unmeasured:
        raise UsageError(
            f"canary_guard {path}: live traffic cannot measure {unmeasured[0]}; take it out here, "
            "and limit it in cast-loadtest run --guard"
        )
    pair = (comparison.baseline, comparison.candidate)
    is_shadowed = settings.shadow_fraction > 0 and {*split[plan.model]} == {*pair}
    if guard.min_token_agreement is not None and not is_shadowed:
        raise UsageError(
            f"canary_guard {path}: min_token_agreement is {guard.min_token_agreement:g}, but "
            f"shadow_fraction is {settings.shadow_fraction:g} and shadow traffic compares "
            f"{pair[0]!r} with {pair[1]!r}, where the canary is compared within {plan.model!r}; "
            "take the limit out here, and set it in cast-loadtest run --guard"
        )
    return Canary(plan, split[plan.model], guard, settings.canary_interval_s)
