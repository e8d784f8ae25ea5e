"""One request against the mock: its time stamps, or the class of its error."""

import asyncio

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from loadtest.client import Client, Outcome, UnreachableError
from loadtest.mock import MockVariant
from tests.loadtest.conftest import Serve, ServeApp

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)


def complete(url: str, variant: str, timeout_s: float = 30.0) -> Outcome:
    async def send() -> Outcome:
        async with Client(url, concurrency=1, timeout_s=timeout_s) as client:
            return await client.complete(variant, 3, "one two three", 4)

    return asyncio.run(send())


def test_a_complete_response(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(ttft_s=0.08, itl_s=0.02))
    outcome = complete(url, "dense")
    assert outcome.error is None
    assert (outcome.variant, outcome.prompt_index, outcome.prompt_tokens) == ("dense", 3, 3)
    timing = outcome.timing
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
    ],
)
def test_errors_are_classed(serve: Serve, variant: MockVariant, error: str) -> None:
    url, _ = serve(dense=variant)
    outcome = complete(url, "dense")
    assert outcome.error == error
    assert outcome.timing is None


TOKEN = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (TOKEN + 'data: {"error": {"message": "engine died"}}\n\n', "stream_error"),
        (TOKEN + "data: {\n\n", "malformed_chunk"),
        (TOKEN + "data: []\n\n", "malformed_chunk"),
        (TOKEN, "incomplete_stream"),
        (TOKEN + "data: [DONE]\n\n", "no_usage"),
    ],
)
def test_broken_streams_are_classed(serve_app: ServeApp, stream: str, error: str) -> None:
    app = FastAPI()
    app.add_api_route("/v1/completions", lambda: PlainTextResponse(stream), methods=["POST"])
    assert complete(serve_app(app), "dense").error == error


def test_unknown_variant_is_an_http_error(serve: Serve) -> None:
    url, _ = serve(dense=QUICK)
    assert complete(url, "absent").error == "http_404"


def test_a_whole_request_that_takes_too_long_is_a_timeout(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(ttft_s=0.0, itl_s=0.2))
    assert complete(url, "dense", timeout_s=0.3).error == "timeout"


def test_refused_connection_is_named() -> None:
    assert complete("http://127.0.0.1:1", "dense").error == "ConnectError"


def test_variants_are_listed(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)

    async def ask(url: str) -> list[str]:
        async with Client(url, concurrency=1, timeout_s=5.0) as client:
            return await client.variants()

    assert asyncio.run(ask(url + "/")) == ["dense", "sparse"]
    with pytest.raises(UnreachableError, match="404 Not Found.*correct --url"):
        asyncio.run(ask(url + "/v1"))
