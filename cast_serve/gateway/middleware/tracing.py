"""Requests -> OpenTelemetry spans, if OTEL_EXPORTER_OTLP_ENDPOINT is set.

A span begins in the trace that the client names (traceparent) and is handed on to the worker, whose
own spans (vLLM's --otlp-traces-endpoint) then belong to the same trace.
"""

import os
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.errors import UsageError
from cast_serve.gateway.middleware.request_log import facts_of

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def set_up() -> bool:
    """Prepares the exporter, configured by the OTEL_* variables as everywhere.

    Returns:
        whether spans are exported.

    Raises:
        UsageError: if the variable is set and the packages are missing.
    """
    if not os.environ.get(ENDPOINT):
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"{ENDPOINT} is set, but {error.name} is missing; install it with: "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "cast-serve-gateway")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def outgoing_headers() -> dict[str, str]:
    """The headers that carry the current span to a worker; empty without one."""
    headers: dict[str, str] = {}
    if os.environ.get(ENDPOINT):
        from opentelemetry import propagate

        propagate.inject(headers)
    return headers


class Spans:
    """The middleware: a span per request, with what the log line says as attributes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from opentelemetry import propagate, trace

        carrier = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:200],
        }
        tracer = trace.get_tracer("cast_serve")
        with tracer.start_as_current_span(
            f"{scope['method']} {scope['path'][:200]}",
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        ) as span:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self.app(scope, receive, send_and_note)
            finally:
                for key, value in facts_of(scope).items():
                    if value is not None:
                        span.set_attribute(f"cast.{key}", value)
