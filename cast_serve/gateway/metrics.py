"""Finished requests -> the gateway's own metrics, cast_*, and the workers' behind them.

The workers' keep their names and get the labels ``variant`` and ``replica`` (its place in the
variant's list, from 0), so that one scrape of the gateway sees everything (upstream/exposition.py).
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cast_serve.gateway.admission import Admission
from cast_serve.gateway.compare.canary import ROLLED_BACK, Canary
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.exchange import GENERATING
from cast_serve.gateway.retries import REASONS
from cast_serve.gateway.upstream.client import Client, WorkerError
from cast_serve.gateway.upstream.exposition import (
    ExpositionError,
    Family,
    merged,
    read_families,
)
from cast_serve.gateway.upstream.replica import Replica, Variant
from cast_serve.latency import BUCKETS_S, RequestTiming

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0  # for a worker's metrics to come whole
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The gateway's metrics, in a registry of their own.

    Args:
        comparison: read at every scrape, as the next two.
        shadow_outcomes: how many shadow requests had each outcome.
        admissions: each variant's queue.
        fallbacks: {variant: the one that answers while it is down}.
        canary: read at every scrape.
    """

    def __init__(
        self,
        comparison: Comparison,
        shadow_outcomes: Mapping[str, int],
        admissions: Mapping[str, Admission],
        fallbacks: Mapping[str, str],
        canary: Canary | None = None,
    ) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["variant"], buckets=BUCKETS_S, registry=registry)

        self.requests = counter(
            "cast_requests_total", "Requests answered", "variant", "route", "code"
        )
        self.in_flight = gauge("cast_requests_in_flight", "Requests being answered", "variant")
        self.prompt_tokens = counter("cast_prompt_tokens_total", "Prompt tokens", "variant")
        self.output_tokens = counter("cast_output_tokens_total", "Output tokens", "variant")
        self.variant_up = gauge("cast_variant_up", "1 if a replica answers", "variant")
        self.replica_up = gauge("cast_replica_up", "1 if it answers", "variant", "replica")
        self.restarts = counter("cast_variant_restarts_total", "Local worker restarts", "variant")
        self.rolls = counter(
            "cast_variant_rolls_total", "Model changes per variant", "variant", "outcome"
        )
        self.shed = counter("cast_requests_shed_total", "Requests turned away", "reason")
        self.retries = counter(
            "cast_retries_total",
            "Retried requests, by how the previous attempt ended",
            "variant",
            "reason",
        )
        self.fallbacks = counter(
            "cast_fallbacks_total",
            "Requests answered by another variant",
            "from_variant",
            "to_variant",
            "reason",
        )
        self.ttft = histogram("cast_time_to_first_token_seconds", "Arrival to first token")
        self.itl = histogram("cast_inter_token_latency_seconds", "Gap between token events")
        self.tpot = histogram("cast_time_per_output_token_seconds", "Per token after the first")
        self.e2e = histogram("cast_e2e_request_latency_seconds", "Arrival to last token")
        # A counter must exist at 0, or rate() misses its first event.
        for name in admissions:
            self.variant_up.labels(name).set(0)
            self.restarts.labels(name)
            for reason in REASONS:
                self.retries.labels(name, reason)
            for outcome in ("done", "failed"):
                self.rolls.labels(name, outcome)
            for route, code in itertools.product(GENERATING, (200, 429, 500, 503, 504)):
                self.requests.labels(name, route, str(code))
        for reason in ("queue_full", "too_many_bytes", "timeout"):
            self.shed.labels(reason)
        for (name, other), reason in itertools.product(fallbacks.items(), ("down", "broken")):
            self.fallbacks.labels(name, other, reason)
        registry.register(_ReadAtScrape(comparison, shadow_outcomes, admissions, canary))

    def note_state(self, variant: Variant) -> None:
        """Updates the gauges; call it when a replica may have come up or gone down."""
        self.variant_up.labels(variant.name).set(variant.is_up)
        for place, replica in enumerate(variant.replicas):
            self.replica_up.labels(variant.name, str(place)).set(replica.is_up)

    def observe(self, variant: str, timing: RequestTiming) -> None:
        """Adds the times of one successfully finished request."""
        self.e2e.labels(variant).observe(timing.e2e_s)
        for gap_s in timing.itl_s:
            self.itl.labels(variant).observe(gap_s)
        if timing.ttft_s is not None:
            self.ttft.labels(variant).observe(timing.ttft_s)
        if timing.tpot_s is not None:
            self.tpot.labels(variant).observe(timing.tpot_s)

    def count_tokens(self, variant: str, prompt_tokens: int, timing: RequestTiming) -> None:
        """Adds the tokens of one successfully finished request."""
        self.prompt_tokens.labels(variant).inc(prompt_tokens)
        self.output_tokens.labels(variant).inc(timing.output_tokens or 0)

    async def expose(self, client: Client, variants: Iterable[Variant]) -> bytes:
        """One exposition of our metrics and those of every replica that is up and can be read."""
        replicas = [  # with its place, which another may have by the time that it answers
            (replica, {"replica": str(place), "variant": variant.name})
            for variant in variants
            for place, replica in enumerate(variant.replicas)
            if replica.is_up
        ]
        found = await asyncio.gather(*(_read(client, *each) for each in replicas))
        return generate_latest(self.registry) + merged(found)


async def _read(client: Client, replica: Replica, labels: dict[str, str]) -> dict[bytes, Family]:
    try:
        return await read_families(client, replica.url, labels, TIMEOUT_S)
    except WorkerError as error:  # it may just have gone down
        logger.info("%s: its metrics are left out: %.200s", replica, error)
    except ExpositionError as error:
        logger.warning("%s: its metrics are left out: %s", replica, error)
    return {}


@dataclass(eq=False, frozen=True)
class _ReadAtScrape(Collector):
    comparison: Comparison
    shadow_outcomes: Mapping[str, int]
    admissions: Mapping[str, Admission]
    canary: Canary | None

    def collect(self) -> Iterator[Metric]:
        speedups = GaugeMetricFamily(
            "cast_speedup_ratio",
            "Dense over sparse in live traffic; above 1 = sparse faster",
            labels=["metric", "quantile"],
        )
        for metric, quantile, ratio in self.comparison.speedups():
            speedups.add_metric([metric, str(quantile)], ratio)
        yield speedups
        queued = GaugeMetricFamily(
            "cast_requests_queued", "Requests waiting in the queue", labels=["variant"]
        )
        for name, admission in self.admissions.items():
            queued.add_metric([name], admission.num_queued)
        yield queued
        outcomes = CounterMetricFamily(
            "cast_shadow_requests", "Shadow requests by outcome", labels=["outcome"]
        )
        for outcome, number in self.shadow_outcomes.items():
            outcomes.add_metric([outcome], number)
        yield outcomes
        of_canary = ["model", "variant"]
        share = GaugeMetricFamily(
            "cast_canary_share", "Share of the split's requests", labels=of_canary
        )
        rollbacks = CounterMetricFamily(
            "cast_canary_rollbacks", "Canaries sent back to a share of 0", labels=of_canary
        )
        if self.canary is not None:
            share.add_metric(self.canary.plan[:2], self.canary.share)
            rollbacks.add_metric(self.canary.plan[:2], self.canary.state == ROLLED_BACK)
        yield from (share, rollbacks)
        found = self.comparison.agreement()
        if found is not None and found["token_agreement"] is not None:
            yield GaugeMetricFamily(
                "cast_shadow_token_agreement_ratio",
                "Share of teacher-forced positions where both variants rank one token first",
                value=found["token_agreement"]["mean"],
            )
            yield GaugeMetricFamily(
                "cast_shadow_kl_nats",
                "KL(baseline || candidate) per token, teacher-forced, a lower bound",
                value=found["kl_nats"]["mean"],
            )
