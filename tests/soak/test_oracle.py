"""The oracle and the audit notice what is lost, doubled, mixed up or miscounted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak.clients import oracle
from tests.soak.clients.oracle import Seen, WrongError
from tests.soak.clients.request import COMPLETIONS, Ask, token
from tests.soak.clients.tally import Tally, audit_log, audit_metrics
from tests.soak.slope import slope

ASK = Ask("ab12", COMPLETIONS, "dense", 3, is_stream=True)
HEADERS = {"x-request-id": "ab12", "x-cast-variant": "dense", "content-type": "text/event-stream"}
DONE = b"data: [DONE]"


def events(*texts: str, reason: str | None = "length") -> list[bytes]:
    choices = [{"index": 0, "text": text, "finish_reason": None} for text in texts]
    choices[-1]["finish_reason"] = reason
    return [b"data: " + json.dumps({"choices": [each]}).encode() for each in choices]


def said(place: int, variant: str = "dense", key: str = "ab12") -> str:
    return token(variant, key, 0, place, 0)


def failed(**error: object) -> bytes:
    return b"data: " + json.dumps({"error": error}).encode()


def judge(parts: list[bytes], **headers: str) -> Seen:
    content = b"".join(part + b"\n\n" for part in parts)
    return oracle.judge(ASK, 200, HEADERS | headers, content)


RIGHT = [*events(said(0), said(1), said(2)), DONE]
SPARSE = [*events(*(said(place, "sparse") for place in range(3))), DONE]
DOWN = failed(message="m", type="t", param=None, code="variant_unavailable")


def test_what_is_right_is_right() -> None:
    found = judge(RIGHT)
    assert (found.code, found.variant, found.output_tokens) == (200, "dense", 3)
    assert judge([*RIGHT[:2], DOWN]).code == 503
    assert judge(SPARSE, **{"x-cast-variant": "sparse", "x-cast-fallback": "dense"}).is_fallback


WRONG = {
    "lost": [*events(said(0), said(2)), DONE],
    "doubled": [*events(said(0), said(0), said(1), said(2)), DONE],
    "swapped": [*events(said(1), said(0), said(2)), DONE],
    "another's": [*events(said(0), said(1, key="cd34"), said(2)), DONE],
    "another variant's": SPARSE,
    "short": [*events(said(0), said(1)), DONE],
    "without its end": RIGHT[:-1],
    "without a reason": [*events(said(0), said(1), said(2), reason=None), DONE],
    "after its end": [*RIGHT, RIGHT[0]],
    "cut": RIGHT[:2],
    "no JSON": [*RIGHT[:2], b"data: {"],
    "an error of another shape": [RIGHT[0], failed(message="EngineCore died")],
    "an error after a wrong token": [RIGHT[1], DOWN],
    "after the error": [RIGHT[0], DOWN, DONE],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_stream_is_wrong(name: str) -> None:
    with pytest.raises(WrongError):
        judge(WRONG[name])


@pytest.mark.parametrize("headers", [{"x-cast-variant": "sparse"}, {"x-request-id": "other"}])
def test_headers_must_be_true(headers: dict[str, str]) -> None:
    with pytest.raises(WrongError):
        judge(SPARSE if "x-cast-variant" in headers else RIGHT, **headers)


def test_an_error_must_be_in_the_table() -> None:
    def refused(status: int, code: str | None, **headers: str) -> Seen:
        error = {"message": "m", "type": "t", "param": None, "code": code}
        content = json.dumps({"error": error}).encode()
        return oracle.judge(ASK, status, {"x-request-id": "ab12", **headers}, content)

    after = {"retry-after": "3"}
    assert refused(429, "queue_full", **after).code == 429
    with pytest.raises(WrongError):
        refused(429, "queue_full")
    for status, code in ((429, "another"), (500, None), (400, None), (502, None)):
        with pytest.raises(WrongError):
            refused(status, code, **after)
    with pytest.raises(WrongError):
        oracle.judge(ASK, 503, {"x-request-id": "ab12"}, b"<html>")


METRICS = """\
cast_requests_total{code="200",route="/v1/completions",variant="dense"} 1.0
cast_requests_total{code="499",route="/v1/completions",variant="dense"} 1.0
cast_output_tokens_total{variant="dense"} 3.0
cast_e2e_request_latency_seconds_count{variant="dense"} 1.0
cast_requests_in_flight{variant="dense"} 0.0
cast_requests_queued{variant="dense"} 0.0
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ('"499",route="/v1/completions",variant="dense"} 1', '"499",route="x",variant="y"} 1'),
        ('"200",route="/v1/completions",variant="dense"} 1', '"200",route="x",variant="y"} 1'),
        ('tokens_total{variant="dense"} 3', 'tokens_total{variant="dense"} 2'),
        ('tokens_total{variant="dense"} 3', 'tokens_total{variant="dense"} 7'),
        ('in_flight{variant="dense"} 0', 'in_flight{variant="dense"} 1'),
        ('queued{variant="dense"} 0', 'queued{variant="dense"} -1'),
        ('seconds_count{variant="dense"} 1', 'seconds_count{variant="dense"} 3'),
    ],
)
def test_metrics_that_differ_are_a_finding(before: str, after: str) -> None:
    tally = Tally()
    tally.note(ASK, judge(RIGHT))
    tally.note_left(ASK, has_begun=True)
    assert before in METRICS
    assert bool(audit_metrics(tally, METRICS.replace(before, after, 1))) == bool(before)


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
