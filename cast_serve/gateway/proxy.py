"""A request -> the variant that its ``model`` field names, or another -> its answer.

    bodies -> router -> limits -> places -> forward -> accounts
                                     ^         |
                                     +---------+  another replica or the fallback (retries.py)

An answer is passed on as it is (forward.py), but for ``X-Cast-Variant``, ``X-Cast-Fallback`` where
another variant answered, and ``X-Cast-Ignored-Fields``. Whatever goes wrong, the client gets an
OpenAI error object; in a stream that has begun, as its last event.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from cast_serve.gateway.accounts import Accounts
from cast_serve.gateway.admission import NoPlacesError, Places
from cast_serve.gateway.api import limits
from cast_serve.gateway.api.errors import CUT_OFF, APIError, ShedError, unavailable
from cast_serve.gateway.bodies import BodyReader
from cast_serve.gateway.compare.asker import Asker
from cast_serve.gateway.exchange import (
    GENERATING,
    Exchange,
    deadline_s,
    unless_the_client_leaves,
)
from cast_serve.gateway.forward import BrokenError, Forwarder, LostError, UnreachedError
from cast_serve.gateway.metrics import Metrics
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT, facts_of
from cast_serve.gateway.retries import FAILED, UNREACHED, RetryBudget
from cast_serve.gateway.router import Router
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.replica import Replica, Variant

PROXIED = (*GENERATING, "/tokenize", "/detokenize")
COMPARE = "/v1/compare"
STICKY_HEADER = "x-cast-sticky"


@dataclass(eq=False)
class Proxy:
    """Routes requests, and admits them to the workers.

    Attributes:
        asker: compares the variants, on `COMPARE`.
        baseline: the variant that others are compared with.
    """

    settings: GatewaySettings
    bodies: BodyReader
    router: Router
    places: Places
    forwarder: Forwarder
    accounts: Accounts
    asker: Asker
    metrics: Metrics
    baseline: str
    _retry_budget: RetryBudget = field(default_factory=RetryBudget)

    async def answer(self, request: Request) -> Response:
        """Answers one request of `PROXIED`, or of `COMPARE`."""
        exchange = self.accounts.begin(request.url.path, facts_of(request.scope))
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
            if isinstance(error, ShedError):
                self.metrics.shed.labels(error.body["error"]["code"]).inc()
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
        """The variants that may answer: the one asked for, then its fallback; all for a comparison.

        Raises:
            APIError: 404, or 400 if the request exceeds the limits of the variant asked for. A
                fallback whose limits it exceeds is left out.
        """
        if exchange.route == COMPARE:
            variants = list(self.router.variants.values())
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
        """Asks the candidates' replicas, each at most once, within the limits of retries.py."""
        self._retry_budget.note_request()
        reason = "down"
        failure: str | None = None  # of the previous try, as in `cast_retries_total`
        has_begun = False  # at a replica that failed
        for candidate in candidates:
            tried: set[Replica] = set()
            while candidate.pick(tried) is not None:
                try:
                    response = await self._ask(candidate, tried, exchange, failure)
                except NoPlacesError:  # it went down while the request queued
                    continue
                except UnreachedError:
                    reason, failure = "broken", UNREACHED
                    continue
                except LostError:
                    raise self._unavailable(exchange) from None
                except BrokenError:
                    if has_begun or not self._retry_budget.take():
                        raise self._unavailable(exchange) from None
                    reason, failure, has_begun = "broken", FAILED, True
                    continue
                response.headers["X-Cast-Variant"] = candidate.name
                if candidate is not candidates[0]:
                    response.headers["X-Cast-Fallback"] = exchange.variant
                    exchange.facts["fallback"] = candidate.name
                    self.metrics.fallbacks.labels(exchange.variant, candidate.name, reason).inc()
                return response
        raise self._unavailable(exchange)

    async def _ask(
        self, variant: Variant, tried: set[Replica], exchange: Exchange, failure: str | None
    ) -> Response:
        """One try at one replica, from its place in the queue to the answer or its first event.

        Args:
            variant: the one to ask.
            tried: its replicas that were asked before; the one asked now is added.
            exchange: the request.
            failure: how the previous try ended (retries.py); None: this is the first.

        Raises:
            BrokenError: if the replica failed before a byte was passed on.
            NoPlacesError: if the variant went down while the request waited.
        """
        async with AsyncExitStack() as stack:
            place = self.places.place(variant.name, exchange.deadline_s, is_again=bool(tried))
            await stack.enter_async_context(place)
            replica = variant.pick(tried)
            if replica is None:
                raise NoPlacesError
            tried.add(replica)
            in_flight = self.metrics.in_flight.labels(variant.name)
            stack.enter_context(in_flight.track_inprogress())
            if failure is not None:
                self.metrics.retries.labels(variant.name, failure).inc()
            return await self.forwarder.forward(replica, exchange, stack)

    async def _compare(self, exchange: Exchange, checked: BaseModel) -> Response:
        body = checked.model_dump(exclude_none=True)
        found = await self.asker.compare(body, self.baseline, exchange.deadline_s)
        exchange.end(200)
        return JSONResponse(found)

    def _unavailable(self, exchange: Exchange) -> APIError:
        return unavailable(exchange.variant, self.router.variants[exchange.variant].status)
