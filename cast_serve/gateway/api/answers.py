"""What a worker sent -> a checked answer or chunk, its text, or the refusal that a client gets."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from cast_serve.gateway.api.errors import APIError


def parsed(data: str | bytes) -> dict[str, Any]:
    """An answer or chunk.

    Raises:
        ValueError: if it is not a JSON object, or its choices or usage have another shape.
    """
    try:
        found = from_json(data)  # faster than json.loads, and every token waits for it
    except ValueError:
        try:
            found = json.loads(data)  # which takes half a surrogate pair
        except RecursionError:
            raise ValueError("its lists and objects are nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
    choices = found.get("choices") or []
    if not (isinstance(choices, list) and all(map(_is_choice, choices))):
        raise ValueError("its choices are not a list of objects with texts")
    if (usage := found.get("usage")) and not _counts_tokens(usage):
        raise ValueError("its usage counts no tokens")
    return found


def _is_choice(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return False
    part = choice.get("delta") or choice.get("message") or choice
    return isinstance(part, dict) and isinstance(part.get("text") or part.get("content") or "", str)


def _counts_tokens(usage: Any) -> bool:
    if not isinstance(usage, dict):
        return False
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return all(type(count) is int and 0 <= count < 2**63 for count in counts)


def status_of(chunk: Mapping[str, Any]) -> int:
    """The status that a worker's error event is about; 500 where it does not say."""
    error = chunk["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def message_of(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the worker refused this: {content[:300].decode(errors='replace')}"


def check_shape(status: int, content: bytes) -> None:
    """Turns a worker's refusal into an OpenAI error object, if it is not one already."""
    try:
        is_shaped = isinstance(json.loads(content)["error"]["message"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_shaped = False
    if not is_shaped:
        status = 400 if status == 422 else status  # FastAPI's number for what OpenAI answers 400
        raise APIError(status, message_of(content), "invalid_request_error")


def text_of(answer: Mapping[str, Any]) -> str:
    """The text of the first choice of an answer or chunk, completion or chat."""
    for choice in answer.get("choices") or ():
        if choice.get("index", 0) == 0:
            part = choice.get("delta") or choice.get("message") or choice
            return part.get("text") or part.get("content") or ""
    return ""


def is_aborted(answer: Mapping[str, Any]) -> bool:
    """Whether the engine aborted the request, as vLLM's does when it is told to end."""
    return any(choice.get("finish_reason") == "abort" for choice in answer.get("choices") or ())
