"""The gateway in front of fake workers, over real sockets."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from cast_serve.gateway import create_app
from cast_serve.settings import GatewaySettings
from cast_serve.variants import Variant
from tests.cast_serve import fake_worker


@dataclass
class Stack:
    client: httpx.Client
    workers: dict[str, FastAPI]

    def complete(self, **body: object) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "a b", **body})

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = self.client.get("/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


class Servers:
    def __init__(self) -> None:
        self.running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(self, app: FastAPI) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        self.running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        for server, thread in reversed(self.running):
            server.should_exit = True
            thread.join()


@pytest.fixture
def stack() -> Iterator[Stack]:
    servers = Servers()
    workers = {name: fake_worker.create_app(name) for name in ("dense", "sparse")}
    variants = [Variant(name, servers.start(app)) for name, app in workers.items()]
    settings = GatewaySettings(max_body_bytes=10_000, health_interval_s=0.05)
    url = servers.start(create_app(variants, settings))
    with httpx.Client(base_url=url, timeout=10) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield Stack(client, workers)
    servers.stop()


def wait_until(is_true: object, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


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
        (b"[" * 5000, 400, "not valid JSON"),
        (b"[1]", 400, "is a JSON list, not an object"),
        (b'{"prompt": "x"}', 400, "model must be one of ['dense', 'sparse']"),
        (b'{"model": 3}', 400, "got 3"),
        (b'{"model": "nope"}', 404, "The model 'nope' does not exist"),
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
    response = stack.complete(model="dense", max_tokens=-1)
    assert response.status_code == 400
    assert response.json() == {"error": {"message": "max_tokens", "code": 400}}


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


def test_models_lists_both(stack: Stack) -> None:
    models = stack.client.get("/v1/models").json()
    assert [card["id"] for card in models["data"]] == ["dense", "sparse"]


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
        labels = (("engine", "0"), ("model_name", "x"), ("variant", name))
        assert metrics["vllm:num_requests_running", labels] == 3
    assert not [name for name, _ in metrics if name.startswith("python_")]
