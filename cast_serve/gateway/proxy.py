"""A request -> the variant that its ``model`` field names, or another -> its answer.

    bodies -> router -> limits -> admission -> forward -> account
                                      ^           |
                                      +-----------+  another replica or the fallback (retries.py)

An answer is passed on as it is (forward.py), but for ``X-Cast-Variant``, ``X-Cast-Fallback`` where
another variant answered, and ``X-Cast-Ignored-Fields``. Whatever goes wrong, the client gets an
OpenAI error object; in a stream that has begun, as its last event.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from cast_serve.gateway.admission import Admission, NoPlacesError
from cast_serve.gateway.api import limits
from cast_serve.gateway.api.errors import CUT_OFF, APIError, unavailable
from cast_serve.gateway.bodies import BodyReader
from cast_serve.gateway.compare import side_by_side
from cast_serve.gateway.compare.agreement import COMPLETIONS, max_scored_tokens
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.exchange import (
    GENERATING,
    Exchange,
    deadline_s,
    unless_the_client_leaves,
)
from cast_serve.gateway.forward import BrokenError, Forwarder, LostError, UnreachedError
from cast_serve.gateway.metrics import Metrics
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT, facts_of
from cast_serve.gateway.retries import FAILED, STALE, UNREACHED, RetryBudget
from cast_serve.gateway.router import Router
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.client import Client, WorkerError
from cast_serve.gateway.upstream.exposition import (
    ExpositionError,
    Family,
    merged,
    read_families,
)
from cast_serve.gateway.upstream.replica import Replica, Variant
from cast_serve.latency import RequestTiming

logger = logging.getLogger(__name__)

QUESTION_S = 5.0  # for a worker to say its metrics, or what models it has
PROXIED = (*GENERATING, "/tokenize", "/detokenize")
COMPARE = "/v1/compare"
STICKY_HEADER = "x-cast-sticky"


class DownError(UnreachedError):
    """The variant went down while the request waited for a place."""


class Proxy:
    """The gateway's state: variants, their queues, the clients to their workers, and metrics.

    Args:
        variants: who is asked.
        settings: see there.
        worker_key: what the workers ask for; empty: nothing.

    Raises:
        ValueError: if a split or fallback names a variant that there is not.
    """

    def __init__(
        self, variants: Sequence[Variant], settings: GatewaySettings, worker_key: str = ""
    ) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.settings = settings
        self.router = Router(self.variants, settings.split_weights, settings.fallbacks)
        self.bodies = BodyReader(settings, lambda code: self.metrics.shed.labels(code).inc())
        self.admissions = {
            name: self._admission(variant) for name, variant in self.variants.items()
        }
        self.comparison = Comparison(list(self.variants), settings.comparison_window)
        self.shadow = Shadow(
            settings.shadow_fraction,
            settings.shadow_concurrency,
            self.comparison,
            self._repeat,
            self._max_scored_tokens,
        )
        self.metrics = Metrics(
            self.comparison, self.shadow.outcomes, self.admissions, self.router.fallbacks
        )
        self.retry_budget = RetryBudget()
        self.client = Client(worker_key)
        self.forwarder = Forwarder(
            self.client,
            lambda replica: self.note_state(replica.variant),
            lambda replica: self.metrics.retries.labels(replica.variant, STALE).inc(),
            settings.max_answer_bytes,
        )

    async def close(self) -> None:
        """Ends what runs beside the requests; no request may come after."""
        await self.shadow.close()
        await self.client.close()
        self.bodies.close()

    def _admission(self, variant: Variant) -> Admission:
        def num_places() -> int:
            return self.settings.max_running * sum(r.is_up for r in variant.replicas)

        return Admission(num_places, self.settings.max_queued)

    def note_state(self, name: str) -> None:
        """Brings gauge and queue in line with a variant that may have come up or gone down."""
        is_up = self.variants[name].is_up
        self.metrics.variant_up.labels(name).set(is_up)
        for place, replica in enumerate(self.variants[name].replicas):
            self.metrics.replica_up.labels(name, str(place)).set(replica.is_up)
        if is_up:
            self.admissions[name].admit()
        else:
            self.admissions[name].turn_away()

    async def answer(self, request: Request) -> Response:
        """Answers one request of `PROXIED`, or of `COMPARE`."""
        exchange = Exchange(
            request.url.path, self.shadow.is_on, self._account, facts_of(request.scope)
        )
        exchange.epoch = self.comparison.epoch
        try:
            exchange.body, checked, ignored = await self.bodies.read(request, exchange)
            variants = self._route(exchange, checked, request.headers.get(STICKY_HEADER))
            exchange.deadline_s = deadline_s(request, self.settings.request_timeout_s)
            if exchange.route == COMPARE:
                work = self._compare(exchange, checked)
            else:
                work = self._answer_by(variants, exchange)
            response = await unless_the_client_leaves(request, work, exchange)
            if ignored:
                response.headers["X-Cast-Ignored-Fields"] = ", ".join(ignored)
            return response
        except ClientDisconnect:  # in the middle of its body
            exchange.end(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except APIError as error:
            exchange.end(error.status)
            raise
        except asyncio.CancelledError:  # the grace of a shutdown is over
            exchange.end(CUT_OFF.status)
            raise
        except BaseException:
            exchange.end(500)
            raise

    def _route(
        self, exchange: Exchange, checked: BaseModel, sticky_key: str | None
    ) -> list[Variant]:
        """Who may answer: the variant asked for and then its fallback; all, for a comparison.

        Raises:
            APIError: 404, or 400 if the request is beyond the limits of the variant asked for. A
                fallback beyond whose limits it is answers for none.
        """
        if exchange.route == COMPARE:
            variants = list(self.variants.values())
            for variant in variants:
                self._check_limits(checked, variant)
            return variants
        key = sticky_key or getattr(checked, "user", None)
        variant = self.router.choose(exchange.body["model"], key)
        exchange.variant = exchange.facts["variant"] = variant.name
        self._check_limits(checked, variant)
        candidates = [variant]
        for fallback in self.router.candidates(variant)[1:]:
            with suppress(APIError):
                self._check_limits(checked, fallback)
                candidates.append(fallback)
        return candidates

    def _check_limits(self, checked: BaseModel, variant: Variant) -> None:
        limits.check(checked, self.settings, variant.max_model_len, variant.vocabulary_size)

    async def _answer_by(self, candidates: Sequence[Variant], exchange: Exchange) -> Response:
        """Asks the candidates' replicas, each at most once, as long as retries.py has it."""
        self.retry_budget.note_request()
        reason = "down"
        failure: str | None = None  # of the try before, as `cast_retries_total` has it
        has_begun = False  # at a replica that failed
        for candidate in candidates:
            tried: set[Replica] = set()
            while candidate.pick(tried) is not None:
                try:
                    response = await self._ask(candidate, tried, exchange, failure)
                except DownError:  # while it queued
                    continue
                except UnreachedError:
                    reason, failure = "broken", UNREACHED
                    continue
                except LostError:
                    raise self._unavailable(exchange.variant) from None
                except BrokenError:
                    if has_begun or not self.retry_budget.take():
                        raise self._unavailable(exchange.variant) from None
                    reason, failure, has_begun = "broken", FAILED, True
                    continue
                response.headers["X-Cast-Variant"] = candidate.name
                if candidate is not candidates[0]:
                    response.headers["X-Cast-Fallback"] = exchange.variant
                    exchange.facts["fallback"] = candidate.name
                    self.metrics.fallbacks.labels(exchange.variant, candidate.name, reason).inc()
                return response
        raise self._unavailable(exchange.variant)

    async def _ask(
        self, variant: Variant, tried: set[Replica], exchange: Exchange, failure: str | None
    ) -> Response:
        """One try at one replica, from its place in the queue to the answer or its first event.

        Args:
            variant: who is asked.
            tried: its replicas that were asked before; the one asked now is added.
            exchange: the request.
            failure: how the try before ended (retries.py); None: this is the first.

        Raises:
            BrokenError: if the replica failed before a byte was passed on.
        """
        async with AsyncExitStack() as stack:
            place = self._place(variant, exchange.deadline_s, is_again=bool(tried))
            await stack.enter_async_context(place)
            replica = variant.pick(tried)
            if replica is None:
                raise DownError
            tried.add(replica)
            in_flight = self.metrics.in_flight.labels(variant.name)
            stack.enter_context(in_flight.track_inprogress())
            if failure is not None:
                self.metrics.retries.labels(variant.name, failure).inc()
            return await self.forwarder.forward(replica, exchange, stack)

    @asynccontextmanager
    async def _place(
        self, variant: Variant, until_s: float, is_again: bool = False
    ) -> AsyncIterator[None]:
        """A place at a variant's workers.

        Args:
            variant: whose.
            until_s: how long to wait, on the event loop's clock.
            is_again: see `Admission.place`.

        Raises:
            APIError: 429 or 504, counted as shed.
            DownError: if the variant goes down while the request waits.
        """
        async with AsyncExitStack() as stack:
            left_s = until_s - asyncio.get_running_loop().time()
            try:
                place = self.admissions[variant.name].place(left_s, is_again)
                await stack.enter_async_context(place)
            except NoPlacesError:
                raise DownError from None
            except APIError as error:
                self.metrics.shed.labels(str(error.body["error"]["code"])).inc()
                raise
            yield

    def _account(self, exchange: Exchange) -> None:
        """Counts a request that has ended; what it generated is timed, and may be repeated."""
        self.bodies.release(exchange)
        exchange.facts["outcome"] = exchange.status
        self.metrics.requests.labels(exchange.variant, exchange.route, str(exchange.status)).inc()
        timing = exchange.timing
        if timing is None:
            return
        self.metrics.count_tokens(exchange.answered_by, exchange.prompt_tokens, timing)
        is_current = exchange.epoch == self.comparison.epoch  # else maybe of the model before
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
        without_queue = dataclasses.replace(timing, intended_send_s=exchange.sent_s)
        self.shadow.offer(
            exchange.route, exchange.body, exchange.answered_by, exchange.text, without_queue
        )

    async def _compare(self, exchange: Exchange, checked: BaseModel) -> Response:
        """One prompt on every variant, one after the other, each in a place of its queue."""

        async def complete(
            name: str, body: dict[str, Any], route: str = COMPLETIONS
        ) -> tuple[dict[str, Any], RequestTiming]:
            if not self.variants[name].is_up:
                raise self._unavailable(name)
            try:
                async with self._place(self.variants[name], exchange.deadline_s):
                    return await self._complete(name, body, route, exchange.deadline_s)
            except BrokenError:
                raise self._unavailable(name) from None

        baseline = self.comparison.baseline
        names = sorted(self.variants, key=lambda name: name != baseline)
        body = checked.model_dump(exclude_none=True)
        max_tokens = self._max_scored_tokens()
        found = JSONResponse(await side_by_side.compare(body, names, complete, max_tokens))
        exchange.end(200)
        return found

    def _max_scored_tokens(self) -> int:
        return max_scored_tokens(variant.max_model_len for variant in self.variants.values())

    async def _repeat(
        self, name: str, body: dict[str, Any], route: str = COMPLETIONS
    ) -> tuple[dict[str, Any], RequestTiming]:
        """A request of the shadow's, outside the queue: its own budget bounds it."""
        until_s = asyncio.get_running_loop().time() + self.settings.request_timeout_s
        return await self._complete(name, body, route, until_s)

    async def _complete(
        self, name: str, body: dict[str, Any], route: str, until_s: float
    ) -> tuple[dict[str, Any], RequestTiming]:
        """An exchange of the gateway's own, which is not counted as traffic."""
        replica = self.variants[name].pick()
        if replica is None:
            raise self._unavailable(name)
        exchange = Exchange(route, keeps_text=True, body=body, deadline_s=until_s)
        try:
            answer = await self.forwarder.collect(replica, exchange)
        except BrokenError:
            raise self._unavailable(name) from None
        assert exchange.timing is not None
        return answer, exchange.timing

    def _unavailable(self, name: str) -> APIError:
        return unavailable(name, self.variants[name].status)

    async def models(self) -> dict[str, Any]:
        """OpenAI's model list: each variant as its worker describes it, and the splits.

        A variant that does not answer has a card of its name and ``status``: `Variant.status`, or
        ``down``.
        """
        cards: list[dict[str, Any]] = []
        for variant in self.variants.values():
            card = await self._card_of(variant)
            cards.append({"id": variant.name, "object": "model", **card, "owned_by": "cast-serve"})
        cards += [
            {"id": name, "object": "model", "owned_by": "cast-serve", "split": shares}
            for name, shares in self.router.split.items()
        ]
        return {"object": "list", "data": cards}

    async def _card_of(self, variant: Variant) -> dict[str, Any]:
        """What a worker says of the variant's model; ``status`` where none is up."""
        if (replica := variant.pick()) is not None:
            with suppress(WorkerError, ValueError, KeyError, TypeError):
                response = await self.client.ask(f"{replica.url}/v1/models", QUESTION_S)
                cards = {card["id"]: card for card in response.json()["data"]}
                return dict(cards[variant.name])  # others, as of adapters, are not passed on
        return {} if variant.is_up else {"status": variant.status or "down"}

    async def model(self, name: str) -> dict[str, Any]:
        """One card of `models`.

        Raises:
            APIError: 404 if there is no such model.
        """
        self.router.choose(name, None)
        return next(dict(card) for card in (await self.models())["data"] if card["id"] == name)

    async def exposition(self) -> bytes:
        """Prometheus text of the gateway and of every worker that answers."""
        replicas = [  # with its place, which another may have by the time that it answers
            (replica, {"replica": str(place), "variant": variant.name})
            for variant in self.variants.values()
            for place, replica in enumerate(variant.replicas)
            if replica.is_up
        ]
        found = await asyncio.gather(*(self._metrics_of(*each) for each in replicas))
        return self.metrics.expose(merged(found))

    async def _metrics_of(self, replica: Replica, labels: dict[str, str]) -> dict[bytes, Family]:
        try:
            return await read_families(self.client, replica.url, labels, QUESTION_S)
        except WorkerError as error:  # it may just have gone down
            logger.info("%s: its metrics are left out: %.200s", replica, error)
        except ExpositionError as error:
            logger.warning("%s: its metrics are left out: %s", replica, error)
        return {}
