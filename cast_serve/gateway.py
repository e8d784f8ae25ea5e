"""OpenAI requests -> the variant that the ``model`` field names -> its answer, streamed through.

    client --POST /v1/completions {"model": "sparse"}--> gateway --> vLLM worker "sparse"

The gateway proxies; it changes nothing of an answer but adds ``X-Cast-Variant`` and measures. To
count tokens it asks every stream for usage, and takes that chunk out again where the client did
not ask. Every error is an OpenAI error object.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from cast_serve import variants as variant_processes
from cast_serve.comparison import Comparison
from cast_serve.latency import Stopwatch
from cast_serve.metrics import CONTENT_TYPE, Metrics
from cast_serve.settings import GatewaySettings
from cast_serve.variants import Variant, VariantError

logger = logging.getLogger(__name__)

GENERATING = ("/v1/completions", "/v1/chat/completions")
PROXIED = (*GENERATING, "/tokenize", "/detokenize")
DONE = b"data: [DONE]\n\n"


class APIError(Exception):
    """An error that a client sees, in OpenAI's shape.

    Args:
        status: HTTP status.
        message: what is wrong and what to do.
        type: OpenAI's error type.
        code: machine-readable code, or None.
        param: the field at fault, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class Gateway:
    """The proxy's state: variants, their HTTP client, and metrics."""

    def __init__(self, variants: Sequence[Variant], settings: GatewaySettings) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.settings = settings
        self.metrics = Metrics(Comparison(list(self.variants), settings.comparison_window))
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.request_timeout_s, connect=5),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # proxies are for the outside, workers are ours
        )
        self.has_started = False
        self.failure: VariantError | None = None

    @property
    def is_ready(self) -> bool:
        return all(variant.is_up for variant in self.variants.values())

    async def watch(self, on_failure: Callable[[], None]) -> None:
        """Follows the variants; calls on_failure when a local worker ends."""

        def note(variant: Variant) -> None:
            self.metrics.variant_up.labels(variant.name).set(variant.is_up)
            self.has_started = self.has_started or self.is_ready

        try:
            await variant_processes.watch(
                list(self.variants.values()),
                self.client,
                self.settings.health_interval_s,
                self.settings.startup_timeout_s,
                note,
            )
        except VariantError as failure:
            self.failure = failure
            on_failure()

    async def proxy(self, request: Request) -> Response:
        """Answers one request of `PROXIED`."""
        route, variant_name, code = request.url.path, "", 500
        try:
            body = await self._read(request)
            variant = self._pick(body)
            variant_name = variant.name
            response = await self._forward(route, body, variant)
            code = response.status_code
            response.headers["X-Cast-Variant"] = variant_name
            return response
        except APIError as error:
            code = error.status
            raise
        finally:
            self.metrics.requests.labels(variant_name, route, str(code)).inc()

    async def _read(self, request: Request) -> dict[str, Any]:
        limit = self.settings.max_body_bytes
        content = bytearray()
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
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _bad_request(f"the request body is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise _bad_request(f"the request body is a JSON {type(body).__name__}, not an object")
        return body

    def _pick(self, body: Mapping[str, Any]) -> Variant:
        name = body.get("model")
        if not isinstance(name, str):
            raise _bad_request(
                f"model must be one of {sorted(self.variants)}, as a string; got {name!r}", "model"
            )
        if name not in self.variants:
            raise APIError(
                404,
                f"The model {name[:200]!r} does not exist; "
                f"this gateway serves {sorted(self.variants)}.",
                "invalid_request_error",
                "model_not_found",
                "model",
            )
        variant = self.variants[name]
        if not variant.is_up:
            raise _unavailable(name)
        return variant

    async def _forward(self, route: str, body: dict[str, Any], variant: Variant) -> Response:
        stopwatch = Stopwatch()
        is_stream = route in GENERATING and body.get("stream") is True
        options = body.get("stream_options")
        has_usage = isinstance(options, dict) and options.get("include_usage") is True
        if is_stream and (options is None or isinstance(options, dict)):
            body = {**body, "stream_options": {**(options or {}), "include_usage": True}}
        in_flight = self.metrics.in_flight.labels(variant.name)
        in_flight.inc()
        is_left_open = False
        try:
            upstream = await self._send(route, body, variant)
            media_type = upstream.headers.get("content-type", "application/json")
            if is_stream and upstream.status_code == 200:
                events = self._stream(upstream, stopwatch, variant.name, has_usage)
                is_left_open = True
                return _ProxiedStream(events, upstream, in_flight.dec, media_type)
            try:
                content = await upstream.aread()
            except httpx.HTTPError as error:
                raise _from_httpx(error, variant.name) from None
            finally:
                await upstream.aclose()
        finally:
            if not is_left_open:
                in_flight.dec()
        if route in GENERATING and upstream.status_code == 200:
            usage = json.loads(content)["usage"]
            timing = stopwatch.finish(usage["completion_tokens"])
            self.metrics.observe(variant.name, timing, usage["prompt_tokens"])
        return Response(content, upstream.status_code, media_type=media_type)

    async def _send(self, route: str, body: dict[str, Any], variant: Variant) -> httpx.Response:
        request = self.client.build_request("POST", f"{variant.url}{route}", json=body)
        try:
            return await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _from_httpx(error, variant.name) from None

    async def _stream(
        self, upstream: httpx.Response, stopwatch: Stopwatch, variant: str, has_usage: bool
    ) -> AsyncIterator[bytes]:
        prompt_tokens = 0
        is_done = False
        try:
            async for line in upstream.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if is_done := data == "[DONE]":
                    yield DONE
                    break
                chunk = json.loads(data)
                stopwatch.observe(chunk)
                if usage := chunk.get("usage"):
                    prompt_tokens = usage["prompt_tokens"]
                    if not has_usage and not chunk.get("choices"):
                        continue
                if not has_usage:
                    chunk.pop("usage", None)
                    data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                yield f"data: {data}\n\n".encode()
            if is_done:
                self.metrics.observe(variant, stopwatch.finish(), prompt_tokens)
            else:
                yield _error_event(_unavailable(variant))
        except httpx.HTTPError as error:
            yield _error_event(_from_httpx(error, variant))
        except ValueError:
            logger.warning("%s: sent an event that is not JSON", variant)
            yield _error_event(_unavailable(variant))

    async def models(self) -> dict[str, Any]:
        """OpenAI's model list: each variant that answers, as its worker describes it."""
        cards = []
        for variant in self.variants.values():
            with suppress(httpx.HTTPError, ValueError, KeyError):
                response = await self.client.get(f"{variant.url}/v1/models", timeout=5)
                cards += [{**card, "owned_by": "cast-serve"} for card in response.json()["data"]]
        return {"object": "list", "data": cards}

    async def exposition(self) -> bytes:
        """Prometheus text of the gateway and of every worker that answers."""
        texts = {}
        for name, variant in self.variants.items():
            with suppress(httpx.HTTPError):
                response = await self.client.get(f"{variant.url}/metrics", timeout=5)
                if response.status_code == 200:
                    texts[name] = response.text
        return self.metrics.expose(texts)


class _ProxiedStream(StreamingResponse):
    """Closes the upstream however the response ends; for a client that left, vLLM then aborts."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        upstream: httpx.Response,
        on_end: Callable[[], None],
        media_type: str,
    ) -> None:
        super().__init__(events, media_type=media_type)
        self._upstream = upstream
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._upstream.aclose()


def create_app(
    variants: Sequence[Variant],
    settings: GatewaySettings,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The gateway as an ASGI application; its lifespan starts and stops the local workers.

    Args:
        variants: at least one.
        settings: see `GatewaySettings`.
        on_failure: called when a local worker ends by itself; ``app.state.gateway.failure``
            says why.
    """
    gateway = Gateway(variants, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            variant_processes.start(variants)
            watching = asyncio.create_task(gateway.watch(on_failure))
            yield
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        finally:
            await asyncio.to_thread(variant_processes.stop, variants)
            await gateway.client.aclose()

    app = FastAPI(title="cast-serve", lifespan=lifespan)
    app.state.gateway = gateway

    for path in PROXIED:
        app.add_api_route(path, gateway.proxy, methods=["POST"])
    app.add_api_route("/v1/models", gateway.models, methods=["GET"])

    @app.get("/livez")
    async def livez() -> Response:
        return Response(status_code=200)

    @app.get("/startupz")
    async def startupz() -> Response:
        return Response(status_code=200 if gateway.has_started else 503)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        states = {name: variant.is_up for name, variant in gateway.variants.items()}
        return JSONResponse(states, 200 if gateway.is_ready else 503)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if gateway.is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        from importlib.metadata import version as version_of

        return {"version": version_of("cast-serve")}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await gateway.exposition(), media_type=CONTENT_TYPE)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        described = APIError(
            error.status_code,
            f"{request.method} {request.url.path}: {error.detail}",
            "invalid_request_error",
        )
        return JSONResponse(described.body, error.status_code, error.headers)

    return app


async def serve(variants: Sequence[Variant], settings: GatewaySettings) -> None:
    """Runs the gateway until SIGTERM or Ctrl-C, then lets running requests finish.

    Raises:
        VariantError: if a local worker did not start or ended by itself.
    """
    import signal

    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:  # uvicorn's own would end us with the signal, not with 0
            return nullcontext()

    def stop(*_: object) -> None:
        server.force_exit = server.should_exit  # the second signal does not wait for requests
        server.should_exit = True

    app = create_app(variants, settings, on_failure=stop)
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=int(settings.shutdown_grace_s),
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await server.serve()
    if app.state.gateway.failure is not None:
        raise app.state.gateway.failure


def _bad_request(message: str, param: str | None = None) -> APIError:
    return APIError(400, message, "invalid_request_error", None, param)


def _unavailable(variant: str) -> APIError:
    return APIError(
        503,
        f"variant {variant!r} does not answer at present; try again shortly",
        "server_error",
        "variant_unavailable",
    )


def _from_httpx(error: httpx.HTTPError, variant: str) -> APIError:
    if isinstance(error, httpx.ReadTimeout):
        return APIError(
            504, f"variant {variant!r} did not answer in time", "server_error", "timeout"
        )
    logger.warning("%s: %s: %s", variant, type(error).__name__, error)
    return _unavailable(variant)


def _error_event(error: APIError) -> bytes:
    return f"data: {json.dumps(error.body)}\n\n".encode()
