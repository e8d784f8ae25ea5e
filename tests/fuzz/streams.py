"""Streams of a worker's: what sse.py cuts, and what the gateway reads in each event."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import strategies as some

from cast_serve import sse
from cast_serve.gateway.api import answers
from cast_serve.gateway.api.errors import APIError
from cast_serve.latency import Stopwatch
from tests.fuzz.target import Target

LEAF = (
    some.none()
    | some.booleans()
    | some.integers(-(2**70), 2**70)
    | some.floats()
    | some.text(max_size=8)
)
KEYS = some.sampled_from(
    [
        *("choices", "usage", "error", "index", "delta", "message", "text", "content"),
        *("finish_reason", "prompt_tokens", "completion_tokens", "code", "tool_calls"),
    ]
)
ANY = some.recursive(
    LEAF,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
USAGE = some.fixed_dictionaries({"prompt_tokens": LEAF, "completion_tokens": LEAF}) | ANY
CHOICE = some.fixed_dictionaries(
    {}, optional={"index": LEAF, "delta": ANY, "message": ANY, "text": ANY, "finish_reason": LEAF}
)
CHUNK = some.fixed_dictionaries(
    {}, optional={"choices": some.lists(CHOICE, max_size=3) | ANY, "usage": USAGE, "error": ANY}
)
EVENT = (
    (CHUNK | ANY).map(lambda found: json.dumps(found).encode())
    | some.binary(max_size=60)
    | some.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, sse.DONE, b"\xff"])
)


@some.composite
def pieces(draw: some.DrawFn) -> tuple[bytes, list[int]]:
    """Bytes, and where they are cut."""
    lines = some.sampled_from([b"data: ", b"data:", b"\n", b"\r\n", b": x\n", b"event: a\n", b"\0"])
    parts = draw(some.lists(lines | EVENT | EVENT.map(sse.event), max_size=8))
    content = b"".join(parts)
    return content, sorted(draw(some.lists(some.integers(0, len(content)), max_size=6)))


def check_reader(drawn: tuple[bytes, list[int]]) -> None:
    """However the bytes are cut, the events are the same."""
    content, cuts = drawn
    reader = sse.Reader()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        found += reader.feed(content[start:end])
    lines = content.split(b"\n")[:-1]
    assert found == [line[5:].strip() for line in lines if line.startswith(b"data:")]


def check_answer(data: bytes) -> None:
    """What a worker says is read as forward.py reads it, or refused by ValueError."""
    assert isinstance(answers.message_of(data), str)
    with suppress(APIError):
        answers.check_shape(400, data)
    try:
        chunk = answers.parsed(data)
    except ValueError:
        return
    if chunk.get("error"):
        assert 400 <= answers.status_of(chunk) < 600
    stopwatch = Stopwatch()
    stopwatch.observe(chunk)
    assert isinstance(answers.text_of(chunk), str)
    usage: dict[str, Any] = chunk.get("usage") or {}
    timing = stopwatch.finish(usage.get("completion_tokens"))
    assert (timing.output_tokens or 0) + usage.get("prompt_tokens", 0) >= 0


TARGETS = (Target("sse", pieces(), check_reader), Target("answers", EVENT, check_answer))
