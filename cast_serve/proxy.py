"""A checked request -> the variant that the ``model`` field names -> its answer, streamed through.

    body -> parse -> pick a variant -> limits -> place in its queue -> replica -> answer
                         |                                                |
                      split, fallback                     another replica, fallback

An answer is passed on as it is, but for ``X-Cast-Variant`` (and ``X-Cast-Fallback`` where another
variant answered). To count tokens every stream is asked for usage, and that chunk is taken out
again where the client did not ask. Whatever goes wrong, the client gets an OpenAI error object; in
a stream that has begun, as its last event.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

import httpx
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from cast_serve import requests, tracing
from cast_serve.admission import Admission
from cast_serve.comparison import Comparison
from cast_serve.errors import APIError, bad_request, unavailable
from cast_serve.latency import RequestTiming, Stopwatch
from cast_serve.metrics import Metrics
from cast_serve.request_log import CLIENT_LEFT, facts_of
from cast_serve.settings import GatewaySettings
from cast_serve.shadow import Shadow
from cast_serve.variants import Replica, Variant, note_failure

logger = logging.getLogger(__name__)
T = TypeVar("T")

GENERATING = ("/v1/completions", "/v1/chat/completions")
PROXIED = (*GENERATING, "/tokenize", "/detokenize")
DONE = b"data: [DONE]\n\n"
TIMEOUT_HEADER = "x-request-timeout"
STICKY_HEADER = "x-cast-sticky"


class BrokenError(Exception):
    """A replica was lost before a byte of its answer was passed on: another may be asked."""


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
            settings.shadow_fraction, settings.shadow_concurrency, self.comparison, self.complete
        )
        self.metrics = Metrics(self.comparison, self.shadow, self.admissions)
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5),  # the request's deadline bounds the rest
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # proxies are for the outside, workers are ours
        )

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

    async def answer(self, request: Request) -> Response:
        """Answers one request of `PROXIED`."""
        stopwatch = Stopwatch()
        facts = facts_of(request.scope)
        outcome = _Outcome(self.metrics, request.url.path)
        try:
            body = await self.read(request)
            checked = requests.parse(outcome.route, body)
            variant = self._choose(checked, request)
            outcome.variant = facts["variant"] = variant.name
            for name in {variant.name, self.fallbacks.get(variant.name, variant.name)}:
                asked = self.variants[name]
                requests.check_limits(
                    checked, self.settings, asked.max_model_len, asked.vocabulary_size
                )
            exchange = _Exchange(
                outcome.route, body, stopwatch, self._deadline_s(request), outcome, facts
            )
            return await _unless_the_client_leaves(
                request, self._answer_by(variant, exchange), outcome
            )
        except APIError as error:
            outcome.end(error.status)
            raise
        except BaseException:
            outcome.end(500)
            raise

    async def read(self, request: Request) -> Any:
        """The body as JSON.

        Raises:
            APIError: 400, 408 or 413.
        """
        limit = self.settings.max_body_bytes
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limit:
                        raise APIError(
                            413,
                            f"the request body is larger than {limit} bytes; send less, or raise "
                            "CAST_MAX_BODY_BYTES",
                            "invalid_request_error",
                            "request_too_large",
                        )
        except TimeoutError:
            raise APIError(
                408,
                f"the request body did not arrive within {self.settings.body_timeout_s:g} s",
                "invalid_request_error",
                "body_timeout",
            ) from None
        try:
            body = json.loads(content, parse_constant=_refuse_constant)
            if b"\\u" in content:  # perhaps half a surrogate pair, which is no text
                json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise bad_request(f"the request body is not valid JSON: {error}"[:300]) from None
        return body

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

    def _deadline_s(self, request: Request) -> float:
        """The event loop's time by which the request must be answered."""
        timeout_s = self.settings.request_timeout_s
        if (given := request.headers.get(TIMEOUT_HEADER)) is not None:
            try:
                asked_s = float(given)
            except ValueError:
                asked_s = math.nan
            if not 0 < asked_s <= timeout_s:
                raise bad_request(
                    f"X-Request-Timeout is {given[:50]!r}, but must be seconds above 0 and up to "
                    f"{timeout_s:g}",
                    "X-Request-Timeout",
                )
            timeout_s = asked_s
        return asyncio.get_running_loop().time() + timeout_s

    async def _answer_by(self, variant: Variant, exchange: "_Exchange") -> Response:
        """Asks the variant, its other replicas, and then its fallback."""
        reason = "down"
        for name in dict.fromkeys((variant.name, self.fallbacks.get(variant.name, variant.name))):
            candidate = self.variants[name]
            for _ in candidate.replicas:
                if not candidate.is_up:
                    break
                try:
                    response = await self._ask(candidate, exchange)
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

    async def _ask(self, variant: Variant, exchange: "_Exchange") -> Response:
        """One try at one replica, from its place in the queue to the answer or its first bytes.

        Raises:
            BrokenError: if the replica was lost before a byte was passed on.
        """
        async with AsyncExitStack() as stack:
            admission = self.admissions[variant.name]
            try:
                await stack.enter_async_context(admission.place(exchange.left_s()))
            except APIError as error:
                self.metrics.shed.labels(str(error.body["error"]["code"])).inc()
                raise
            replica = variant.pick()
            if replica is None:
                raise BrokenError
            stack.enter_context(_Counted(replica, self.metrics))
            exchange.sent_s = time.perf_counter()
            upstream = await self._send(replica, exchange)
            stack.push_async_callback(upstream.aclose)
            media_type = upstream.headers.get("content-type", "application/json")
            if exchange.is_stream and upstream.status_code == 200:
                events = self._events(upstream, replica, exchange)
                response = _ProxiedStream(events, exchange.outcome, media_type)
                response.on_close = stack.pop_all().aclose
                return response
            try:
                content = await _before(exchange.deadline_s, upstream.aread())
            except TimeoutError:
                raise _late(variant.name) from None
            except httpx.HTTPError as error:
                raise self._broken(replica, error) from None
        return self._whole_answer(replica, exchange, upstream.status_code, content, media_type)

    def _whole_answer(
        self, replica: Replica, exchange: "_Exchange", status: int, content: bytes, media_type: str
    ) -> Response:
        if status == 200:
            replica.num_received += 1
            if exchange.route in GENERATING:
                answer = json.loads(content)
                usage = answer["usage"]
                timing = exchange.stopwatch.finish(usage["completion_tokens"])
                text = _text_of(answer)
                self._finished(replica.variant, exchange, timing, usage["prompt_tokens"], text)
        elif status >= 500:
            _raise_for(replica.variant, status, content)
        elif status >= 400:
            _check_shape(status, content)
        exchange.outcome.end(status)
        return Response(content, status, media_type=media_type)

    def _finished(
        self,
        variant: str,
        exchange: "_Exchange",
        timing: RequestTiming,
        prompt_tokens: int,
        text: str,
    ) -> None:
        self.metrics.observe(variant, timing, prompt_tokens)
        exchange.facts |= {
            "prompt_tokens": prompt_tokens,
            "output_tokens": timing.output_tokens,
            "ttft_s": None if timing.ttft_s is None else round(timing.ttft_s, 6),
        }
        # The repeat does not queue, so what it is held against has no waiting in it either.
        alone = dataclasses.replace(timing, intended_send_s=exchange.sent_s)
        self.shadow.offer(exchange.route, exchange.body, variant, text, alone)

    async def _send(self, replica: Replica, exchange: "_Exchange") -> httpx.Response:
        request = self.client.build_request(
            "POST",
            f"{replica.url}{exchange.route}",
            json=exchange.body_for(replica.variant),
            headers={"X-Request-Id": exchange.facts["request_id"], **tracing.outgoing_headers()},
        )
        try:
            return await _before(exchange.deadline_s, self.client.send(request, stream=True))
        except TimeoutError:
            raise _late(replica.variant) from None
        except httpx.HTTPError as error:
            raise self._broken(replica, error) from None

    def _broken(self, replica: Replica, error: httpx.HTTPError) -> BrokenError:
        logger.warning(
            "%s at %s: %s: %s", replica.variant, replica.url, type(error).__name__, error
        )
        note_failure(replica)
        self.metrics.variant_up.labels(replica.variant).set(self.variants[replica.variant].is_up)
        return BrokenError()

    async def _events(
        self, upstream: httpx.Response, replica: Replica, exchange: "_Exchange"
    ) -> AsyncIterator[bytes]:
        """The SSE events of a stream, ended by [DONE] or by an error event."""
        prompt_tokens = 0
        texts: list[str] = []
        lines = upstream.aiter_lines()
        try:
            # The deadline bounds each wait for a line and no yield: it must not cancel the sender.
            while (line := await _before(exchange.deadline_s, anext(lines, None))) is not None:
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                replica.num_received += 1
                if data == "[DONE]":
                    timing = exchange.stopwatch.finish()
                    self._finished(replica.variant, exchange, timing, prompt_tokens, "".join(texts))
                    exchange.outcome.end(200)
                    yield DONE
                    return
                chunk = json.loads(data)
                exchange.stopwatch.observe(chunk)
                if self.shadow.is_on:
                    texts.append(_text_of(chunk))
                if usage := chunk.get("usage"):
                    prompt_tokens = usage["prompt_tokens"]
                    if not exchange.has_usage and not chunk.get("choices"):
                        continue
                if not exchange.has_usage and "usage" in chunk:
                    del chunk["usage"]
                    data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                yield f"data: {data}\n\n".encode()
            failure = unavailable(replica.variant)  # it ended without [DONE]
        except TimeoutError:
            failure = _late(replica.variant)
        except httpx.HTTPError as error:
            self._broken(replica, error)
            failure = unavailable(replica.variant)
        except ValueError:
            logger.warning("%s: sent an event that is not JSON", replica.variant)
            failure = unavailable(replica.variant)
        exchange.outcome.end(failure.status)
        yield f"data: {json.dumps(failure.body)}\n\n".encode()

    async def complete(
        self, variant: str, body: dict[str, Any], route: str = "/v1/completions"
    ) -> tuple[dict[str, Any], RequestTiming]:
        """A request of the gateway's own, outside the queue and uncounted as traffic.

        Raises:
            APIError: if the variant is down or does not answer 200.
        """
        replica = self.variants[variant].pick()
        if replica is None:
            raise unavailable(variant)
        stopwatch = Stopwatch()
        body = {**body, "model": variant}
        try:
            with _Counted(replica, None):
                async with asyncio.timeout(self.settings.request_timeout_s):
                    if body.get("stream"):
                        answer = await self._collect(replica, route, body, stopwatch)
                    else:
                        response = await self.client.post(f"{replica.url}{route}", json=body)
                        _raise_for(variant, response.status_code, response.content)
                        answer = response.json()
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            logger.warning("%s: %s: %s", variant, type(error).__name__, error)
            raise unavailable(variant) from None
        return answer, stopwatch.finish((answer.get("usage") or {}).get("completion_tokens"))

    async def _collect(
        self, replica: Replica, route: str, body: dict[str, Any], stopwatch: Stopwatch
    ) -> dict[str, Any]:
        """A stream's last answer: its texts joined in one choice."""
        texts: list[str] = []
        answer: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": None}]}
        body = {**body, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", f"{replica.url}{route}", json=body) as upstream:
            if upstream.status_code != 200:
                _raise_for(replica.variant, upstream.status_code, await upstream.aread())
            async for line in upstream.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                stopwatch.observe(chunk)
                texts.append(_text_of(chunk))
                for choice in chunk.get("choices") or ():
                    if choice.get("finish_reason"):
                        answer["choices"][0]["finish_reason"] = choice["finish_reason"]
                answer["usage"] = chunk.get("usage") or answer.get("usage")
        answer["choices"][0]["text"] = "".join(texts)
        return answer

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


class _Outcome:
    """Counts a request once, whatever ends it."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.metrics = metrics
        self.route = route
        self.variant = ""
        self._has_ended = False

    def end(self, status: int) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.metrics.requests.labels(self.variant, self.route, str(status)).inc()


class _Exchange:
    """One request on its way through.

    Attributes:
        has_usage: whether the client asked for the usage chunk of its stream.
        deadline_s: on the event loop's clock.
        sent_s: when a worker got it, on the stopwatch's clock.
    """

    def __init__(
        self,
        route: str,
        body: dict[str, Any],
        stopwatch: Stopwatch,
        deadline_s: float,
        outcome: _Outcome,
        facts: dict[str, Any],
    ) -> None:
        self.route = route
        self.body = body
        self.stopwatch = stopwatch
        self.deadline_s = deadline_s
        self.outcome = outcome
        self.facts = facts
        self.sent_s = 0.0
        self.is_stream = route in GENERATING and body.get("stream") is True
        self.has_usage = (body.get("stream_options") or {}).get("include_usage") is True

    def left_s(self) -> float:
        return self.deadline_s - asyncio.get_running_loop().time()

    def body_for(self, variant: str) -> dict[str, Any]:
        body = {**self.body, "model": variant}
        if self.is_stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return body


class _Counted:
    """Counts a request at its replica while it runs."""

    def __init__(self, replica: Replica, metrics: Metrics | None) -> None:
        self._replica = replica
        self._gauge = metrics.in_flight.labels(replica.variant) if metrics else None

    def __enter__(self) -> None:
        self._replica.num_outstanding += 1
        if self._gauge:
            self._gauge.inc()

    def __exit__(self, *_: object) -> None:
        self._replica.num_outstanding -= 1
        if self._gauge:
            self._gauge.dec()


class _ProxiedStream(StreamingResponse):
    """Closes the upstream however the response ends; for a client that left, vLLM then aborts."""

    on_close: Callable[[], Awaitable[None]]

    def __init__(self, events: AsyncIterator[bytes], outcome: _Outcome, media_type: str) -> None:
        super().__init__(events, media_type=media_type)
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would collect the stream
        self._outcome = outcome

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outcome.end(CLIENT_LEFT)  # unless it has ended otherwise
            await asyncio.shield(self.on_close())


async def _before(deadline_s: float, awaited: Awaitable[T]) -> T:
    """What is awaited; TimeoutError once the deadline has passed."""
    async with asyncio.timeout_at(deadline_s):
        return await awaited


async def _unless_the_client_leaves(
    request: Request, answer: Awaitable[Response], outcome: _Outcome
) -> Response:
    """The answer; if the client closes the connection first, the work for it is cancelled."""

    async def until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(until_left())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        outcome.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    finally:
        for task in (work, left):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _text_of(answer: Mapping[str, Any]) -> str:
    """The text of the first choice of an answer or chunk, completion or chat."""
    for choice in answer.get("choices") or ():
        if choice.get("index", 0) == 0:
            part = choice.get("delta") or choice.get("message") or choice
            return part.get("text") or part.get("content") or ""
    return ""


def _raise_for(variant: str, status: int, content: bytes) -> None:
    """A worker's own failure, told without its inside."""
    if status != 200:
        logger.warning("%s: %d: %s", variant, status, content[:300].decode(errors="replace"))
        raise unavailable(variant)


def _check_shape(status: int, content: bytes) -> None:
    """Puts a worker's refusal that is no OpenAI error object into that shape."""
    try:
        is_shaped = isinstance(json.loads(content)["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        is_shaped = False
    if not is_shaped:
        text = content[:300].decode(errors="replace")
        status = 400 if status == 422 else status  # FastAPI's number for what OpenAI answers 400
        raise APIError(status, f"the worker refused this: {text}", "invalid_request_error")


def _late(variant: str) -> APIError:
    return APIError(
        504,
        f"variant {variant!r} did not answer in time; allow more with X-Request-Timeout, or ask "
        "for fewer tokens",
        "server_error",
        "timeout",
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _point(key: str) -> float:
    """A number in [0, 1) that is the same for the same key in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
