import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cast_serve.gateway.middleware import tracing
from tests.cast_serve.gateway.stack import running

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_span_joins_the_clients_trace_and_is_handed_to_the_worker(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = collector
    monkeypatch.setenv(tracing.ENDPOINT, url)
    with running() as stack:
        body = {"model": "sparse", "prompt": "a secret", "stream": True}
        parent = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
        assert stack.client.post("/v1/completions", json=body, headers=parent).status_code == 200
        (handed_on,) = stack.workers["sparse"].state.traces
    # Only now: a span ends a little after the last byte is sent, but before the gateway does.
    trace.get_tracer_provider().shutdown()  # type: ignore[attr-defined]
    spans = [
        span
        for message in received
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "POST /v1/completions"
    ]
    (span,) = spans
    assert span.trace_id.hex() == TRACE_ID
    assert handed_on == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["cast.variant"].string_value == "sparse"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["cast.output_tokens"].int_value == 3
    assert "secret" not in str(received)


def test_without_an_endpoint_nothing_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.ENDPOINT, raising=False)
    assert not tracing.set_up()
    assert tracing.outgoing_headers() == {}
