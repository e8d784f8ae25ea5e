"""A request that has ended -> counters, latencies, the canary; maybe its repetition elsewhere."""

from dataclasses import dataclass, replace
from typing import Any

from cast_serve.gateway.bodies import BodyReader
from cast_serve.gateway.compare.canary import Canary
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.metrics import Metrics


@dataclass(eq=False, frozen=True)
class Accounts:
    """Counts the clients' requests, and offers the finished ones to the shadow."""

    metrics: Metrics
    comparison: Comparison
    shadow: Shadow
    bodies: BodyReader
    canary: Canary | None

    def begin(self, route: str, facts: dict[str, Any]) -> Exchange:
        """A request that came in on a route, whose end will be counted; its log line says facts."""
        exchange = Exchange(route, self.shadow.is_on, self._end, facts)
        exchange.epoch = self.comparison.epoch
        return exchange

    def _end(self, exchange: Exchange) -> None:
        self.bodies.release(exchange)
        exchange.facts["outcome"] = exchange.status
        self.metrics.requests.labels(exchange.variant, exchange.route, str(exchange.status)).inc()
        is_current = exchange.epoch == self.comparison.epoch  # else maybe of the model before
        if self.canary is not None and is_current:
            self.canary.observe(exchange)
        timing = exchange.timing
        if timing is None:
            return
        self.metrics.count_tokens(exchange.answered_by, exchange.prompt_tokens, timing)
        # The time of an answer by the fallback holds what the request waited for the variant that
        # failed, which would count as slowness of the one that answered.
        if exchange.answered_by == exchange.variant:
            self.metrics.observe(exchange.answered_by, timing)
            if is_current:
                self.comparison.observe(exchange.answered_by, timing)
        exchange.facts |= {
            "prompt_tokens": exchange.prompt_tokens,
            "output_tokens": timing.output_tokens,
            "ttft_s": None if timing.ttft_s is None else round(timing.ttft_s, 6),
        }
        if not is_current:
            return
        # The repetition does not queue, so what it is held against has no waiting in it either.
        without_queue = replace(timing, intended_send_s=exchange.sent_s)
        self.shadow.offer(
            exchange.route, exchange.body, exchange.answered_by, exchange.text, without_queue
        )
