"""The exported files against figures worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.errors import UsageError
from loadtest.record import Recorded
from loadtest.report.export import write_export
from tests.loadtest.recordings import broken_runs, recorded, request, two_pairs

EPOCH_S = 1_795_600_800  # 2026-11-25 10:00:00 UTC, the recordings' date


def run() -> Recorded:
    """Two blocks of dense, each with an answer and a failure, around two of sparse."""
    late = request(0, 0, "dense", 0.5, sent_s=100.5)
    late = replace(
        late,
        intended_send_s=100.0,
        token_events_s=(101.0, 101.5, 102.5),
        output_tokens=5,
        last_s=102.625,  # a last token without text
        ended_s=102.75,
        prompt_index=7,
    )
    return recorded(
        [
            request(None, None, "dense", 9.0),
            late,
            replace(request(0, 0, "dense", None, sent_s=101.0), prompt_index=7, turn=1),
            request(1, 0, "sparse", 0.25, 0.5, sent_s=200.0),
            request(2, 1, "sparse", 0.25, 0.5, sent_s=250.0),
            request(3, 1, "dense", 1.0, sent_s=300.0, output_tokens=1),
            replace(request(3, 1, "dense", None, sent_s=300.0, error="timeout"), ended_s=303.0),
        ]
    )


def exported(folder: Path, variant: str = "dense") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines and the summary of a variant."""
    lines = (folder / f"aiperf-{variant}" / "profile_export.jsonl").read_text().splitlines()
    summary = (folder / f"aiperf-{variant}" / "profile_export_aiperf.json").read_text()
    return [json.loads(line) for line in lines], json.loads(summary)


def test_a_line_per_measured_request(tmp_path: Path) -> None:
    written = write_export(run(), tmp_path, "aiperf")
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "aiperf-dense/profile_export.jsonl",
        "aiperf-dense/profile_export_aiperf.json",
        "aiperf-sparse/profile_export.jsonl",
        "aiperf-sparse/profile_export_aiperf.json",
    ]
    lines, _ = exported(tmp_path)
    assert lines[0] == {
        "metadata": {
            "session_num": 0,
            "conversation_id": "7",
            "turn_index": 0,
            "request_start_ns": EPOCH_S * 10**9 + 100_500_000_000,
            "request_ack_ns": None,
            "request_end_ns": EPOCH_S * 10**9 + 102_750_000_000,
            "worker_id": "cast-loadtest",
            "record_processor_id": "cast-loadtest",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
        },
        # From the actual send, 100.5, to the last token event, 102.5.
        "metrics": {
            "input_sequence_length": {"value": 10, "unit": "tokens"},
            "output_sequence_length": {"value": 5, "unit": "tokens"},
            "time_to_first_token": {"value": 500.0, "unit": "ms"},
            "time_to_second_token": {"value": 500.0, "unit": "ms"},
            "request_latency": {"value": 2000.0, "unit": "ms"},
            "inter_chunk_latency": {"value": [500.0, 1000.0], "unit": "ms"},
            "inter_token_latency": {"value": 1500 / 4, "unit": "ms"},
            "output_token_throughput_per_user": {"value": 4 / 1.5, "unit": "tokens/sec/user"},
        },
        "error": None,
    }
    assert lines[1]["metrics"] == {}
    assert lines[1]["error"] == {"code": 503, "type": "http_503", "message": "http_503"}
    # One token has no time per token after the first.
    assert set(lines[2]["metrics"]) == {
        "input_sequence_length",
        "output_sequence_length",
        "time_to_first_token",
        "request_latency",
    }
    assert lines[3]["error"] == {"code": None, "type": "timeout", "message": "timeout"}
    # The first two are turns of one conversation.
    places = [(line["metadata"]["session_num"], line["metadata"]["turn_index"]) for line in lines]
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0)]


def test_statistics_over_answered_requests(tmp_path: Path) -> None:
    write_export(run(), tmp_path, "aiperf")
    _, summary = exported(tmp_path)
    ttft = summary["time_to_first_token"]
    assert ttft.pop("unit") == "ms"
    assert ttft == pytest.approx(
        {
            "avg": 750.0,
            "min": 500.0,
            "max": 1000.0,
            "p1": 505.0,
            "p5": 525.0,
            "p10": 550.0,
            "p25": 625.0,
            "p50": 750.0,
            "p75": 875.0,
            "p90": 950.0,
            "p95": 975.0,
            "p99": 995.0,
            "std": 250.0,
            "count": 2,
            "sum": 1500.0,
        }
    )
    assert summary["inter_chunk_latency"]["count"] == 2  # gaps, not requests
    assert summary["inter_token_latency"]["p99"] == 375.0
    # The first block lasts from 100.5 to the last token event, 102.5; the second from 300 to 303,
    # when its last request failed. What sparse took between them does not count.
    scalars = {
        "request_count": {"unit": "requests", "avg": 2},
        "error_request_count": {"unit": "requests", "avg": 2},
        "benchmark_duration": {"unit": "sec", "avg": 5.0},
        "request_throughput": {"unit": "requests/sec", "avg": 2 / 5},
        "total_isl": {"unit": "tokens", "avg": 20},
        "total_osl": {"unit": "tokens", "avg": 6},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 6 / 5},
    }
    assert {name: summary[name] for name in scalars} == scalars
    assert summary["error_summary"] == [
        {"error_details": {"code": code, "type": name, "message": name}, "count": 1}
        for code, name in ((503, "http_503"), (None, "timeout"))
    ]
    assert summary["schema_version"] == "1.1"
    assert summary["start_time"] == "2026-11-25T10:01:40.500000+00:00"
    assert summary["end_time"] == "2026-11-25T10:05:03+00:00"
    assert summary["was_cancelled"] is False


def test_each_variant_has_its_own_figures(tmp_path: Path) -> None:
    write_export(two_pairs(is_complete=False), tmp_path, "aiperf")
    (dense, dense_summary), (sparse, sparse_summary) = (
        exported(tmp_path, variant) for variant in ("dense", "sparse")
    )
    assert len(dense) == len(sparse) == 6
    assert dense_summary["inter_token_latency"]["avg"] == 500.0
    assert sparse_summary["inter_token_latency"]["avg"] == 250.0
    assert dense_summary["time_to_first_token"]["max"] == 9000.0
    assert sparse_summary["time_to_first_token"]["max"] == 5000.0
    assert dense_summary["was_cancelled"] is sparse_summary["was_cancelled"] is True


def test_what_was_not_measured_is_absent(tmp_path: Path) -> None:
    no_measurement, one_sided, _ = broken_runs()
    with pytest.raises(UsageError, match="no measured requests to export"):
        write_export(no_measurement, tmp_path, "aiperf")
    assert not any(tmp_path.iterdir())
    unknown = [replace(each, prompt_tokens=None) for each in one_sided.requests]
    write_export(Recorded(one_sided.about, tuple(unknown)), tmp_path, "aiperf")
    lines, summary = exported(tmp_path)
    assert "input_sequence_length" not in lines[0]["metrics"]
    assert "total_isl" not in summary
    _, summary = exported(tmp_path, "sparse")  # it never answered
    assert summary["request_throughput"]["avg"] == 0
    assert not {"time_to_first_token", "total_osl", "output_token_throughput"} & set(summary)


def test_names_become_one_directory_each(tmp_path: Path) -> None:
    names = {"dense": "org/model", "sparse": ".."}
    renamed = [replace(each, variant=names[each.variant]) for each in two_pairs().requests]
    plan = {"baseline": "org/model", "candidate": ".."}
    write_export(recorded(renamed, plan=plan), tmp_path / "new", "aiperf")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "aiperf-org%2Fmodel",
        "aiperf-..",
    }


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export form 'guidellm' is unknown; give one of aiperf"):
        write_export(run(), tmp_path, "guidellm")
    (tmp_path / "aiperf-dense").touch()
    with pytest.raises(FileExistsError):
        write_export(run(), tmp_path, "aiperf")
