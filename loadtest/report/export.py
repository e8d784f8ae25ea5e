"""A recorded run -> the files of another tool, so that what reads its results reads ours.

aiperf    NVIDIA AIPerf, successor of GenAI-Perf; in a directory per variant, aiperf-VARIANT:
    profile_export.jsonl         a line per request
        https://docs.nvidia.com/aiperf/tutorials/metrics-analysis/working-with-profile-export-files
    profile_export_aiperf.json   statistics over the requests, schema 1.1
        https://docs.nvidia.com/aiperf/reference/json-export-schema

Metrics are AIPerf's (https://docs.nvidia.com/aiperf/reference/ai-perf-metrics-reference), in its
units. They differ from those of our reports:

    time_to_first_token    from the actual send; our TTFT is from the intended send
    request_latency        from the actual send to the last token event; our E2E is from the
                           intended send to the end of the output
    inter_token_latency    our TPOT, but up to the last token event
    inter_chunk_latency    our ITL
    failed requests        only counted; in our percentiles they are slower than any answered one
    std                    divides by n: AIPerf 0.13 does, although its schema says sample
    *_sequence_length      as the server counted, which AIPerf does with --use-server-token-count

Some fields cannot mean quite the same, because here two variants take turns:

    benchmark_duration     sum over the variant's blocks, each from its first send to its last token
                           event or failure; throughputs divide by it
    *_ns, *_time           run.json's date + the record's clock: the date is from just before the
                           first request, and the clock skips the time between launches
    worker_id              cast-loadtest; what is not recorded, such as request ids, is left out

Warm-up is left out. GuideLLM is not offered: its documentation does not state its JSON's fields.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from loadtest.errors import UsageError
from loadtest.record import Block, Recorded, Request

FORMS = ("aiperf",)
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def write_export(recorded: Recorded, directory: Path, form: str) -> list[Path]:
    """Writes the measured requests of a run into `directory`, replacing older files.

    Returns:
        The files.

    Raises:
        UsageError: if `form` is not one of FORMS, or nothing was measured.
        OSError: if a file cannot be written.
    """
    if form not in FORMS:
        raise UsageError(f"export form {form!r} is unknown; give one of {', '.join(FORMS)}")
    if not recorded.blocks:
        raise UsageError("the run has no measured requests to export; run it again")
    epoch_ns = round(datetime.fromisoformat(recorded.about["date"]).timestamp()) * 10**9
    written = []
    for variant in recorded.variants:
        blocks = recorded.blocks_of(variant)
        requests = [request for block in blocks for request in block.requests]
        numbers = accumulate(int(request.turn == 0) for request in requests)  # of conversations
        records = [
            _record(number - 1, request, epoch_ns)
            for number, request in zip(numbers, requests, strict=True)
        ]
        summary = _summary(blocks, records) | {"was_cancelled": not recorded.is_complete}
        folder = directory / f"{form}-{quote(variant, safe='')}"
        for name, text in (
            ("profile_export.jsonl", "".join(f"{json.dumps(record)}\n" for record in records)),
            ("profile_export_aiperf.json", json.dumps(summary, indent=2) + "\n"),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    return written


def _record(number: int, request: Request, epoch_ns: int) -> dict[str, Any]:
    """A line of profile_export.jsonl."""
    return {
        "metadata": {
            "session_num": number,
            "conversation_id": str(request.prompt_index),
            "turn_index": request.turn,
            "request_start_ns": epoch_ns + round(request.sent_s * 1e9),
            "request_ack_ns": None,
            "request_end_ns": epoch_ns + round(request.ended_s * 1e9),
            "worker_id": "cast-loadtest",
            "record_processor_id": "cast-loadtest",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
        },
        "metrics": _metrics(request) if request.token_events_s else {},
        "error": _error(request.error) if request.error else None,
    }


def _metrics(request: Request) -> dict[str, Any]:
    """Value and unit of each metric of an answered request."""
    output_tokens = request.output_tokens or 0  # an answered request has them
    times_ms = [1e3 * (event_s - request.sent_s) for event_s in request.token_events_s]
    gaps_ms = [later - earlier for earlier, later in pairwise(times_ms)]
    found: list[tuple[str, str, Any]] = [
        ("output_sequence_length", "tokens", output_tokens),
        ("time_to_first_token", "ms", times_ms[0]),
        ("request_latency", "ms", times_ms[-1]),
    ]
    if request.prompt_tokens is not None:
        found.append(("input_sequence_length", "tokens", request.prompt_tokens))
    if gaps_ms:
        found.append(("time_to_second_token", "ms", gaps_ms[0]))
        found.append(("inter_chunk_latency", "ms", gaps_ms))
    if output_tokens > 1 and times_ms[-1] > times_ms[0]:
        itl_ms = (times_ms[-1] - times_ms[0]) / (output_tokens - 1)
        found.append(("inter_token_latency", "ms", itl_ms))
        found.append(("output_token_throughput_per_user", "tokens/sec/user", 1e3 / itl_ms))
    return {name: {"value": value, "unit": unit} for name, unit, value in found}


def _summary(blocks: Sequence[Block], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """profile_export_aiperf.json, without was_cancelled."""
    values: dict[str, list[float]] = defaultdict(list)
    summary: dict[str, Any] = {"schema_version": "1.1"}
    for record in records:
        for name, metric in record["metrics"].items():
            value = metric["value"]
            values[name] += value if isinstance(value, list) else [value]
            summary[name] = {"unit": metric["unit"]}
    for name, found in values.items():
        summary[name] |= {"avg": np.mean(found), "min": min(found), "max": max(found)}
        for share in _PERCENTILES:
            summary[name][f"p{share}"] = np.percentile(found, share)
        summary[name] |= {"std": np.std(found), "count": len(found), "sum": sum(found)}
    errors = Counter(request.error for block in blocks for request in block.requests)
    num_answered = errors.pop(None, 0)
    duration_s = 0.0
    for block in blocks:
        ends_s = [(request.token_events_s or (request.ended_s,))[-1] for request in block.requests]
        duration_s += max(ends_s) - min(request.sent_s for request in block.requests)
    scalars: dict[str, tuple[str, float]] = {
        "request_count": ("requests", num_answered),
        "error_request_count": ("requests", errors.total()),
        "benchmark_duration": ("sec", duration_s),
        "request_throughput": ("requests/sec", num_answered / duration_s),
    }
    if prompts := values.get("input_sequence_length"):
        scalars["total_isl"] = ("tokens", sum(prompts))
    if outputs := values.get("output_sequence_length"):
        scalars["total_osl"] = ("tokens", sum(outputs))
        scalars["output_token_throughput"] = ("tokens/sec", sum(outputs) / duration_s)
    summary |= {name: {"unit": unit, "avg": value} for name, (unit, value) in scalars.items()}
    start_ns = min(record["metadata"]["request_start_ns"] for record in records)
    end_ns = max(record["metadata"]["request_end_ns"] for record in records)
    return summary | {
        "start_time": datetime.fromtimestamp(start_ns / 1e9, UTC).isoformat(),
        "end_time": datetime.fromtimestamp(end_ns / 1e9, UTC).isoformat(),
        "error_summary": [
            {"error_details": _error(error), "count": num} for error, num in errors.items() if error
        ],
    }


def _error(error: str) -> dict[str, Any]:
    status = error.removeprefix("http_")
    return {"code": int(status) if status.isdecimal() else None, "type": error, "message": error}
