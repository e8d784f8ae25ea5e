"""A request that has ended -> counters and latencies, and maybe its repetition elsewhere."""

import dataclasses
from typing import Any

from cast_serve.gateway.bodies import BodyReader
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.metrics import Metrics


class Accounts:
    """Counts the clients' requests.

    Args:
        metrics: where they are counted.
        comparison: where latencies are compared.
        shadow: to which finished requests are offered.
        bodies: which holds theirs until then.
    """

    def __init__(
        self, metrics: Metrics, comparison: Comparison, shadow: Shadow, bodies: BodyReader
    ) -> None:
        self._metrics = metrics
        self._comparison = comparison
        self._shadow = shadow
        self._bodies = bodies

    def begin(self, route: str, facts: dict[str, Any]) -> Exchange:
        """A request that came in, whose end will be counted.

        Args:
            route: where.
            facts: what its log line says; more is added.
        """
        exchange = Exchange(route, self._shadow.is_on, self._end, facts)
        exchange.epoch = self._comparison.epoch
        return exchange

    def _end(self, exchange: Exchange) -> None:
        self._bodies.release(exchange)
        exchange.facts["outcome"] = exchange.status
        self._metrics.requests.labels(exchange.variant, exchange.route, str(exchange.status)).inc()
        timing = exchange.timing
        if timing is None:
            return
        self._metrics.count_tokens(exchange.answered_by, exchange.prompt_tokens, timing)
        is_current = exchange.epoch == self._comparison.epoch  # else maybe of the model before
        # The time of an answer by the fallback holds what the request waited for the variant that
        # failed, which would count as slowness of the one that answered.
        if exchange.answered_by == exchange.variant:
            self._metrics.observe(exchange.answered_by, timing)
            if is_current:
                self._comparison.observe(exchange.answered_by, timing)
        exchange.facts |= {
            "prompt_tokens": exchange.prompt_tokens,
            "output_tokens": timing.output_tokens,
            "ttft_s": None if timing.ttft_s is None else round(timing.ttft_s, 6),
        }
        if not is_current:
            return
        # The repetition does not queue, so what it is held against has no waiting in it either.
        without_queue = dataclasses.replace(timing, intended_send_s=exchange.sent_s)
        self._shadow.offer(
            exchange.route, exchange.body, exchange.answered_by, exchange.text, without_queue
        )
