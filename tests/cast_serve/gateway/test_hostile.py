"""Everything in tests/hostile.py against the gateway; the same against vLLM is in tests/story."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cast_serve.gateway.api.schemas import BODIES
from cast_serve.gateway.exchange import GENERATING
from tests import hostile
from tests.cast_serve.gateway.stack import Stack, running

JSON = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(max_size=20)
    | some.sampled_from(["dense", "user", "json_schema", "#", "#/a", "#/a/b", *hostile.WRONG]),
    lambda inner: (
        some.lists(inner, max_size=5)
        | some.dictionaries(
            some.sampled_from(["$ref", "a", "b", "name", "schema", "type", "role", "content"])
            | some.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@some.composite
def bodies(draw: some.DrawFn) -> tuple[str, Any]:
    """A route and a body: mostly what it wants, with fields of any kind among it."""
    route = draw(some.sampled_from(sorted(BODIES)))
    if draw(some.integers(0, 9)) == 0:
        return route, draw(JSON)
    body = {
        "model": "dense",
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
        "tokens": [1],
    }
    fields = sorted(BODIES[route].model_fields)
    body = {name: value for name, value in body.items() if name in fields}
    more = some.dictionaries(some.sampled_from([*fields, "x"]), JSON, max_size=4)
    form = some.fixed_dictionaries(
        {
            "type": some.just("json_schema"),
            "json_schema": some.fixed_dictionaries({"name": some.just("x"), "schema": JSON}),
        }
    )
    if "response_format" in fields and draw(some.booleans()):
        body["response_format"] = draw(form)
    return route, body | draw(more)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running() as found:
        yield found


@settings(max_examples=400, deadline=2000, derandomize=True)
@given(asked=bodies())
def test_whatever_is_sent_is_answered_or_refused(stack: Stack, asked: tuple[str, Any]) -> None:
    route, body = asked
    found = stack.client.post(route, json=body)
    assert found.status_code == 200 or 400 <= found.status_code < 500, found.text
    if found.status_code >= 400:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_no_hostile_request_brings_a_5xx_or_reaches_a_worker_unchecked() -> None:
    cases = list(hostile.requests(("dense", "sparse")))
    assert len(cases) >= 200
    wrong = []
    with running(max_body_bytes=4 << 20) as stack:
        for name, method, path, headers, content in cases:
            try:
                found = stack.client.request(method, path, headers=headers, content=content)
            except httpx.HTTPError as error:  # closed before all of a body too large was sent
                if len(content) <= 1 << 20 and "header" not in name:
                    wrong.append((name, 0, repr(error)))
                continue
            is_error_object = found.status_code < 400 or _is_openai_error(found)
            if found.status_code >= 500 or not is_error_object:
                wrong.append((name, found.status_code, found.text[:100]))
        assert not wrong
        assert stack.complete(model="dense").status_code == 200
        for worker in stack.workers.values():
            for body in worker.state.bodies:
                assert "chat_template" not in body
                assert "prompt_embeds" not in body
                assert body.get("n") in (None, *range(9))


def _is_openai_error(found: httpx.Response) -> bool:
    if found.request.method == "HEAD":
        return True
    if "application/json" not in found.headers.get("content-type", ""):
        return found.request.url.path not in GENERATING or "Invalid HTTP" in found.text
    return set(found.json().get("error", {})) >= {"message"}
