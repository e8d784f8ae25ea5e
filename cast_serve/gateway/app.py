"""Variants + settings -> the gateway: an OpenAI-compatible HTTP application, started and stopped.

    client -> RequestLog -> HeadLimit -> KeyCheck -> route -> Proxy -> vLLM workers

Routes are here, and how the parts are put together; proxy.py is the way of a request,
upstream/variants.py starts and stops the workers.
"""

import asyncio
import gc
import logging
import math
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from rich.console import Console
from starlette.exceptions import HTTPException

from cast_serve.errors import UsageError, VariantError
from cast_serve.gateway.accounts import Accounts
from cast_serve.gateway.admission import Places
from cast_serve.gateway.api import openapi, paths
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.bodies import BodyReader
from cast_serve.gateway.compare.asker import Asker
from cast_serve.gateway.compare.canary import canary_of
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.models import describe, describe_directory
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.dashboard import page
from cast_serve.gateway.forward import Forwarder
from cast_serve.gateway.metrics import CONTENT_TYPE, Metrics
from cast_serve.gateway.middleware import tracing
from cast_serve.gateway.middleware.heads import BoundedHead, HeadLimit
from cast_serve.gateway.middleware.keys import load_keys
from cast_serve.gateway.middleware.request_log import RequestLog
from cast_serve.gateway.models import ModelList
from cast_serve.gateway.proxy import COMPARE, PROXIED, Proxy
from cast_serve.gateway.retries import STALE
from cast_serve.gateway.router import Router
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import loading
from cast_serve.gateway.upstream import variants as workers
from cast_serve.gateway.upstream.client import Client
from cast_serve.gateway.upstream.control import Control
from cast_serve.gateway.upstream.replica import Replica, Variant, stop_workers
from cast_serve.gateway.upstream.roll import Roller
from cast_serve.gateway.upstream.supervisor import Supervisor, WatchSettings
from cast_serve.key_check import KeyCheck
from cast_serve.worker_key import is_loopback, read_key

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # of a connection without a request
NEEDS_KEY = "this gateway requires an API key; send the header Authorization: Bearer KEY"
LAST_WORDS_S = 1.0  # for clients to read why they were cut off


class Gateway:
    """The parts of the gateway and how they know of each other; what its probes say.

    Raises:
        UsageError: if the workers' key or the canary's guard rails cannot be read, or a split or
            fallback names an unknown variant.
    """

    def __init__(self, variants: Sequence[Variant], settings: GatewaySettings) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.settings = settings
        self.router = Router(self.variants, settings.split_weights, settings.fallbacks)
        self.places = Places(self.variants, settings.max_running, settings.max_queued)
        self.comparison = Comparison(list(self.variants), settings.comparison_window)
        self.canary = canary_of(settings, self.router.split, self.comparison)

        key = read_key(settings.worker_key, settings.worker_key_file)
        self.client = Client(workers.share_key(variants, key))
        forwarder = Forwarder(
            self.client, self._note_state, self._count_resend, settings.max_answer_bytes
        )
        asker = Asker(self.variants, forwarder, self.places, settings.request_timeout_s)
        self.shadow = Shadow(
            settings.shadow_fraction,
            settings.shadow_concurrency,
            self.comparison,
            asker.repeat,
            asker.max_scored_tokens,
            self.canary,
        )
        self.metrics = Metrics(
            self.comparison,
            self.shadow.outcomes,
            self.places.admissions,
            self.router.fallbacks,
            self.canary,
        )
        self.bodies = BodyReader(settings)
        accounts = Accounts(self.metrics, self.comparison, self.shadow, self.bodies, self.canary)
        self.proxy = Proxy(
            settings,
            self.bodies,
            self.router,
            self.places,
            forwarder,
            accounts,
            asker,
            self.metrics,
            self.comparison.baseline,
        )
        self.models = ModelList(self.variants, self.router, self.client)
        self.descriptions = describe(variants)

        watching = WatchSettings(
            settings.health_interval_s, settings.startup_timeout_s, settings.hang_timeout_s
        )
        self.supervisor = Supervisor(self.client, watching, self._note)
        self.roller = Roller(
            self.variants,
            self.supervisor,
            settings.request_timeout_s + 5,
            self._note_switch,
            self._note_roll,
        )
        self.control = Control(settings.control_socket, settings.port, self.roller.roll)
        self.has_started = False
        self.is_draining = False
        self.failure: VariantError | None = None
        self._num_restarts: dict[Replica, int] = {}

    @property
    def is_ready(self) -> bool:
        """Whether every model that is advertised will be answered, by itself or its fallback."""
        answered = all(self.router.answerer(variant) for variant in self.variants.values())
        return answered and not self.is_draining

    async def open_control(self) -> None:
        """Opens the socket of `cast-serve roll`, if there are local workers to roll.

        Raises:
            VariantError: if the control_socket of the settings cannot be listened on.
        """
        if all(replica.model is None for replica in workers.replicas_of(self.variants.values())):
            return
        try:
            await self.control.open()
        except OSError as error:
            text = f"`cast-serve roll` cannot connect to {self.control.path}: {error}"
            if self.settings.control_socket is not None:
                self.failure = VariantError(text)
                raise self.failure from None
            logger.warning("gateway: %s", text)

    async def watch(self, on_failure: Callable[[], None]) -> None:
        """Watches the workers; calls on_failure if one fails for good, or the watch itself does."""
        try:
            await self.supervisor.run(workers.replicas_of(self.variants.values()))
        except VariantError as failure:
            self.failure = failure
        except Exception as error:  # unwatched, a dead worker would stay up and never come back
            logger.exception("gateway: monitoring the workers failed")
            self.failure = VariantError(f"monitoring the workers failed: {error!r}")
        on_failure()

    async def close(self) -> None:
        """Ends background work; no request may follow."""
        await self.shadow.close()
        await self.client.close()
        self.bodies.close()

    def _note(self, replica: Replica) -> None:
        self._note_state(replica)
        new = replica.num_restarts - self._num_restarts.get(replica, 0)
        self.metrics.restarts.labels(replica.variant).inc(new)
        self._num_restarts[replica] = replica.num_restarts
        if not self.has_started and all(v.is_up for v in self.variants.values()):
            self.has_started = True
            if self.canary is not None:
                self.canary.begin()

    def _note_state(self, replica: Replica) -> None:
        """Brings gauges and queue in line with a replica that may have come up or gone down."""
        variant = self.variants[replica.variant]
        self.metrics.note_state(variant)
        self.places.note_state(variant.name)

    def _note_switch(self, replica: Replica) -> None:
        self._note_state(replica)
        self.comparison.forget(replica.variant)
        if self.canary is not None:
            self.canary.forget(replica.variant)
        assert replica.model is not None
        self.descriptions[replica.variant] = describe_directory(replica.model)

    def _note_roll(self, name: str, outcome: str) -> None:
        self.metrics.rolls.labels(name, outcome).inc()

    def _count_resend(self, replica: Replica) -> None:
        self.metrics.retries.labels(replica.variant, STALE).inc()


def create_app(
    variants: Sequence[Variant],
    settings: GatewaySettings,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The gateway as an ASGI application; its lifespan starts and stops the local workers.

    Args:
        variants: at least one.
        settings: of the gateway.
        on_failure: called when a local worker fails for good, with the cause in
            ``app.state.gateway.failure``.

    Raises:
        UsageError: if the keys or the canary's guard rails cannot be read, or a split or fallback
            names an unknown variant.
    """
    gateway = Gateway(variants, settings)
    digests = load_keys(settings.api_keys, settings.api_keys_file)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            try:
                workers.start(variants, settings.log_dir)
            except OSError as error:  # no memory for a process, no room for its log
                gateway.failure = VariantError(f"the workers could not be started: {error}")
                raise gateway.failure from error
            await gateway.open_control()
            watching = asyncio.create_task(gateway.watch(on_failure))
            yield
            await gateway.control.close()
            await gateway.roller.close()
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        finally:
            await asyncio.to_thread(stop_workers, workers.replicas_of(variants))
            await gateway.close()
            has_failed = gateway.failure is not None  # then the logs say why
            workers.end_logs(variants, is_kept=has_failed or settings.log_dir is not None)

    app = FastAPI(
        title="cast-serve",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go where the Host header says
    )
    app.state.gateway = gateway
    names = [*gateway.variants, *gateway.router.split]
    app.openapi = lambda: openapi.describe(app, names)  # type: ignore[method-assign]

    for path in (*PROXIED, COMPARE):
        app.add_api_route(path, gateway.proxy.answer, methods=["POST"])
    app.add_api_route("/v1/models", gateway.models.all, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", gateway.models.one, methods=["GET"])

    @app.get("/v1/comparison")
    async def comparison() -> dict[str, Any]:
        return {
            **gateway.comparison.snapshot(),
            "shadow_fraction": settings.shadow_fraction,
            "models": gateway.descriptions,
            "canary": gateway.canary and gateway.canary.about(),
        }

    @app.get(paths.LIVENESS, response_class=Response)
    async def livez() -> Response:
        return Response(status_code=200)

    @app.get("/startupz", response_class=Response)
    async def startupz() -> Response:
        return Response(status_code=200 if gateway.has_started else 503)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        states = {v.name: v.status or v.is_up for v in gateway.variants.values()}
        return JSONResponse(states, 200 if gateway.is_ready else 503)

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        return Response(status_code=200 if gateway.is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        from importlib.metadata import version as version_of

        return {"version": version_of("cast-serve")}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        found = await gateway.metrics.expose(gateway.client, gateway.variants.values())
        return Response(found, media_type=CONTENT_TYPE)

    @app.get(paths.DOCS, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(openapi.page(app.openapi()), headers=page.HEADERS)

    app.include_router(page.router())

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        elsewhere = paths.in_place_of(request.url.path) if error.status_code == 404 else ""
        described = APIError(
            error.status_code,
            f"{request.method} {request.url.path[:200]}: {elsewhere or error.detail}",
            "invalid_request_error",
            "not_served" if elsewhere else None,
        )
        return JSONResponse(described.body, error.status_code, error.headers)

    app.add_middleware(KeyCheck, digests=digests, is_open=paths.is_open, message=NEEDS_KEY)
    app.add_middleware(HeadLimit, max_bytes=settings.max_header_bytes)
    if tracing.set_up():
        app.add_middleware(tracing.Spans)
    app.add_middleware(RequestLog)  # the last added is the outermost
    return app


async def serve(variants: Sequence[Variant], settings: GatewaySettings) -> None:
    """Runs the gateway until SIGTERM, SIGHUP or Ctrl-C, then lets running requests finish.

    What still runs after `shutdown_grace_s`, or at a second signal, is cut off.

    Raises:
        UsageError: if the address cannot be listened on.
        VariantError: if a local worker failed for good, or the watch over them did.
    """

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:  # uvicorn's own would end us with the signal, not with 0
            return nullcontext()

    def close() -> None:
        server.should_exit = True

    def cut_off() -> None:
        """Ends each request with an error; uvicorn's force_exit would not wait even for that."""
        for task in list(server.server_state.tasks):
            task.cancel()
        loop.call_later(LAST_WORDS_S, abort)

    def abort() -> None:
        for connection in list(server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def stop(*_: object) -> None:
        gateway = app.state.gateway
        if gateway.is_draining:  # the second signal does not wait for requests
            close()
            cut_off()
            return
        gateway.is_draining = True
        logger.info("gateway: stopping once the running requests are answered")
        loop.call_later(settings.drain_delay_s, close)

    has_keys = settings.api_keys or settings.api_keys_file is not None
    if not (has_keys or is_loopback(settings.host)):
        logger.warning(
            "gateway: listens on %s without API keys, so anyone who can reach it can use it; set "
            "CAST_API_KEYS or CAST_API_KEYS_FILE",
            settings.host,
        )
    app = create_app(variants, settings, on_failure=close)
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(  # type: ignore[arg-type]
                BoundedHead,
                timeout_s=settings.body_timeout_s,
                max_bytes=settings.max_header_bytes,
            ),
            ws="none",
            limit_concurrency=settings.max_connections,
            # Longer than nginx keeps one (60 s): a request must not meet a connection that closes.
            timeout_keep_alive=KEEP_ALIVE_S,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s),
        )
    )
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, stop)
    gc.collect()
    gc.freeze()  # what is here stays; a collection that went through it would hold up every stream
    showing = asyncio.create_task(loading.show(variants, Console(stderr=True)))
    try:
        await server.serve()
    except SystemExit:  # uvicorn's, with the cause in its log
        raise UsageError(
            f"{settings.host}:{settings.port} cannot be listened on; free it or name another port"
        ) from None
    finally:
        gc.unfreeze()
        for number in signals:  # uvloop leaves its own where it has closed
            loop.remove_signal_handler(number)
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    if app.state.gateway.failure is not None:
        raise app.state.gateway.failure
