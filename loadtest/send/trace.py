"""A trace file -> when requests arrive and how many tokens each has.

The format is told by the content:

    seconds    a number of seconds a line
    own        JSON lines: time_s, prompt_tokens, output_tokens
    Mooncake   JSON lines: timestamp (ms), input_length, output_length, hash_ids (blocks of 512
               tokens); https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release
    Azure      CSV: TIMESTAMP (UTC), ContextTokens, GeneratedTokens; the LLM traces of 2023 and
               2024; https://github.com/Azure/AzurePublicDataset
    BurstGPT   CSV: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type,
               and in newer files Session ID, Elapsed time; https://github.com/HPMLL/BurstGPT

Other fields are an error: other traces use the same names for other units and block sizes. These
traces are published in ascending order, so a time before the line above is an error too.
"""

import json
import logging
import math
import reprlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError

BLOCK_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
        due_s: seconds from the trace's first request, to the microsecond.
        prompt_tokens: None if the trace has only times.
        output_tokens: likewise.
        blocks: ids of the prompt's blocks of BLOCK_TOKENS tokens, from its beginning; the last may
            be shorter. Two prompts begin alike as far as their first ids are equal.
    """

    due_s: float
    prompt_tokens: int | None
    output_tokens: int | None
    blocks: tuple[int, ...] = ()


# Fields of each format: time, prompt tokens, output tokens, others.
_SECONDS: tuple[str, ...] = ("",)
_OWN = ("time_s", "prompt_tokens", "output_tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens", "Model", "Total tokens", "Log Type")
_FORMS = (_SECONDS, _OWN, _MOONCAKE, _AZURE, _BURSTGPT)
_OPTIONAL = {"Session ID", "Elapsed time"}
_TIMES = {
    _MOONCAKE: "a number of milliseconds, 0 or more",
    _AZURE: "a time such as 2023-11-16 18:15:46.6805900",
}


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """Reads a trace in one of the formats above.

    BurstGPT's requests with 0 response tokens failed in the original system; they are left out, and
    a warning counts them.

    Raises:
        UsageError: if the file cannot be read, a line does not fit, or there are no requests.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"trace {path} cannot be read: {error}") from error
    if not lines:
        raise UsageError(f"trace {path} is empty; give one number of seconds per line")
    is_json = lines[0].startswith("{")
    header = lines.pop(0).split(",") if "," in lines[0] and not is_json else []
    arrivals: list[Arrival] = []
    first_s, last_s, num_failed = 0.0, 0.0, 0
    for number, line in enumerate(lines, start=2 if header else 1):
        try:
            fields = _fields(line, header, is_json)
            form = _form(fields)
            last_s = _time_s(fields[form[0]], form, last_s)
            if form is _BURSTGPT and fields[form[2]] == "0":
                num_failed += 1
                continue
            first_s = first_s if arrivals else last_s
            arrivals.append(_arrival(fields, form, round(last_s - first_s, 6)))
        except ValueError as error:
            raise UsageError(f"trace {path}, line {number}: {error}") from None
    if num_failed:
        num = num_failed + len(arrivals)
        why = "0 response tokens: they failed in the original system"
        logger.warning("trace %s: left out %d of %d requests (%s)", path, num_failed, num, why)
    if not arrivals:
        raise UsageError(f"trace {path} has no requests; give a trace with at least one")
    return tuple(arrivals)


def _fields(line: str, header: list[str], is_json: bool) -> dict[str, Any]:
    """A line's values by name; text, unless it is JSON."""
    if not is_json:
        values = line.split(",") if header else [line]
        if len(values) != len(header or values):
            raise ValueError(f"{line!r} has {len(values)} values, but the header {len(header)}")
        return dict(zip(header or [""], values, strict=True))
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{line!r} is not a JSON object")
    return fields


def _form(fields: dict[str, Any]) -> tuple[str, ...]:
    for form in _FORMS:
        if fields.keys() - _OPTIONAL == set(form):
            return form
    known = "; or ".join(", ".join(form) for form in _FORMS[1:])
    raise ValueError(f"fields {', '.join(fields)} are not those of a known trace; give {known}")


def _time_s(value: Any, form: tuple[str, ...], last_s: float) -> float:
    """Seconds from a time 0 that the file's times share."""
    try:
        if form is _AZURE:
            date = datetime.fromisoformat(value)
            time_s = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        else:
            time_s = float(value) / (1e3 if form is _MOONCAKE else 1)
    except (TypeError, ValueError, OverflowError):
        time_s = math.nan
    if isinstance(value, bool) or not last_s <= time_s < math.inf:
        expected = _TIMES.get(form, "a number of seconds, 0 or more")
        what = f"{form[0]} {value!r}".strip()
        raise ValueError(f"{what} is not {expected} and not before the line above")
    return time_s


def _arrival(fields: dict[str, Any], form: tuple[str, ...], due_s: float) -> Arrival:
    if form is _SECONDS:
        return Arrival(due_s, None, None)
    prompt, output = (_tokens(name, fields[name]) for name in form[1:3])
    blocks, most = fields.get("hash_ids", []), math.ceil(prompt / BLOCK_TOKENS)
    is_list = isinstance(blocks, list) and all(type(block) is int for block in blocks)
    if not is_list or len(blocks) > most:
        raise ValueError(
            f"hash_ids {reprlib.repr(blocks)} is not a list of whole numbers, at most {most} for "
            f"blocks of {BLOCK_TOKENS} tokens"
        )
    return Arrival(due_s, prompt, output, tuple(blocks))


def _tokens(name: str, value: Any) -> int:
    count = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} {value!r} is not a whole number, 1 or more")
    return count
