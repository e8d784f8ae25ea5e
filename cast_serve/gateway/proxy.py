"""A request -> the variant that its ``model`` field names, or another -> its answer.

    body -> parse -> pick a variant -> limits -> place in its queue -> replica -> answer
                         |                                                |
                      split, fallback                     another replica, fallback

An answer is passed on as it is (forward.py), but for ``X-Cast-Variant`` (and ``X-Cast-Fallback``
where another variant answered). Whatever goes wrong, the client gets an OpenAI error object; in a
stream that has begun, as its last event.
"""

import asyncio
import hashlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from cast_serve.gateway.admission import Admission, NoPlacesError
from cast_serve.gateway.api import limits, schemas
from cast_serve.gateway.api.errors import APIError, unavailable
from cast_serve.gateway.compare import side_by_side
from cast_serve.gateway.compare.agreement import COMPLETIONS
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.exchange import (
    GENERATING,
    Exchange,
    Outcome,
    deadline_s,
    unless_the_client_leaves,
)
from cast_serve.gateway.forward import BrokenError, Forwarder
from cast_serve.gateway.metrics import Metrics
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT, facts_of
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import Replica, Variant
from cast_serve.latency import RequestTiming, Stopwatch

logger = logging.getLogger(__name__)

PROXIED = (*GENERATING, "/tokenize", "/detokenize")
COMPARE = "/v1/compare"
STICKY_HEADER = "x-cast-sticky"
LARGE_BODY_BYTES = 1 << 16  # takes long enough to check that others would wait for the event loop


class Proxy:
    """The gateway's state: variants, their queues, their HTTP client, and metrics.

    Raises:
        ValueError: if a split or fallback names a variant that there is not.
    """

    def __init__(self, variants: Sequence[Variant], settings: GatewaySettings) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.settings = settings
        self.split = settings.split_weights
        self.fallbacks = settings.fallbacks
        self._check_names()
        self.admissions = {
            name: self._admission(variant) for name, variant in self.variants.items()
        }
        self.comparison = Comparison(list(self.variants), settings.comparison_window)
        self.shadow = Shadow(
            settings.shadow_fraction, settings.shadow_concurrency, self.comparison, self._repeat
        )
        self.metrics = Metrics(self.comparison, self.shadow, self.admissions)
        self.forwarder = Forwarder(self.metrics, lambda replica: self.note_state(replica.variant))
        self.forwarder.shadow = self.shadow
        self.client = self.forwarder.client
        # One at a time: memory and the interpreter's lock are not for large bodies alone.
        self._checker = ThreadPoolExecutor(1, "check-body")

    async def close(self) -> None:
        """Ends what runs beside the requests; no request may come after."""
        await self.shadow.close()
        await self.client.aclose()
        self._checker.shutdown()

    def _admission(self, variant: Variant) -> Admission:
        def num_places() -> int:
            return self.settings.max_running * sum(r.is_up for r in variant.replicas)

        return Admission(num_places, self.settings.max_queued)

    def _check_names(self) -> None:
        weights = [name for shares in self.split.values() for name in shares]
        for name in (*weights, *self.fallbacks, *self.fallbacks.values()):
            if name not in self.variants:
                raise ValueError(
                    f"split or fallback names {name!r}, but the variants are {list(self.variants)}"
                )
        if taken := self.split.keys() & self.variants.keys():
            raise ValueError(f"split {sorted(taken)} is the name of a variant; choose another")

    def answerer(self, name: str) -> Variant | None:
        """Who answers for a variant now: itself, else its fallback, else none."""
        for candidate in (name, self.fallbacks.get(name, name)):
            if self.variants[candidate].is_up:
                return self.variants[candidate]
        return None

    def note_state(self, name: str) -> None:
        """Brings gauge and queue in line with a variant that may have come up or gone down."""
        is_up = self.variants[name].is_up
        self.metrics.variant_up.labels(name).set(is_up)
        if is_up:
            self.admissions[name].admit()
        else:
            self.admissions[name].turn_away()

    async def answer(self, request: Request) -> Response:
        """Answers one request of `PROXIED`."""
        return await self._counted(request, self._answer)

    async def compare(self, request: Request) -> Response:
        """One prompt on every variant, one after the other: POST /v1/compare."""
        return await self._counted(request, self._compare)

    async def _counted(
        self, request: Request, answer: Callable[[Request, Outcome], Awaitable[Response]]
    ) -> Response:
        outcome = Outcome(self.metrics, request.url.path)
        try:
            return await answer(request, outcome)
        except ClientDisconnect:  # in the middle of its body
            outcome.end(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except APIError as error:
            outcome.end(error.status)
            raise
        except BaseException:
            outcome.end(500)
            raise

    async def _answer(self, request: Request, outcome: Outcome) -> Response:
        stopwatch = Stopwatch()
        facts = facts_of(request.scope)
        body, checked = await self._read(request)
        variant = self._choose(checked, request)
        outcome.variant = facts["variant"] = variant.name
        for name in self._candidates(variant.name):
            self._check_limits(checked, self.variants[name])
        exchange = Exchange(
            outcome.route,
            body,
            stopwatch,
            deadline_s(request, self.settings.request_timeout_s),
            outcome,
            facts,
        )
        return await unless_the_client_leaves(request, self._answer_by(variant, exchange), outcome)

    async def _compare(self, request: Request, outcome: Outcome) -> Response:
        _, checked = await self._read(request)
        for variant in self.variants.values():
            self._check_limits(checked, variant)
        until_s = deadline_s(request, self.settings.request_timeout_s)

        async def complete(
            name: str, body: dict[str, Any], route: str = COMPLETIONS
        ) -> tuple[dict[str, Any], RequestTiming]:
            variant = self.variants[name]
            if not variant.is_up:
                raise unavailable(name)
            try:
                async with self._place(variant, until_s):
                    return await self._complete(name, body, route, until_s)
            except BrokenError:
                raise unavailable(name) from None

        async def work() -> Response:
            baseline = self.comparison.baseline
            names = sorted(self.variants, key=lambda name: name != baseline)
            body = checked.model_dump(exclude_none=True)
            found = JSONResponse(await side_by_side.compare(body, names, complete))
            outcome.end(200)
            return found

        return await unless_the_client_leaves(request, work(), outcome)

    async def _read(self, request: Request) -> tuple[dict[str, Any], BaseModel]:
        """The body, as it came and checked.

        Raises:
            APIError: 400, 408 or 413.
            ClientDisconnect: if the client leaves before the body is whole.
        """
        limit = self.settings.max_body_bytes
        too_large = APIError(
            413,
            f"the request body is larger than {limit} bytes; send less, or raise "
            "CAST_MAX_BODY_BYTES",
            "invalid_request_error",
            "request_too_large",
        )
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limit:
                        raise too_large
        except TimeoutError:
            raise APIError(
                408,
                f"the request body did not arrive within {self.settings.body_timeout_s:g} s",
                "invalid_request_error",
                "body_timeout",
            ) from None

        def check() -> tuple[dict[str, Any], BaseModel]:
            body = schemas.read_json(content)
            return body, schemas.parse(request.url.path, body, self.settings.max_prompts)

        if len(content) < LARGE_BODY_BYTES:
            return check()
        return await asyncio.get_running_loop().run_in_executor(self._checker, check)

    def _check_limits(self, checked: BaseModel, variant: Variant) -> None:
        limits.check(checked, self.settings, variant.max_model_len, variant.vocabulary_size)

    def _choose(self, body: BaseModel, request: Request) -> Variant:
        """The variant that the model's name means, whether it is up or not."""
        name = str(getattr(body, "model", ""))
        if name in self.variants:
            return self.variants[name]
        if name not in self.split:
            known = sorted([*self.variants, *self.split])
            raise APIError(
                404,
                f"The model {name[:200]!r} does not exist; this gateway serves {known}.",
                "invalid_request_error",
                "model_not_found",
                "model",
            )
        key = request.headers.get(STICKY_HEADER) or getattr(body, "user", None)
        point = _point(f"{name}/{key}") if key else random.random()
        shares = self.split[name]
        for variant, end in zip(shares, itertools.accumulate(shares.values()), strict=True):
            if point < end:
                return self.variants[variant]
        return self.variants[variant]  # the shares' sum was rounded below 1

    def _candidates(self, name: str) -> list[str]:
        """A variant and its fallback, if it has one."""
        return list(dict.fromkeys((name, self.fallbacks.get(name, name))))

    async def _answer_by(self, variant: Variant, exchange: Exchange) -> Response:
        """Asks the variant's replicas, each once, and then its fallback's."""
        reason = "down"
        for name in self._candidates(variant.name):
            candidate = self.variants[name]
            tried: set[Replica] = set()
            while candidate.pick(tried) is not None:
                try:
                    response = await self._ask(candidate, tried, exchange)
                except BrokenError:
                    reason = "broken"
                    continue
                response.headers["X-Cast-Variant"] = name
                if name != variant.name:
                    response.headers["X-Cast-Fallback"] = variant.name
                    exchange.facts["fallback"] = name
                    self.metrics.fallbacks.labels(variant.name, name, reason).inc()
                return response
        raise unavailable(variant.name)

    async def _ask(self, variant: Variant, tried: set[Replica], exchange: Exchange) -> Response:
        """One try at one replica, from its place in the queue to the answer or its first event.

        Args:
            variant: who is asked.
            tried: its replicas that were asked before; the one asked now is added.
            exchange: the request.

        Raises:
            BrokenError: if the replica was lost before a byte was passed on.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._place(variant, exchange.deadline_s))
            replica = variant.pick(tried)
            if replica is None:
                raise BrokenError
            tried.add(replica)
            return await self.forwarder.forward(replica, exchange, stack)

    @asynccontextmanager
    async def _place(self, variant: Variant, until_s: float) -> AsyncIterator[None]:
        """A place at a variant's workers.

        Raises:
            APIError: 429 or 504, counted as shed.
            BrokenError: if the variant goes down while the request waits.
        """
        async with AsyncExitStack() as stack:
            left_s = until_s - asyncio.get_running_loop().time()
            try:
                await stack.enter_async_context(self.admissions[variant.name].place(left_s))
            except NoPlacesError:
                raise BrokenError from None
            except APIError as error:
                self.metrics.shed.labels(str(error.body["error"]["code"])).inc()
                raise
            yield

    async def _repeat(
        self, name: str, body: dict[str, Any], route: str = COMPLETIONS
    ) -> tuple[dict[str, Any], RequestTiming]:
        """A request of the shadow's, outside the queue: its own budget bounds it."""
        until_s = asyncio.get_running_loop().time() + self.settings.request_timeout_s
        return await self._complete(name, body, route, until_s)

    async def _complete(
        self, name: str, body: dict[str, Any], route: str, until_s: float
    ) -> tuple[dict[str, Any], RequestTiming]:
        replica = self.variants[name].pick()
        if replica is None:
            raise unavailable(name)
        return await self.forwarder.complete(replica, body, route, until_s)

    async def models(self) -> dict[str, Any]:
        """OpenAI's model list: each variant as its worker describes it, and the splits."""
        cards = []
        for variant in self.variants.values():
            replica = variant.pick()
            if replica is None:
                continue
            with suppress(httpx.HTTPError, ValueError, KeyError):
                response = await self.client.get(f"{replica.url}/v1/models", timeout=5)
                cards += [{**card, "owned_by": "cast-serve"} for card in response.json()["data"]]
        cards += [
            {"id": name, "object": "model", "owned_by": "cast-serve", "split": shares}
            for name, shares in self.split.items()
        ]
        return {"object": "list", "data": cards}

    async def exposition(self) -> bytes:
        """Prometheus text of the gateway and of every worker that answers."""
        replicas = [r for v in self.variants.values() for r in v.replicas if r.is_up]
        found = await asyncio.gather(*(self._metrics_of(replica) for replica in replicas))
        texts = [
            (replica.variant, str(self.variants[replica.variant].replicas.index(replica)), text)
            for replica, text in zip(replicas, found, strict=True)
            if text is not None
        ]
        return self.metrics.expose(texts)

    async def _metrics_of(self, replica: Replica) -> str | None:
        with suppress(httpx.HTTPError):
            response = await self.client.get(f"{replica.url}/metrics", timeout=5)
            if response.status_code == 200:
                return response.text
        return None


def _point(key: str) -> float:
    """A number in [0, 1) that is the same for the same key in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
