"""Workers that fail and clients that leave: who is answered by whom, and what is counted."""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cast_serve.gateway.upstream import supervisor
from tests.cast_serve.gateway.stack import (
    Stack,
    events,
    num_requests,
    running,
    wait_until,
)


def test_an_engine_that_dies_in_a_stream_is_an_error_and_no_latency() -> None:
    with running() as stack:
        stack.workers["dense"].state.error_at = 2
        *words, last = events(stack.complete(model="dense", stream=True))
        assert [json.loads(word)["choices"][0]["text"] for word in words] == ["one", " two"]
        error = json.loads(last)["error"]
        assert error["code"] == "variant_unavailable"
        assert "EngineCore" not in last
        wait_until(lambda: num_requests(stack, "dense", 503) == 1)
        assert num_requests(stack, "dense", 200) == 0
        count = "cast_e2e_request_latency_seconds_count"
        assert stack.metrics().get((count, (("variant", "dense"),)), 0) == 0
        assert stack.client.get("/v1/comparison").json()["variants"]["dense"]["num_requests"] == 0


def test_an_engine_that_dies_before_its_first_word_has_another_one_asked() -> None:
    with running(fallback="sparse=dense") as stack:
        stack.workers["sparse"].state.error_at = 0
        found = stack.complete(model="sparse", stream=True)
        assert found.headers["X-Cast-Fallback"] == "sparse"
        *words, done = events(found)
        assert (len(words), done) == (3, "[DONE]")


def test_a_refusal_in_a_stream_reaches_the_client() -> None:
    with running() as stack:
        worker = stack.workers["dense"]
        worker.state.error = {"message": "no such grammar", "type": "BadRequest", "code": 400}
        worker.state.error_at = 0
        found = stack.complete(model="dense", stream=True)
        assert (found.status_code, found.json()["error"]["message"]) == (400, "no such grammar")
        assert num_requests(stack, "dense", 400) == 1


@pytest.mark.parametrize(
    "event",
    [
        *("5", "null", "{", '{"choices": [1]}', '{"choices": 3}', "[" * 100_000),
        *('{"choices": [{"delta": 5}]}', '{"choices": [{"text": ["a"]}]}', '{"usage": 5}'),
        '{"usage": {"prompt_tokens": 1, "completion_tokens": "three"}}',
        '{"usage": {"prompt_tokens": null, "completion_tokens": 3}}',
        '{"usage": {"prompt_tokens": 1, "completion_tokens": -3}}',
    ],
    ids=lambda event: event[:60],
)
def test_an_event_that_is_none_ends_the_stream_with_ours(event: str) -> None:
    with running() as stack:
        worker = stack.workers["dense"]
        worker.state.error_at = 1
        worker.state.raw_event = event
        *_, last = events(stack.complete(model="dense", stream=True))
        assert json.loads(last)["error"]["code"] == "variant_unavailable"
        wait_until(lambda: num_requests(stack, "dense", 503) == 1)


def test_a_worker_that_answers_500_is_passed_over_and_checked_at_once() -> None:
    with running(num_replicas=2, health_interval_s=30) as stack:
        replica = stack.gateway.variants["dense"].replicas[0]
        state = stack.workers["dense"].state
        state.status = state.canary_status = 500  # its /health stays good
        assert stack.complete(model="dense").status_code == 200
        assert len(stack.others["dense"].state.bodies) == 1
        wait_until(lambda: not replica.is_up)
    with running(fallback="sparse=dense", health_interval_s=0.05) as stack:
        state = stack.workers["sparse"].state
        state.status = state.canary_status = 500
        assert stack.complete(model="sparse").headers["X-Cast-Fallback"] == "sparse"
        wait_until(lambda: not stack.gateway.variants["sparse"].is_up)
        state.status = state.canary_status = 200
        wait_until(lambda: stack.gateway.variants["sparse"].is_up)
        assert "X-Cast-Fallback" not in stack.complete(model="sparse").headers


def test_a_request_that_fails_for_its_own_sake_takes_no_worker_down() -> None:
    with running() as stack:
        stack.workers["dense"].state.status = 500
        downs = []
        replica = stack.gateway.variants["dense"].replicas[0]
        for _ in range(5):
            found = stack.complete(model="dense")
            assert (found.status_code, found.json()["error"]["code"]) == (
                503,
                "variant_unavailable",
            )
            assert "EngineCore" not in found.text
            wait_until(lambda: not replica.is_doubted.is_set())
            downs.append(not replica.is_up)
        assert not any(downs)


def test_a_comparison_has_the_models_limits_and_one_for_its_log_probabilities() -> None:
    with running() as stack:
        found = stack.client.post("/v1/compare", json={"prompt": "x", "max_tokens": 65})
        assert (found.status_code, found.json()["error"]["param"]) == (400, "max_tokens")
        found = stack.client.post("/v1/compare", json={"prompt": "x " * 1022, "max_tokens": 3})
        assert found.status_code == 200
        assert found.json()["agreement"]["sparse"]["token_agreement"] is None
        assert "1025 tokens" in found.json()["agreement"]["sparse"]["reason"]
        bodies = [body for worker in stack.workers.values() for body in worker.state.bodies]
        assert len(bodies) == 2
        assert not [body for body in bodies if "prompt_logprobs" in body]
        stack.workers["sparse"].state.status = 400
        found = stack.client.post("/v1/compare", json={"prompt": "x", "max_tokens": 3})
        assert found.status_code == 400  # as the worker said, and not 503


def test_a_comparison_ends_with_its_client() -> None:
    with running() as stack:
        for worker in stack.workers.values():
            worker.state.gate.clear()
        with half_sent(stack, "/v1/compare", json.dumps({"prompt": "x"}).encode(), 0):
            wait_until(lambda: any(worker.state.bodies for worker in stack.workers.values()))
        wait_until(lambda: sum(worker.state.num_left for worker in stack.workers.values()) == 1)
        wait_until(lambda: num_requests(stack, "", 499, "/v1/compare") == 1)
        assert [a.num_running for a in stack.gateway.places.admissions.values()] == [0, 0]


@contextmanager
def half_sent(stack: Stack, path: str, content: bytes, num_missing: int) -> Iterator[None]:
    """A request that lacks its last bytes; at the end the client leaves."""
    address = (stack.client.base_url.host, stack.client.base_url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content) + num_missing}"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        yield


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/compare"])
def test_a_client_that_leaves_in_mid_body_is_499(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as stack:
        for _ in range(12):
            with half_sent(stack, path, b'{"model": "dense"', 100):
                pass
        wait_until(lambda: num_requests(stack, "", 499, path) == 12)
        assert num_requests(stack, "", 500, path) == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "text", ["{{{{", "a b c d\n", 'x{y="', "# TYPE x y z\n", "\0\x01", "x 1e\n"]
)
def test_metrics_that_cannot_be_parsed_spoil_no_others(text: str) -> None:
    with running() as stack:
        stack.workers["sparse"].state.metrics = text
        found = stack.client.get("/metrics")
        assert found.status_code == 200
        labels = 'engine="0",model_name="x",replica="0",variant="dense"'
        assert f"vllm:num_requests_running{{{labels}}} 3.0" in found.text
        assert 'cast_variant_up{variant="sparse"} 1.0' in found.text


def test_a_fault_of_the_gateways_own_has_the_requests_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("ours")

    with running() as stack, caplog.at_level(logging.INFO):
        monkeypatch.setattr(stack.gateway.router, "choose", fail)
        asked = {"model": "dense", "prompt": "x"}
        headers = {"X-Request-Id": "mine"}
        found = stack.client.post("/v1/completions", json=asked, headers=headers)
        assert (found.status_code, found.headers["X-Request-Id"]) == (500, "mine")
        assert found.json()["error"]["type"] == "server_error"
        assert num_requests(stack, "", 500) == 1
    lines = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    assert [line["status"] for line in lines if line.get("request_id") == "mine"] == [500]


def test_metrics_that_are_garbage_are_no_limits() -> None:
    with running() as stack:
        worker = stack.workers["dense"].state
        variant = stack.gateway.variants["dense"]
        assert variant.vocabulary_size == 100
        worker.is_healthy = False
        wait_until(lambda: not variant.is_up)
        worker.metrics = "cast_worker_vocabulary_size +Inf\ncast_worker_step_seconds NaN\n"
        worker.is_healthy = True
        wait_until(lambda: variant.is_up)
        limits = variant.replicas[0].limits
        assert (limits.vocabulary_size, limits.step_s) == (None, None)


@pytest.mark.parametrize("cards", [5, [5], None, {"a": 1}])
def test_a_model_list_that_is_none_spoils_no_other(cards: object) -> None:
    with running() as stack:
        stack.workers["sparse"].state.cards = cards
        found = stack.client.get("/v1/models")
        assert found.status_code == 200
        dense, sparse = found.json()["data"]
        assert (dense["id"], dense["max_model_len"]) == ("dense", 64)
        assert sparse == {"id": "sparse", "object": "model", "owned_by": "cast-serve"}


def test_a_comparison_with_a_worker_that_counts_nothing_is_503() -> None:
    with running() as stack:
        stack.workers["sparse"].state.has_usage = False
        found = stack.client.post("/v1/compare", json={"prompt": "x", "max_tokens": 3})
        assert (found.status_code, found.json()["error"]["code"]) == (503, "variant_unavailable")


def test_an_answer_that_a_worker_gave_up_is_none() -> None:
    """vLLM's, told to end, answers 200 with no token and the reason abort."""
    with running(fallback="sparse=dense") as stack:
        stack.workers["sparse"].state.reason = "abort"
        found = stack.complete(model="sparse")
        assert found.headers["X-Cast-Fallback"] == "sparse"
        assert found.json()["choices"][0]["finish_reason"] == "length"
        variant = stack.gateway.variants["sparse"]
        wait_until(lambda: not variant.is_up)  # its canary is given up as well
        assert stack.client.get("/v1/models/sparse").json()["status"] == "down"


def test_a_stream_that_a_worker_gave_up_ends_with_an_error() -> None:
    with running() as stack:
        stack.workers["sparse"].state.reason = "abort"
        *words, last = events(stack.complete(model="sparse", stream=True))
        assert len(words) == 2
        assert json.loads(last)["error"]["code"] == "variant_unavailable"


def test_what_a_server_says_of_itself_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may stand behind its URL, as a Service's, without ever having been down."""
    monkeypatch.setattr(supervisor, "LIMITS_INTERVAL_S", 0.1)
    with running() as stack:
        assert stack.complete(model="sparse", max_tokens=100).status_code == 400
        state = stack.workers["sparse"].state
        state.cards = [{**state.cards[0], "max_model_len": 200}]
        wait_until(lambda: stack.complete(model="sparse", max_tokens=100).status_code == 200)
