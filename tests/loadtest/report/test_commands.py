"""`report` and `compare` on directories, and what `run` refuses to be judged by."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.mock_server import MockVariant
from loadtest.record import Recorded
from loadtest.report.result import result_of
from tests.loadtest.conftest import Serve
from tests.loadtest.recordings import simulated, two_pairs, write_out


def cast_loadtest(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last_line(done: Any) -> dict[str, Any]:
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The directory of a run that is 1.5 times as fast."""
    run = simulated(1, speedup=1.5, num_block_pairs=8)
    write_out(tmp_path / "out", run)
    return tmp_path / "out"


def test_report_makes_everything_anew(out: Path) -> None:
    names = ("result.json", "report.html", "report.md")
    before = {name: (out / name).read_text() for name in names}
    for name in (*names, "report.png"):
        (out / name).unlink()
    done = cast_loadtest("report", out)
    assert done.exit_code == 0, done.output
    assert {name: (out / name).read_text() for name in names} == before
    assert (out / "report.png").exists()
    assert last_line(done) == json.loads(before["result.json"])


def test_report_judges_by_another_guard(out: Path, tmp_path: Path) -> None:
    guard = tmp_path / "guard.toml"
    guard.write_text("min_speedup = {tpot_p50 = 1.6}")
    done = cast_loadtest("report", out, "--guard", guard)
    assert done.exit_code == 1
    assert done.stderr.startswith("cast-loadtest: FAIL: ")
    assert "min_speedup.tpot_p50: " in done.stderr
    assert "its lower end must reach 1.6" in done.stderr
    assert last_line(done)["verdict"] == "fail"
    # It stays the run's own, so that result.json still follows from run.json.
    assert Recorded.read(out).about["guard"]["min_speedup"] == {"tpot_p50": 1.6}
    assert cast_loadtest("report", out).exit_code == 1
    guard.write_text("min_speedup = {tpot_p50 = 1.4}")
    assert cast_loadtest("report", out, "--guard", guard).exit_code == 0


def test_report_exports_the_files_of_another_tool(out: Path) -> None:
    done = cast_loadtest("report", out, "--export", "aiperf")
    assert done.exit_code == 0, done.output
    assert (out / "aiperf-sparse" / "profile_export.jsonl").is_file()
    done = cast_loadtest("report", out, "--export", "excel")
    assert done.exit_code == 2
    assert done.stderr == "cast-loadtest: --export excel is unknown; give aiperf\n"


def test_report_of_a_sweep(out: Path, tmp_path: Path) -> None:
    done = cast_loadtest("report", tmp_path)
    assert done.exit_code == 0, done.output
    assert list(last_line(done)["runs"]) == ["out"]
    assert (tmp_path / "report.html").exists()


def test_compare_fails_on_regression_only_if_told(out: Path, tmp_path: Path) -> None:
    slower = simulated(2, speedup=1.1, num_block_pairs=8)
    write_out(tmp_path / "new", slower)
    done = cast_loadtest("compare", out, tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert last_line(done)["changes"]["tpot_p50"]["verdict"] == "worse"
    done = cast_loadtest("compare", out, tmp_path / "new", "--fail-on-regression")
    assert done.exit_code == 1
    assert "tpot_p50" in done.stderr
    assert cast_loadtest("compare", tmp_path / "new", out, "--fail-on-regression").exit_code == 0


def test_a_directory_that_cannot_be_written_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)  # root may write anywhere
    done = cast_loadtest("report", out)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"cast-loadtest: {out} cannot be written; copy it, and name the copy\n"


def test_a_report_that_cannot_be_written_is_printed_all_the_same(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("loadtest.report.commands.write_reports", full)
    done = cast_loadtest("report", out)
    assert done.exit_code == 1
    assert last_line(done)["candidate"] == "sparse"
    assert "written: " not in done.stdout
    assert done.stderr.startswith(f"cast-loadtest: {out} could not be written: disk full; free")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("report",), ("compare", "."), ("compare", "--", ".")])
def test_no_run_exits_2(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = cast_loadtest(*command, tmp_path)
    assert done.exit_code == 2
    assert "run.json cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1


SMALL = ("--num-prompts", 2, "--blocks", 2, "--output-tokens", 4, "--prompt-tokens", 8)


def test_run_is_judged_by_its_guard(serve: Serve, tmp_path: Path) -> None:
    url, server = serve(dense=MockVariant(0.03, 0.01), sparse=MockVariant(0.01, 0.002))
    each = {"token_agreement": 0.75, "kl_nats_per_token": 0.1, "num_tokens": 4}
    agreement = {"agreement": {"baseline": "dense", "sparse": each}}
    server.add_api_route("/v1/compare", lambda: agreement, methods=["POST"])
    guard = tmp_path / "guard.toml"
    guard.write_text("min_speedup = {tpot_p50 = 1.5}\nmin_token_agreement = 0.8\nallow_void = true")
    flags = ("run", "--url", url, *SMALL, "--blocks", 4, "--guard", guard, "--same-model")
    done = cast_loadtest(
        *flags, "--slo-tpot-ms", 5, "--quality-prompts", 2, "--out", tmp_path / "out"
    )
    assert done.exit_code == 1, done.output
    found = last_line(done)
    checks = {check["name"]: check["verdict"] for check in found["checks"]}
    assert checks["min_speedup.tpot_p50"] == "pass"
    assert checks["min_token_agreement"] == "fail"
    assert "min_token_agreement: 0.750 (0.750 to 0.750) over 2 prompts" in done.stderr
    assert found["goodput"]["dense"]["share"] == 0
    assert found["quality"]["num_tokens"] == 8
    recorded = Recorded.read(tmp_path / "out")
    assert recorded.about["is_aa"]
    assert recorded.about["slo"] == {"ttft_s": None, "tpot_s": 0.005}
    assert recorded.about["command"].startswith(f"cast-loadtest run --url {url} ")
    assert result_of(recorded) == found


def test_quality_needs_the_gateway_and_comes_before_the_load(serve: Serve) -> None:
    url, server = serve(dense=MockVariant(0.0, 0.0), sparse=MockVariant(0.0, 0.0))
    done = cast_loadtest("run", "--url", url, *SMALL, "--quality-prompts", 1)
    assert done.exit_code == 2
    assert "/v1/compare gave 404" in done.stderr
    assert server.state.requests == []


def test_warnings_are_printed(tmp_path: Path) -> None:
    write_out(tmp_path / "out", two_pairs())
    assert "warning: 2 block pairs are too few" in cast_loadtest("report", tmp_path / "out").stdout
