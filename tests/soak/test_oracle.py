"""The oracle and the audit see what is lost, doubled, mixed up or miscounted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.soak.clients import oracle
from tests.soak.clients.oracle import Seen, WrongError
from tests.soak.clients.request import CHAT, COMPLETIONS, Ask, token
from tests.soak.clients.tally import Tally, audit_log, audit_metrics
from tests.soak.slope import slope

ASK = Ask("ab12", COMPLETIONS, "dense", 3, is_stream=True)
HEADERS = {"x-request-id": "ab12", "x-cast-variant": "dense", "content-type": "text/event-stream"}


def events(*texts: str, reason: str | None = "length", done: bool = True) -> list[bytes]:
    found = []
    for place, text in enumerate(texts):
        ends = reason if place == len(texts) - 1 else None
        found.append({"choices": [{"index": 0, "text": text, "finish_reason": ends}]})
    said = [b"data: " + json.dumps(each).encode() for each in found]
    return [*said, b"data: [DONE]"] if done else said


def said(place: int, variant: str = "dense", key: str = "ab12") -> str:
    return token(variant, key, 0, place, 0)


def judge(parts: list[bytes], **headers: str) -> Seen:
    content = b"".join(part + b"\n\n" for part in parts)
    return oracle.judge(ASK, 200, HEADERS | headers, content)


RIGHT = events(said(0), said(1), said(2))


def test_a_right_stream_is_right() -> None:
    found = judge(RIGHT)
    assert (found.code, found.variant, found.output_tokens) == (200, "dense", 3)


@pytest.mark.parametrize(
    "parts",
    {
        "lost": events(said(0), said(2)),
        "doubled": events(said(0), said(0), said(1), said(2)),
        "swapped": events(said(1), said(0), said(2)),
        "another's": events(said(0), said(1, key="cd34"), said(2)),
        "another variant's": events(said(0, "sparse"), said(1, "sparse"), said(2, "sparse")),
        "short": events(said(0), said(1)),
        "without its end": events(said(0), said(1), said(2), done=False),
        "without a reason": events(said(0), said(1), said(2), reason=None),
        "after its end": [*RIGHT, RIGHT[0]],
        "cut": RIGHT[:2],
        "no JSON": [*RIGHT[:2], b"data: {"],
        "an error of another shape": [RIGHT[0], b'data: {"error": {"message": "EngineCore died"}}'],
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_wrong_stream_is_wrong(parts: tuple[str, list[bytes]]) -> None:
    with pytest.raises(WrongError):
        judge(parts[1])


def test_an_error_event_after_right_tokens_is_what_it_says() -> None:
    error = {"message": "m", "type": "t", "param": None, "code": "variant_unavailable"}
    last = b"data: " + json.dumps({"error": error}).encode()
    assert judge([*RIGHT[:2], last]).code == 503
    with pytest.raises(WrongError, match="says"):
        judge([RIGHT[1], last])
    with pytest.raises(WrongError, match="after the error"):
        judge([RIGHT[0], last, b"data: [DONE]"])


def test_who_answered_must_be_told() -> None:
    sparse = events(*(said(place, "sparse") for place in range(3)))
    with pytest.raises(WrongError, match="answered by"):
        judge(sparse, **{"x-cast-variant": "sparse"})
    assert judge(sparse, **{"x-cast-variant": "sparse", "x-cast-fallback": "dense"}).is_fallback
    with pytest.raises(WrongError, match="X-Request-Id"):
        judge(RIGHT, **{"x-request-id": "other"})


def test_an_error_must_be_in_the_table() -> None:
    def refused(status: int, code: str | None, **headers: str) -> Seen:
        error = {"message": "m", "type": "t", "param": None, "code": code}
        content = json.dumps({"error": error}).encode()
        return oracle.judge(ASK, status, {"x-request-id": "ab12", **headers}, content)

    after = {"retry-after": "3"}
    assert refused(429, "queue_full", **after).code == 429
    for status, code, headers in (
        (429, "queue_full", {}),
        (429, "another", after),
        (500, None, after),
        (400, None, after),
        (502, None, after),
    ):
        with pytest.raises(WrongError):
            refused(status, code, **headers)
    with pytest.raises(WrongError):
        oracle.judge(ASK, 503, {"x-request-id": "ab12"}, b"<html>")


def test_whole_answers_and_chats() -> None:
    ask = Ask("ab12", CHAT, "dense", 2, num_choices=2)
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "finish_reason": "length",
            "message": {"content": ask.expected("dense", index)},
        }
        for index in (1, 0)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    content = json.dumps({"choices": choices, "usage": usage}).encode()
    assert oracle.judge(ask, 200, HEADERS, content).output_tokens == 4
    swapped = [{**choice, "index": 1 - choice["index"]} for choice in choices]
    content = json.dumps({"choices": swapped, "usage": usage}).encode()
    with pytest.raises(WrongError):
        oracle.judge(ask, 200, HEADERS, content)


METRICS = """\
cast_requests_total{code="200",route="/v1/completions",variant="dense"} 1.0
cast_requests_total{code="499",route="/v1/completions",variant="dense"} 1.0
cast_output_tokens_total{variant="dense"} 3.0
cast_e2e_request_latency_seconds_count{variant="dense"} 1.0
cast_requests_in_flight{variant="dense"} 0.0
cast_requests_queued{variant="dense"} 0.0
"""


def tally() -> Tally:
    found = Tally()
    found.note(ASK, judge(RIGHT))
    found.note_left(ASK, has_begun=True)
    return found


def test_metrics_that_add_up_are_no_finding() -> None:
    assert audit_metrics(tally(), METRICS) == []


def test_an_answer_of_the_fallback_has_no_latency() -> None:
    found = tally()
    fallback = Seen(200, 200, "sparse", is_fallback=True, output_tokens=3)
    found.note(replace(ASK, key="0000000002ab12"), fallback)
    counted = 'cast_requests_total{code="200",route="/v1/completions",variant="dense"}'
    metrics = METRICS.replace(f"{counted} 1.0", f"{counted} 2.0")
    metrics += 'cast_output_tokens_total{variant="sparse"} 3.0\ncast_fallbacks_total 1.0\n'
    assert audit_metrics(found, metrics) == []


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        ('"499",route="/v1/completions",variant="dense"} 1', '"499",route="x",variant="y"} 1', "1"),
        (
            '"499",route="/v1/completions",variant="dense"} 1',
            '"200",route="/v1/chat/x",v="y"} 1',
            "",
        ),
        ('"200",route="/v1/completions",variant="dense"} 1', '"200",route="x",variant="y"} 1', "0"),
        ('tokens_total{variant="dense"} 3', 'tokens_total{variant="dense"} 2', "tokens"),
        ('tokens_total{variant="dense"} 3', 'tokens_total{variant="dense"} 7', "tokens"),
        ('in_flight{variant="dense"} 0', 'in_flight{variant="dense"} 1', "in_flight"),
        ('queued{variant="dense"} 0', 'queued{variant="dense"} -1', "queued"),
        ('seconds_count{variant="dense"} 1', 'seconds_count{variant="dense"} 3', "latencies"),
    ],
)
def test_metrics_that_differ_are_a_finding(before: str, after: str, finding: str) -> None:
    assert before in METRICS
    found = audit_metrics(tally(), METRICS.replace(before, after))
    assert any(finding in text for text in found)


KEY = "0000000001ab12"
LINE = '{"method": "POST", "path": "/v1/completions", "status": %d, "request_id": "KEY"}\n'


@pytest.mark.parametrize(
    ("text", "num_findings"),
    [
        *((LINE % 200, 0), (LINE % 503, 1), (LINE % 200 * 2, 2), ("", 2)),
        (LINE % 200 + "Future exception was never retrieved\n", 1),
        (LINE % 200 + "x: watching it failed\nTraceback (most recent call last):\n", 1),
        (LINE % 200 + "Task was destroyed but it is pending!\nclosed in mid answer\n", 1),
    ],
)
def test_the_log_has_one_line_for_each_request(
    tmp_path: Path, text: str, num_findings: int
) -> None:
    (tmp_path / "log").write_text(text.replace("KEY", KEY))
    found = Tally(statuses={KEY: 200})
    metrics = f'cast_requests_total{{code="200",route="{COMPLETIONS}",variant="dense"}} 1.0\n'
    assert len(audit_log(found, tmp_path / "log", metrics)) == num_findings


@pytest.mark.parametrize(
    ("value", "grows"), [(lambda n: 100 + n % 7, False), (lambda n: 100 + n / 10 + n % 7, True)]
)
def test_what_grows_is_told_from_what_does_not(value: Callable[[int], float], grows: bool) -> None:
    numbers = list(range(0, 1000, 5))
    found = slope(numbers, [value(number) for number in numbers])
    assert found is not None
    assert found.grows(allowed=10) == grows
    assert found.value == pytest.approx(100 * grows, abs=3 * found.error + 1)
    assert slope(numbers[:10], numbers[:10]) is None
