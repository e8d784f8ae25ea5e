"""The gateway in front of fake workers, over real sockets."""

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
import uvloop
from fastapi.testclient import TestClient

from cast_serve.gateway.app import create_app, serve
from cast_serve.gateway.commands import check_port_is_free
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.variants import local_variants, remote_variants
from tests.cast_serve.gateway.stack import Stack, events, running, wait_until


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running() as found:
        yield found


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_the_model_field_picks_the_variant(stack: Stack, name: str) -> None:
    response = stack.complete(model=name, temperature=0.5)
    assert response.status_code == 200
    assert response.headers["X-Cast-Variant"] == name
    assert response.json()["choices"][0]["text"] == "one two three"
    assert stack.workers[name].state.bodies == [
        {"model": name, "prompt": "a b", "temperature": 0.5}
    ]


def test_a_stream_is_passed_through_without_the_usage_we_asked_for(stack: Stack) -> None:
    response = stack.complete(model="sparse", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["X-Cast-Variant"] == "sparse"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == [
        "one",
        " two",
        " three",
    ]
    assert stack.workers["sparse"].state.bodies[0]["stream_options"] == {"include_usage": True}


def test_a_client_that_wants_usage_gets_it(stack: Stack) -> None:
    response = stack.complete(model="dense", stream=True, stream_options={"include_usage": True})
    *_, usage, done = events(response)
    assert json.loads(usage)["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{broken", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"model": "dense", "prompt": "\\ud800"}', 400, "not valid JSON"),
        (b'{"model": "dense", "prompt": "\xed\xa0\x80"}', 400, "not valid JSON: 'utf-8' codec"),
        ('{"model": "dense", "prompt": "x"}'.encode("utf-16"), 400, "not valid JSON"),
        (b'{"model": "dense", "prompt": [' + b"[]," * 3000 + b"[]]}", 400, "above the limit of 32"),
        (b"[" * 5000, 400, "not valid JSON"),
        (b"[1]", 400, "is a JSON list, not an object"),
        (b'{"prompt": "x"}', 400, "model is missing"),
        (b'{"model": 3, "prompt": "x"}', 400, "model: Input should be a valid string; got 3"),
        (b'{"model": "nope", "prompt": "x"}', 404, "The model 'nope' does not exist"),
        (b'{"model": "dense", "prompt": "' + b"x" * 10_000 + b'"}', 413, "larger than 10000 bytes"),
    ],
)
def test_bad_requests_get_an_openai_error(
    stack: Stack, content: bytes, status: int, message: str
) -> None:
    response = stack.client.post("/v1/completions", content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not stack.workers["dense"].state.bodies


def test_a_workers_own_error_passes_through(stack: Stack) -> None:
    response = stack.complete(model="dense", user="unwelcome")
    assert response.status_code == 400
    assert response.json() == {"error": {"message": "not you", "code": 400}}


def test_a_workers_error_in_another_shape_is_put_right(stack: Stack) -> None:
    response = stack.client.post("/tokenize", json={"model": "dense"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == ('the worker refused this: {"detail":"prompt"}')
    response = stack.client.post("/tokenize", json={"model": "dense", "prompt": "ab"})
    assert response.json() == {"tokens": [97, 98]}


def test_unknown_routes_and_methods_get_an_openai_error(stack: Stack) -> None:
    assert stack.client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    response = stack.client.get("/v1/completions")
    assert response.status_code == 405
    assert "GET /v1/completions" in response.json()["error"]["message"]


def test_a_stream_that_breaks_off_ends_with_an_error_event(stack: Stack) -> None:
    stack.workers["dense"].state.is_cut_off = True
    *_, last = events(stack.complete(model="dense", stream=True))
    assert json.loads(last)["error"]["code"] == "variant_unavailable"


def test_an_unhealthy_variant_is_answered_503_and_the_other_goes_on(stack: Stack) -> None:
    stack.workers["sparse"].state.is_healthy = False
    wait_until(lambda: stack.client.get("/readyz").status_code == 503)
    assert stack.client.get("/readyz").json() == {"dense": True, "sparse": False}
    assert stack.client.get("/livez").status_code == 200
    assert stack.client.get("/startupz").status_code == 200
    response = stack.complete(model="sparse")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "variant_unavailable"
    assert stack.complete(model="dense").status_code == 200
    stack.workers["sparse"].state.is_healthy = True
    wait_until(lambda: stack.client.get("/health").status_code == 200)


def test_metrics_count_requests_tokens_and_latencies(stack: Stack) -> None:
    for _ in range(5):
        for name in ("dense", "sparse"):
            stack.complete(model=name, stream=True)
    stack.complete(model="dense")
    stack.complete(model="nope")
    metrics = stack.metrics()
    dense = (("variant", "dense"),)
    route = ("route", "/v1/completions")
    assert metrics["cast_requests_total", (("code", "200"), route, dense[0])] == 6
    assert metrics["cast_requests_total", (("code", "404"), route, ("variant", ""))] == 1
    assert metrics["cast_prompt_tokens_total", dense] == 12
    assert metrics["cast_output_tokens_total", dense] == 18
    assert metrics["cast_time_to_first_token_seconds_count", dense] == 5
    assert metrics["cast_inter_token_latency_seconds_count", dense] == 10
    assert metrics["cast_time_per_output_token_seconds_count", dense] == 5
    assert metrics["cast_e2e_request_latency_seconds_count", dense] == 6
    assert metrics["cast_requests_in_flight", dense] == 0
    assert metrics["cast_variant_up", dense] == 1
    assert metrics["cast_speedup_ratio", (("metric", "ttft"), ("quantile", "0.5"))] > 0


def test_the_workers_metrics_get_a_variant_label(stack: Stack) -> None:
    metrics = stack.metrics()
    for name in ("dense", "sparse"):
        labels = (("engine", "0"), ("model_name", "x"), ("replica", "0"), ("variant", name))
        assert metrics["vllm:num_requests_running", labels] == 3
    assert not [name for name, _ in metrics if name.startswith("python_")]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_port_in_use_is_an_error_that_python_can_catch(run: Callable[..., None]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    variants = remote_variants({"dense": ["http://127.0.0.1:9"]})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be listened on; free it"):
            run(serve(variants, GatewaySettings(port=port)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_looked_for_in_the_hosts_own_family(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError as error:
        if host == "127.0.0.1":
            raise
        pytest.skip(f"this machine has no {host}: {error}")  # IPv6 may be off; no package adds it
    port = taken.getsockname()[1]
    with taken, pytest.raises(ValueError, match=f"{host}:{port} cannot be listened on"):
        check_port_is_free(host, port)
    check_port_is_free(host, port)


def test_a_host_that_there_is_not_is_one_line() -> None:
    with pytest.raises(ValueError, match="host.invalid:8000 cannot be listened on"):
        check_port_is_free("host.invalid", 8000)


def test_a_grace_of_less_than_a_second_is_not_none(monkeypatch: pytest.MonkeyPatch) -> None:
    graces_s: list[float | None] = []

    async def note(server: uvicorn.Server) -> None:
        graces_s.append(server.config.timeout_graceful_shutdown)

    monkeypatch.setattr("uvicorn.Server.serve", note)
    for grace_s in (0.5, 30):
        variants = remote_variants({"dense": ["http://127.0.0.1:9"]})
        asyncio.run(serve(variants, GatewaySettings(shutdown_grace_s=grace_s)))
    assert graces_s == [1, 30]


def test_the_comparison_says_what_each_directory_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    variants = local_variants({"dense": WorkerConfig(dir=tmp_path)})
    app = create_app(variants, GatewaySettings(shadow_fraction=0.5))
    shown = TestClient(app).get("/v1/comparison").json()  # without its lifespan: no worker starts
    assert shown["models"]["dense"]["path"] == str(tmp_path)
    assert shown["models"]["dense"]["bits_per_weight"] == 16
    assert shown["shadow_fraction"] == 0.5
