"""Bodies of requests, whole and mangled: passed on as JSON, or refused by 400."""

import json
from typing import Any

import httpx
from hypothesis import strategies as some

from cast_serve.gateway.api import limits, schemas
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.settings import GatewaySettings
from tests.cast_serve.gateway.test_hostile import bodies
from tests.fuzz.target import Target

SETTINGS = GatewaySettings()
MAX_MODEL_LEN, VOCABULARY_SIZE = 64, 100
PARTS = [
    *(b"1e999", b"-1e999", b"NaN", b"1E400", b"1" * 400, b"-0", b"[]", b"{}", b"null", b'""'),
    *(b"\\ud800", b"\\u0000", b"\xff", b"\xef\xbb\xbf", b'"a":', b"," * 3, b"[" * 600, b"]" * 600),
    *(b'{"a":' * 300, b"}" * 300, b"[" * 950 + b"]" * 950),
]
# Where a value of any kind is passed on as it is.
OPEN = [
    '{"model":"dense","messages":[{"role":"user","content":"x","y":%s}]}',
    '{"model":"dense","messages":[{"role":"user","content":[{"type":"text","y":%s}]}]}',
    '{"model":"dense","messages":[{"role":"user","content":"x"}],"tools":[{"y":%s}]}',
    '{"model":"dense","messages":[{"role":"user","content":"x"}],"response_format":'
    '{"type":"json_schema","json_schema":{"name":"x","schema":{"y":%s}}}}',
]


@some.composite
def raw_bodies(draw: some.DrawFn) -> tuple[str, bytes]:
    """A route and bytes: a body, perhaps with pieces put in, taken out or doubled."""
    route, body = draw(bodies())
    content = json.dumps(body).encode()
    if draw(some.integers(0, 3)) == 0:
        route = "/v1/chat/completions"
        content = draw(some.sampled_from(OPEN)).encode()
        content = content.replace(b"%s", draw(some.sampled_from(PARTS)))
    for _ in range(draw(some.integers(0, 2))):
        start = draw(some.integers(0, len(content)))
        end = draw(some.integers(start, min(len(content), start + 8)))
        content = content[:start] + draw(some.sampled_from([b"", *PARTS])) + content[end:]
    return route, content


def check_body(drawn: tuple[str, bytes]) -> None:
    """As bodies.py, limits.py and forward.py treat it."""
    route, content = drawn
    try:
        body = schemas.read_json(content)
        checked = schemas.parse(route, body, SETTINGS.max_prompts)
        ignored = schemas.take_without_effect(body)
        limits.check(checked, SETTINGS, MAX_MODEL_LEN, VOCABULARY_SIZE)
    except APIError as error:
        _check_refusal(error)
        return
    ", ".join(ignored).encode("latin-1")  # a header
    _deeper(40, lambda: httpx.Request("POST", "http://x", json=body))


def _check_refusal(error: APIError) -> None:
    assert error.status == 400
    json.dumps(error.body).encode()


def _deeper(depth: int, act: Any) -> None:
    """Acts so many calls down, as the event loop does."""
    if depth:
        _deeper(depth - 1, act)
    else:
        act()


TARGETS = (Target("bodies", raw_bodies(), check_body),)
