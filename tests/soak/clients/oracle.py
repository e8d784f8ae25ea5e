"""A request and what came back -> what it was: right, an error of the documented table, or wrong.

The table is docs/serving.md's own. An answer is right if it is whole and in order, token by token;
a stream that ended with an error must hold the right tokens up to there.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.soak.clients.request import CHAT, COMPARE, VARIANTS, Ask

SERVING = Path(__file__).parents[3] / "docs/serving.md"
FAULTS_OF_THEIRS = {429, 503, 504}  # what a request without a fault may get
PLAIN = {400, 503}  # answered by the HTTP server itself, in plain text


class WrongError(Exception):
    """An answer that must not be; the message says what is wrong with it."""


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request.

    Attributes:
        status: of HTTP.
        code: that it ended with: the status, or that of the stream's error event.
        variant: who answered; empty if nobody did.
        is_fallback: whether it answered for another.
        is_plain: whether the HTTP server answered, before any route.
        output_tokens: of an answer that is right; 0 for an error.
    """

    status: int
    code: int
    variant: str = ""
    is_fallback: bool = False
    is_plain: bool = False
    output_tokens: int = 0


@cache
def table() -> dict[int, set[str | None]]:
    """The codes of each status, of docs/serving.md; None: no code."""
    text = SERVING.read_text(encoding="utf-8").split("\n## Statuses\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", text, re.M)
    codes: dict[int, set[str | None]] = {}
    for status, cell in rows:
        found = codes.setdefault(int(status), set())
        found.update(re.findall(r"`(\w+)`", cell))
        if "`" not in cell or "or none" in cell:
            found.add(None)
    assert {400, 429, 503, 504} <= codes.keys()
    return {status: found for status, found in codes.items() if status != 500}


def judge(ask: Ask, status: int, headers: Mapping[str, str], content: bytes) -> Seen:
    """Judges a whole answer to a request without a fault.

    Raises:
        WrongError: if it is not what it must be.
    """
    if is_plain(status, headers):
        return Seen(status, status, is_plain=True)
    if headers.get("x-request-id") != ask.key:
        given = headers.get("x-request-id")
        raise WrongError(f"{status} with X-Request-Id {given}: {content[:200]!r}")
    if status != 200:
        judge_error(status, headers, content, FAULTS_OF_THEIRS)
        return Seen(status, status)
    if ask.route == COMPARE:
        return _judge_comparison(ask, content)
    variant = headers.get("x-cast-variant", "")
    is_fallback = headers.get("x-cast-fallback") == ask.variant
    if variant not in VARIANTS or (variant == ask.variant) == is_fallback:
        raise WrongError(f"answered by {variant!r}, fallback {headers.get('x-cast-fallback')!r}")
    if ask.is_stream:
        code, usage = _judge_stream(ask, variant, content)
    else:
        code, usage = 200, _judge_whole(ask, variant, content)
    tokens = ask.num_tokens * ask.num_choices
    if usage is not None:
        if ask.text is None and usage["completion_tokens"] != tokens:
            raise WrongError(f"usage is {usage}, but {tokens} tokens came")
        tokens = usage["completion_tokens"]
    return Seen(200, code, variant, is_fallback, output_tokens=tokens if code == 200 else 0)


def judge_part(ask: Ask, headers: Mapping[str, str], content: bytes) -> None:
    """Judges what a client had of a stream when it left.

    Raises:
        WrongError: if a token is not the one that belongs there.
    """
    whole = content[: content.rfind(b"\n\n") + 2]
    _read_stream(ask, headers.get("x-cast-variant", ""), whole)


def judge_error(
    status: int, headers: Mapping[str, str], content: bytes, statuses: set[int]
) -> None:
    """Judges an error.

    Raises:
        WrongError: if it is no OpenAI error object with a status and a code of the table.
    """
    try:
        error = json.loads(content)["error"]
        code, message = error["code"], error["message"]
        is_shaped = set(error) == {"message", "type", "param", "code"} and isinstance(message, str)
    except (ValueError, KeyError, TypeError):
        is_shaped, code = False, None
    if not is_shaped:
        raise WrongError(f"{status} with no error object: {content[:200]!r}")
    is_vllms = code == status == 400  # its own refusals, which are passed on
    if status not in statuses or not (is_vllms or code in table().get(status, ())):
        raise WrongError(f"{status} with code {code!r} is not in the table: {content[:300]!r}")
    if status in (429, 503) and not headers.get("retry-after", "").isdecimal():
        raise WrongError(f"{status} without Retry-After")


def is_plain(status: int, headers: Mapping[str, str]) -> bool:
    return status in PLAIN and headers.get("content-type", "").startswith("text/plain")


def _judge_comparison(ask: Ask, content: bytes) -> Seen:
    found = _parsed(content)
    for variant in VARIANTS:
        answer = found.get("variants", {}).get(variant, {})
        said = answer.get("text"), answer.get("output_tokens")
        if ask.text is None and said != (ask.expected(variant, 0), ask.num_tokens):
            raise WrongError(f"comparison: {variant} said {said}")
        if answer.get("finish_reason") not in ("length", "stop"):
            raise WrongError(f"comparison: {variant} ended with {answer.get('finish_reason')}")
    return Seen(200, 200)


def _judge_whole(ask: Ask, variant: str, content: bytes) -> dict[str, Any]:
    found = _parsed(content)
    texts = {choice["index"]: _text_of(ask, choice) for choice in found["choices"]}
    if any(choice["finish_reason"] not in ("length", "stop") for choice in found["choices"]):
        raise WrongError("a choice has no finish_reason")
    _check_texts(ask, variant, texts)
    return dict(found["usage"])


def _judge_stream(ask: Ask, variant: str, content: bytes) -> tuple[int, dict[str, Any] | None]:
    """The code that it ended with, and its usage."""
    texts, ended, usage, error = _read_stream(ask, variant, content)
    if error is not None:
        status = {"variant_unavailable": 503, "timeout": 504}.get(error.get("code") or "")
        if status is None or set(error) != {"message", "type", "param", "code"}:
            raise WrongError(f"the stream's error event is {error}")
        return status, None
    if not content.endswith(b"data: [DONE]\n\n"):
        raise WrongError(f"the stream ended without [DONE]: {content[-100:]!r}")
    if len(ended) != ask.num_choices:
        raise WrongError(f"{len(ended)} of {ask.num_choices} choices have a finish_reason")
    if (usage is not None) != ask.has_usage:
        raise WrongError(f"usage is {usage}, asked for: {ask.has_usage}")
    _check_texts(ask, variant, texts)
    return 200, usage


def _read_stream(
    ask: Ask, variant: str, content: bytes
) -> tuple[dict[int, str], set[int], dict[str, Any] | None, dict[str, Any] | None]:
    """Texts and ends by choice, usage and error of a stream; every token was the right one."""
    texts: dict[int, str] = {}
    ended: set[int] = set()
    usage = error = None
    events = content.split(b"\n\n")
    for place, event in enumerate(events[:-1]):
        data = event.removeprefix(b"data: ")
        is_last = place == len(events) - 2
        if data == b"[DONE]":
            if not is_last:
                raise WrongError("something came after [DONE]")
            break
        chunk = _parsed(data)
        error = chunk.get("error")
        if error is not None:
            if not is_last:
                raise WrongError("something came after the error event")
            break
        if "usage" in chunk and chunk["usage"]:
            usage = chunk["usage"]
        for choice in chunk["choices"]:
            index = choice["index"]
            if index in ended:
                raise WrongError(f"choice {index} goes on after its end")
            texts[index] = texts.get(index, "") + _text_of(ask, choice)
            if choice.get("finish_reason"):
                ended.add(index)
    for index, text in texts.items():
        if not ask.expected(variant, index).startswith(text):
            raise WrongError(f"choice {index} says {text[:300]!r}")
    return texts, ended, usage, error


def _check_texts(ask: Ask, variant: str, texts: Mapping[int, str]) -> None:
    expected = {index: ask.expected(variant, index) for index in range(ask.num_choices)}
    if texts != expected:
        raise WrongError(f"said {str(texts)[:300]}, not {str(expected)[:300]}")


def _text_of(ask: Ask, choice: Mapping[str, Any]) -> str:
    if ask.route == CHAT:
        return (choice.get("delta") or choice.get("message") or {}).get("content") or ""
    return str(choice["text"])


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        raise WrongError(f"no JSON: {content[:200]!r}") from None
    if not isinstance(found, dict):
        raise WrongError(f"no JSON object: {content[:200]!r}")
    return found
