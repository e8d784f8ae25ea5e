"""Requests against the mock: when they leave, their time stamps, or the class of their error."""

import asyncio
from dataclasses import replace

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request as HTTPRequest

from loadtest.errors import UnreachableError
from loadtest.mock_server import MockVariant, create_app
from loadtest.record import Request
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from loadtest.send.workload import Conversation, Prompt, Turn
from tests.loadtest.conftest import Serve, ServeApp, conversations

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)


def complete(
    url: str,
    variant: str,
    timeout_s: float = 30.0,
    prompt: Prompt = "one two three",
    intended_send_s: float | None = None,
) -> Request:
    async def ask() -> Request:
        async with Client(url, timeout_s=timeout_s) as client:
            return await client.complete(variant, 3, prompt, 4, intended_send_s)

    return asyncio.run(ask())


def test_a_complete_response(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(ttft_s=0.08, itl_s=0.02))
    request = complete(url, "dense")
    assert request.error is None
    assert (request.variant, request.prompt_index, request.prompt_tokens) == ("dense", 3, 3)
    timing = request.timing
    assert timing is not None
    assert timing.output_tokens == 4
    assert len(timing.token_events_s) == 4
    # The mock never answers early, so these hold however slow the machine is.
    assert timing.ttft_s is not None
    assert timing.ttft_s >= 0.08
    assert timing.e2e_s >= 0.08 + 3 * 0.02
    assert app.state.requests == [("dense", "one two three")]


@pytest.mark.parametrize(
    ("variant", "error"),
    [
        (MockVariant(0.0, 0.0, fail_every=1), "http_503"),
        (MockVariant(0.0, 0.0, is_cut_off=True), "incomplete_stream"),
        (MockVariant(0.0, 0.0, missing_tokens=4), "no_output"),
        (MockVariant(0.0, itl_s=0.2), "timeout"),
        (None, "http_404"),
    ],
)
def test_errors_are_classed(serve: Serve, variant: MockVariant | None, error: str) -> None:
    url, _ = serve(**({} if variant is None else {"dense": variant}))
    request = complete(url, "dense", timeout_s=0.3 if error == "timeout" else 30.0)
    assert request.error == error
    assert request.timing is None
    assert complete("http://127.0.0.1:1", "dense").error == "connect_error"


TOKEN = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (TOKEN + 'data: {"error": {"message": "engine died"}}\n\n', "stream_error"),
        (TOKEN + "data: {\n\n", "malformed_chunk"),
        (TOKEN + "data: []\n\n", "malformed_chunk"),
        (
            TOKEN + 'data: {"usage": {"completion_tokens": -1}}\n\ndata: [DONE]\n\n',
            "malformed_chunk",
        ),
        (
            TOKEN + 'data: {"usage": {"completion_tokens": "1"}}\n\ndata: [DONE]\n\n',
            "malformed_chunk",
        ),
        (TOKEN, "incomplete_stream"),
        (
            TOKEN + 'data: {"usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n',
            "answered_by_fallback",
        ),
    ],
)
def test_broken_streams_are_classed(serve_app: ServeApp, stream: str, error: str) -> None:
    app = FastAPI()
    headers = {"X-Cast-Fallback": "sparse"} if error == "answered_by_fallback" else {}
    app.add_api_route(
        "/v1/completions", lambda: PlainTextResponse(stream, headers=headers), methods=["POST"]
    )
    request = complete(serve_app(app), "dense")
    assert (request.error, request.timing) == (error, None)


def test_a_stream_without_usage_has_a_token_for_each_event(serve_app: ServeApp) -> None:
    app = FastAPI()
    stream = TOKEN * 3 + "data: [DONE]\n\n"
    app.add_api_route("/v1/completions", lambda: PlainTextResponse(stream), methods=["POST"])
    request = complete(serve_app(app), "dense")
    assert (request.error, request.output_tokens, request.prompt_tokens) == (None, 3, None)


CLOSED = Batch("dense", conversations((f"prompt {n}" for n in range(6)), 3), concurrency=2)


def send(url: str, batch: Batch) -> Sent:
    async def measure() -> Sent:
        async with Client(url, timeout_s=30.0) as client:
            return await client.send(batch)

    return asyncio.run(measure())


def most_in_flight(sent: Sent) -> int:
    begun = [request.sent_s for request in sent.requests]
    return max(
        sum(request.sent_s <= moment < request.ended_s for request in sent.requests)
        for moment in begun
    )


def test_a_closed_loop_sends_when_a_place_is_free(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.02, 0.01))
    sent = send(url, CLOSED)
    assert [request.prompt_index for request in sent.requests] == list(range(6))
    assert most_in_flight(sent) == 2
    freed = {sent.started_s} | {request.ended_s for request in sent.requests}
    assert all(request.intended_send_s in freed for request in sent.requests)


def test_an_open_loop_sends_on_time_whatever_is_outstanding(serve_app: ServeApp) -> None:
    """The server answers none before all six are there."""
    app = FastAPI()
    num_arrived = 0

    @app.post("/v1/completions")
    async def complete() -> Response:
        nonlocal num_arrived
        num_arrived += 1
        while num_arrived < 6:
            await asyncio.sleep(0.01)
        usage = 'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
        return PlainTextResponse(TOKEN + usage + "data: [DONE]\n\n")

    due_s = (0.0, 0.0, 0.01, 0.02, 0.03, 0.1)
    sent = send(serve_app(app), replace(CLOSED, due_s=due_s))
    assert [request.error for request in sent.requests] == [None] * 6
    assert [request.intended_send_s - sent.started_s for request in sent.requests] == pytest.approx(
        due_s
    )
    assert all(request.sent_s >= request.intended_send_s for request in sent.requests)
    assert most_in_flight(sent) == 6


def test_connections_are_used_again(serve_app: ServeApp) -> None:
    app = create_app({"dense": MockVariant(0.0, 0.0)})
    peers: set[object] = set()

    @app.middleware("http")
    async def note(asked: HTTPRequest, call_next: RequestResponseEndpoint) -> Response:
        peers.add(asked.client)
        return await call_next(asked)

    send(serve_app(app), CLOSED)
    assert len(peers) == 2


def test_variants_are_listed_once_all_answer(serve: Serve, serve_app: ServeApp) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)

    async def ask(url: str) -> list[str]:
        async with Client(url, timeout_s=5.0) as client:
            return await client.variants()

    assert asyncio.run(ask(url + "/")) == ["dense", "sparse"]
    with pytest.raises(UnreachableError, match="404 Not Found.*correct --url"):
        asyncio.run(ask(url + "/v1"))

    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"data": [{"id": "dense"}, {"id": "sparse", "status": status}]}

    url = serve_app(app)
    status = "loading, 9 s so far"
    with pytest.raises(UnreachableError, match="yet: sparse is loading, 9 s so far; start again"):
        asyncio.run(ask(url))
    status = "down"
    assert asyncio.run(ask(url)) == ["dense"]


def turns(*texts: str, output_tokens: int = 2) -> tuple[Conversation, ...]:
    """One conversation."""
    found = [Turn(text, output_tokens + number, 0.05) for number, text in enumerate(texts)]
    return (Conversation(4, tuple(found), is_chat=True),)


def test_each_turn_carries_the_answers_before_it_and_waits(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(0.01, 0.001))
    sent = send(url, Batch("dense", turns("hello", "and then?", "why?"), concurrency=1))
    asked = [prompt for _, prompt in app.state.requests]
    assert asked == ["hello", "hello\n 0 1\nand then?", "hello\n 0 1\nand then?\n 0 1 2\nwhy?"]
    assert [(r.prompt_index, r.turn, r.asked_tokens, r.output_tokens) for r in sent.requests] == [
        (4, 0, 2, 2),
        (4, 1, 3, 3),
        (4, 2, 4, 4),
    ]
    assert all(request.error is None for request in sent.requests)
    for before, after in zip(sent.requests, sent.requests[1:], strict=False):
        assert after.intended_send_s == pytest.approx(before.ended_s + 0.05)
        assert after.sent_s >= after.intended_send_s


def test_what_comes_after_a_failed_turn_fails_too(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(0.01, 0.001, fail_every=2))
    sent = send(url, Batch("dense", turns("a", "b", "c", "d"), concurrency=1))
    assert len(app.state.requests) == 2
    errors = [request.error for request in sent.requests]
    assert errors == [None, "http_503", "turn_before_failed", "turn_before_failed"]
    assert [request.asked_tokens for request in sent.requests] == [2, 3, 4, 5]
    assert all(request.timing is None for request in sent.requests[1:])


def test_an_answer_that_ends_at_once_is_one_if_answers_end_by_themselves(
    serve_app: ServeApp,
) -> None:
    app = FastAPI()
    end = 'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
    stream = end + usage + "data: [DONE]\n\n"
    app.add_api_route("/v1/completions", lambda: PlainTextResponse(stream), methods=["POST"])
    url = serve_app(app)
    found = {}
    for until_eos in (False, True):
        batch = Batch("dense", conversations(["a"], 9), concurrency=1, until_eos=until_eos)
        (found[until_eos],) = send(url, batch).requests
    assert found[False].error == "no_output"
    answered = found[True]
    assert answered.error is None
    assert answered.timing is not None
    assert (answered.timing.ttft_s, answered.output_tokens) == (None, 1)


def test_answers_may_end_by_themselves_only_if_told(serve_app: ServeApp) -> None:
    app, bodies = FastAPI(), []

    @app.post("/v1/completions")
    async def complete(request: HTTPRequest) -> Response:
        bodies.append(await request.json())
        usage = 'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
        return PlainTextResponse(TOKEN + usage + "data: [DONE]\n\n")

    url = serve_app(app)
    for until_eos in (False, True):
        batch = Batch("dense", conversations(["a"], 9), concurrency=1, until_eos=until_eos)
        (request,) = send(url, batch).requests
        assert (request.asked_tokens, request.output_tokens) == (9, 1)
    assert [body.get("ignore_eos") for body in bodies] == [True, None]
    assert [body["max_tokens"] for body in bodies] == [9, 9]
