"""What a message is made of: text, unless the operator admits media, and never embeddings."""

from typing import Any

import pytest

from cast_serve.gateway.api import limits, schemas
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.settings import GatewaySettings
from tests.cast_serve.gateway.stack import running

ADDRESSES = ("http://127.0.0.1:1/x", "http://169.254.169.254/", "file:///etc/passwd", "data:,x")
KINDS = ("image_url", "video_url", "audio_url")
MEDIA = [
    *(
        {"type": kind, kind: {"url": url}}
        for url in ADDRESSES
        for kind in ("image_url", "video_url")
    ),
    *({"type": "audio_url", "audio_url": {"url": url}} for url in ADDRESSES),
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
]
NEVER = [
    {"type": "image_embeds", "image_embeds": "AA=="},
    {"type": "audio_embeds", "audio_embeds": "AA=="},
    {"type": "prompt_embeds", "data": "AA=="},
    {"type": "file", "file": {"file_data": "AA=="}},
    {"image_url": {"url": "http://127.0.0.1:1/x"}},  # vLLM takes these without a type
    {"type": None, "text": "a"},
    {"type": ["text"], "text": "a"},
    {"type": "text", "text": "a", "image_url": {"url": "http://127.0.0.1:1/x"}},
    {"type": "text", "text": None},
    {"type": "text"},
    {},
]


def check(part: dict[str, Any], route: str = "/v1/chat/completions", **settings: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    body = schemas.parse(route, {"model": "dense", "messages": messages}, 1)
    limits.check(body, GatewaySettings(**settings), None, None)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("part", [*MEDIA, *NEVER], ids=str)
def test_text_alone_is_passed_on(part: dict[str, Any], route: str) -> None:
    with pytest.raises(APIError) as raised:
        check(part, route)
    assert raised.value.status == 400
    assert "messages.0.content.1" in str(raised.value)


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": ""}, {"type": "refusal", "refusal": "no"}]
)
def test_parts_of_text_pass(part: dict[str, Any]) -> None:
    check(part)
    check(part, media_parts=True)


@pytest.mark.parametrize("part", MEDIA, ids=str)
def test_media_pass_where_the_operator_admits_them(part: dict[str, Any]) -> None:
    check(part, media_parts=True)


@pytest.mark.parametrize("part", NEVER, ids=str)
def test_embeddings_never_pass(part: dict[str, Any]) -> None:
    with pytest.raises(APIError, match="messages.0.content.1"):
        check(part, media_parts=True)


def test_no_address_reaches_a_worker() -> None:
    with running() as stack:
        for part in MEDIA:
            messages = [{"role": "user", "content": [part]}]
            asked = {"model": "dense", "messages": messages}
            found = stack.client.post("/v1/chat/completions", json=asked)
            assert (found.status_code, found.json()["error"]["code"]) == (
                400,
                "unsupported_content",
            )
            assert "CAST_MEDIA_PARTS" in found.json()["error"]["message"]
        assert not stack.workers["dense"].state.bodies
