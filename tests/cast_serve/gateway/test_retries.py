"""A request that failed at one worker: who else is asked, how often, and what is counted."""

import json
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from cast_serve.gateway.api import answers
from cast_serve.gateway.retries import BUDGET
from tests.cast_serve.gateway.raw_worker import (
    RawStack,
    RawWorker,
    cut,
    raw_workers,
    send_json,
    well,
)
from tests.cast_serve.gateway.stack import wait_until

HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"


def check_unavailable(found: httpx.Response) -> None:
    assert (found.status_code, found.json()["error"]["code"]) == (503, "variant_unavailable")
    assert found.headers["Retry-After"] == "1"


def read_by(stack: RawStack, prompt: str) -> int:
    """How often workers have read this prompt."""
    return sum(worker.prompts.count(prompt) for worker in (stack.dense, *stack.sparse))


def poisoned(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A worker that "poison" kills."""
    if body["prompt"] != "poison":
        return well(worker, handler, body)
    handler.close_connection = True
    worker.die()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_kept", [False, True], ids=["first", "on a kept connection"])
def test_a_prompt_that_kills_each_worker_that_reads_it_kills_one(
    is_stream: bool, is_kept: bool
) -> None:
    with raw_workers(poisoned, num_sparse=3) as stack:
        for _ in range(3 * is_kept):
            assert stack.ask("fine").status_code == 200
        check_unavailable(stack.ask("poison", stream=is_stream))
        assert [worker.is_dead for worker in (stack.dense, *stack.sparse)].count(True) == 1
        assert read_by(stack, "poison") == 1
        for _ in range(6):  # those that are left answer all others
            assert stack.ask("fine").headers["X-Cast-Variant"] == "sparse"
        wait_until(lambda: stack.are_up().count(False) == 1)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_that_fails_at_each_worker_is_read_by_two(is_stream: bool) -> None:
    def fail(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send_json(handler, {"error": {"message": "EngineCore died"}}, 500)

    with raw_workers(fail, num_sparse=3) as stack:
        check_unavailable(stack.ask("x", stream=is_stream))
        assert read_by(stack, "x") == 2
        assert stack.retries("failed") == 1
        assert all(stack.are_up())


def test_workers_that_refuse_connections_are_all_passed_over() -> None:
    with raw_workers(well, num_sparse=3) as stack:
        for worker in stack.sparse:
            worker.die()
        assert stack.ask("x").headers["X-Cast-Fallback"] == "sparse"
        assert stack.retries("unreached") == 3
        assert stack.are_up() == [True, False, False, False]


def test_when_all_workers_fail_few_requests_are_sent_twice() -> None:
    def fail(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send_json(handler, {"error": {"message": "overloaded"}}, 503)

    with raw_workers(fail, num_sparse=2) as stack:
        for _ in range(40):
            check_unavailable(stack.ask("x"))
        # The share of them that may be, beside the budget, is a fifth.
        assert BUDGET <= stack.retries("failed") <= BUDGET + 40 / 5
        assert read_by(stack, "x") == 40 + stack.retries("failed")


def test_broken_connections_of_some_cost_others_nothing() -> None:
    def drop(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["prompt"] != "drop":
            return well(worker, handler, body)
        handler.close_connection = True
        cut(handler.connection)

    with raw_workers(drop, num_sparse=2) as stack, ThreadPoolExecutor(4) as pool:
        others = []
        for _ in range(6):
            asked = [pool.submit(stack.ask, "fine") for _ in range(10)]
            check_unavailable(stack.ask("drop"))
            others += [each.result() for each in asked]
        assert {found.status_code for found in others} == {200}
        assert {found.headers["X-Cast-Variant"] for found in others} == {"sparse"}
        assert all(stack.are_up())


@pytest.mark.parametrize("sent", [b"", HALF], ids=["without a byte", "midway"])
def test_an_answer_that_is_cut_is_generated_once(sent: bytes) -> None:
    def cut_off(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.wfile.write(sent)
        handler.close_connection = True
        cut(handler.connection)

    with raw_workers(cut_off, num_sparse=3) as stack:
        check_unavailable(stack.ask("x"))
        assert read_by(stack, "x") == 1
        assert all(stack.are_up())


def test_a_connection_that_was_closed_meanwhile_is_not_a_lost_variant() -> None:
    """A server may close what it kept just as a request comes on it."""

    def close(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["prompt"] != "late" or worker.prompts.count("late") == 2:
            return well(worker, handler, body)
        handler.close_connection = True
        cut(handler.connection)

    with raw_workers(close) as stack:
        assert stack.ask("x").status_code == 200
        found = stack.ask("late")
        assert (found.status_code, found.headers["X-Cast-Variant"]) == (200, "sparse")
        assert stack.sparse[0].prompts == ["x", "late", "late"]
        assert stack.retries("stale") == 1
        assert all(stack.are_up())


@pytest.mark.parametrize("status", [99, 101, 204, 206, 301, 302, 304, 307, 308, 500, 599])
def test_what_is_neither_200_nor_4xx_is_a_failed_replica(status: int) -> None:
    def answer(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        head = f"HTTP/1.1 {status:03} X\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"
        handler.wfile.write(head.encode())
        handler.close_connection = True
        cut(handler.connection)

    with raw_workers(answer) as stack:
        for is_stream in (False, True):
            check_unavailable(stack.ask("x", stream=is_stream))
        assert all(stack.are_up())


def test_a_fault_of_ours_takes_no_worker_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp has a RuntimeError for a lost connection, and Python some for programs."""

    def fail(*_: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    def stream(worker: RawWorker, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        event = b"data: " + json.dumps({"choices": [{"index": 0, "text": "a"}]}).encode() + b"\n\n"
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + event)

    monkeypatch.setattr(answers, "parsed", fail)
    for answer, is_stream in ((well, False), (stream, True)):
        with raw_workers(answer, num_sparse=2) as stack:
            found = stack.ask("x", stream=is_stream)
            assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
            assert read_by(stack, "x") == 1
            assert all(stack.are_up())
            assert 'code="500"' in stack.client.get("/metrics").text
