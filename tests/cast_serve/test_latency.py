"""Hand-made time stamps -> the four latencies, and what counts as a token event."""

from collections.abc import Iterator
from typing import Any

import pytest

from cast_serve.latency import RequestTiming, Stopwatch, carries_output


def clock_of(*stamps_s: float) -> Any:
    stamps: Iterator[float] = iter(stamps_s)
    return lambda: next(stamps)


def completion(text: str = "", finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def test_latencies_by_hand() -> None:
    timing = RequestTiming(10.0, (10.5, 10.75, 11.25), 11.5, output_tokens=5)
    assert timing.ttft_s == 0.5
    assert timing.itl_s == [0.25, 0.5]
    assert timing.e2e_s == 1.5
    assert timing.tpot_s == 0.25  # (1.5 - 0.5) / 4


@pytest.mark.parametrize("output_tokens", [None, 0, 1])
def test_no_tpot_below_two_tokens(output_tokens: int | None) -> None:
    timing = RequestTiming(0.0, (1.0,), 1.0, output_tokens)
    assert timing.tpot_s is None
    assert timing.itl_s == []


def test_not_streamed_has_only_e2e() -> None:
    timing = Stopwatch(clock=clock_of(1.0, 4.0)).finish(output_tokens=8)
    assert timing.e2e_s == 3.0
    assert timing.ttft_s is None
    assert timing.tpot_s is None


def test_stopwatch_starts_at_the_intended_send() -> None:
    watch = Stopwatch(intended_send_s=1.0, clock=clock_of(3.0, 4.0, 9.0))
    assert watch.observe(completion("a"))
    assert watch.observe(completion("b", "length"))
    assert not watch.observe({"choices": [], "usage": {"completion_tokens": 2}})
    timing = watch.finish()
    assert timing == RequestTiming(1.0, (3.0, 4.0), 4.0, output_tokens=2)  # usage is not waited for


def test_last_token_without_text_ends_at_its_finish_reason() -> None:
    watch = Stopwatch(clock=clock_of(0.0, 1.0, 2.0))
    watch.observe(completion("a"))
    assert not watch.observe(completion("", "stop"))
    assert watch.finish(output_tokens=2).tpot_s == 1.0


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "a"}, True),
        ({"text": ""}, False),
        ({"text": "", "token_ids": [7]}, True),
        ({"text": "", "finish_reason": "length"}, False),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "a"}}, True),
        ({"delta": {"reasoning": "a"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {}}, False),
    ],
)
def test_what_counts_as_a_token_event(choice: dict[str, Any], expected: bool) -> None:
    assert carries_output({"choices": [choice]}) is expected


def test_usage_chunk_is_no_token_event() -> None:
    assert not carries_output({"choices": [], "usage": {"completion_tokens": 3}})


def test_backward_stamps_are_refused() -> None:
    with pytest.raises(ValueError, match="run backwards"):
        RequestTiming(2.0, (1.0,), 3.0, output_tokens=1)


def test_negative_output_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="output_tokens is -1"):
        RequestTiming(0.0, (1.0,), 1.0, output_tokens=-1)
