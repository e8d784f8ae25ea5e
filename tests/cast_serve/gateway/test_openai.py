"""The OpenAI client against the gateway, and what it may ask for besides."""

import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.cast_serve.gateway.stack import Stack, running

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
IGNORED = "X-Cast-Ignored-Fields"


class City(BaseModel):
    name: str
    inhabitants: int


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running() as found:
        yield found


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    url = f"{stack.client.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def test_chat_completions_and_streams(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="dense", messages=MESSAGES)
    assert chat.choices[0].message.content == "one two three"
    chunks = client.chat.completions.create(model="sparse", messages=MESSAGES, stream=True)
    texts = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert texts == ["one", " two", " three"]
    assert client.completions.create(model="dense", prompt="a").choices[0].text == "one two three"
    events = client.completions.create(model="dense", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in events) == "one two three"
    assert [model.id for model in client.models.list()] == ["dense", "sparse"]


def test_parse_sends_the_schema_and_reads_the_answer(stack: Stack, client: openai.OpenAI) -> None:
    stack.workers["sparse"].state.json = '{"name": "Bern", "inhabitants": 134794}'
    found = client.chat.completions.parse(model="sparse", messages=MESSAGES, response_format=City)
    assert found.choices[0].message.parsed == City(name="Bern", inhabitants=134794)
    sent = stack.workers["sparse"].state.bodies[-1]["response_format"]["json_schema"]
    assert sent["name"] == "City"
    assert set(sent["schema"]["properties"]) == {"name", "inhabitants"}


@pytest.mark.parametrize("is_stream", [False, True])
def test_fields_without_effect_are_accepted_and_named(
    stack: Stack, client: openai.OpenAI, is_stream: bool
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="dense",
        messages=MESSAGES,
        stream=is_stream,
        metadata={"a": "b"},
        store=True,
        service_tier="flex",
        verbosity="low",
        safety_identifier="me",
        prompt_cache_key="k",
        prediction={"type": "content", "content": "one"},
        modalities=["text"],
        reasoning_effort="low",
        parallel_tool_calls=False,
        user="me",
    )
    assert raw.headers[IGNORED] == (
        "metadata, modalities, prediction, prompt_cache_key, safety_identifier, service_tier, "
        "store, verbosity"
    )
    sent = stack.workers["dense"].state.bodies[-1]
    passed_on = {"reasoning_effort": "low", "parallel_tool_calls": False, "user": "me"}
    assert passed_on.items() <= sent.items()
    assert not set(sent) & set(raw.headers[IGNORED].split(", "))
    raw = client.chat.completions.with_raw_response.create(model="dense", messages=MESSAGES)
    assert IGNORED not in raw.headers


def test_each_field_without_effect_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with running() as stack, caplog.at_level(logging.WARNING, "cast_serve.gateway.bodies"):
        for more in ({"store": True}, {"store": True}, {"metadata": {}, "store": False}):
            assert stack.complete(model="dense", **more).status_code == 200
    told = [record.getMessage() for record in caplog.records if "no effect" in record.message]
    assert [text.split()[2] for text in told] == ["store", "metadata"]


def test_they_are_refused_if_a_setting_says_so() -> None:
    with running(strict_fields=True) as stack:
        found = stack.complete(model="dense", store=True)
        assert (found.status_code, found.json()["error"]["code"]) == (400, "unknown_field")
        assert found.json()["error"]["param"] == "store"
        assert not stack.workers["dense"].state.bodies
        assert stack.complete(model="dense", store=None).status_code == 200


def test_routes_that_are_not_served_say_what_is(client: openai.OpenAI) -> None:
    for ask, message in (
        (lambda: client.embeddings.create(model="dense", input="a"), "the models here write text"),
        (lambda: client.responses.create(model="dense", input="a"), "messages to POST /v1/chat"),
        (lambda: client.moderations.create(input="a"), "POST /v1/chat/completions"),
        (lambda: client.images.generate(prompt="a"), "the models here write text"),
        (lambda: client.audio.speech.create(model="a", voice="b", input="c"), "write text"),
        (lambda: client.files.list(), "the gateway stores nothing"),
        (lambda: client.batches.list(), "the gateway stores nothing"),
    ):
        with pytest.raises(openai.NotFoundError, match=message) as caught:
            ask()
        assert caught.value.code == "not_served"


def test_docs_is_a_page_that_loads_nothing(stack: Stack) -> None:
    page = stack.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "<script" not in page.text
    assert "http" not in page.text.replace("/openapi.json", "")
    schema = stack.client.get("/openapi.json").json()
    assert "/docs" not in schema["paths"]
    for path in schema["paths"]:
        assert f" {path}</code>" in page.text
    assert "<code>structured_outputs</code>" in page.text
