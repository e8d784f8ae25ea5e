"""The command line against the mock: figures, exit codes, and what is written."""

import json
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from typer.testing import CliRunner

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import remote_variants
from loadtest.__main__ import app
from loadtest.mock_server import MockVariant
from loadtest.mock_server import create_app as create_mock
from loadtest.record import Recorded
from loadtest.send.schedule import Schedule
from tests.loadtest.conftest import Serve, ServeApp

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)
SMALL = ("--num-prompts", "3", "--blocks", "2", "--output-tokens", "6", "--prompt-tokens", "8")
TRACE = ("--schedule", "trace", "--trace", "LENGTHS")


def cast_loadtest(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["run", *arguments], env=environment)


def last_line(result: Any) -> dict[str, Any]:
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_a_four_times_slower_baseline(serve: Serve, guard: Path, tmp_path: Path) -> None:
    url, _ = serve(dense=MockVariant(0.12, 0.04), sparse=MockVariant(0.03, 0.01))
    flags = ("--guard", str(guard), "--out", str(tmp_path / "out"))
    result = cast_loadtest("--url", url, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    figures = last_line(result)
    assert figures == json.loads((tmp_path / "out" / "result.json").read_text())
    assert figures["verdict"] == "pass"
    assert figures["block_order"] == ["dense", "sparse", "sparse", "dense"]
    assert figures["num_requests"] == 12
    assert figures["num_errors"] == 0
    assert figures["tpot_s"]["dense"]["n"] == 6
    assert figures["itl_s"]["sparse"]["n"] == 30
    assert figures["ttft_s"]["dense"]["median"] >= 0.12
    for metric in ("ttft", "tpot", "e2e", "output_tokens_per_s"):
        ratio = figures["ratio"][metric]
        assert ratio["num_block_pairs"] == 2
        assert 1 < ratio["min"] <= ratio["median"] <= ratio["max"], metric


def test_through_the_gateway(serve: Serve, serve_app: ServeApp, guard: Path) -> None:
    workers = {
        "dense": serve(dense=MockVariant(0.08, 0.02))[0],
        "sparse": serve(sparse=MockVariant(0.02, 0.005))[0],
    }
    variants = remote_variants({name: [url] for name, url in workers.items()})
    gateway = create_app(variants, GatewaySettings())
    url = serve_app(gateway)
    while not gateway.state.gateway.is_ready:
        time.sleep(0.01)
    result = cast_loadtest("--url", url, *SMALL, "--guard", str(guard))
    assert result.exit_code == 0, result.output
    figures = last_line(result)
    assert figures["num_requests"] == 12
    assert figures["ratio"]["tpot"]["min"] > 1


DENSE_INFO = """# TYPE cast_variant_info gauge
cast_variant_info{variant="sparse",kernel="vllm",num_sparse_layers="0"} 1
"""


@pytest.mark.parametrize("is_flag", [True, False], ids=["flag", "environment"])
def test_dense_against_dense_is_noticed_behind_a_key(serve: Serve, is_flag: bool) -> None:
    url, mock = serve(dense=QUICK, sparse=QUICK)

    @mock.get("/metrics")
    def metrics(request: Request) -> Response:
        is_known = request.headers.get("authorization") == "Bearer hush"
        return PlainTextResponse(DENSE_INFO) if is_known else Response(status_code=401)

    flags = ("--api-key", "hush") if is_flag else ()
    environment = {} if is_flag else {"CAST_LOADTEST_API_KEY": "hush"}
    figures = last_line(cast_loadtest("--url", url, *SMALL, *flags, **environment))
    assert figures["served"]["sparse"]["num_sparse_layers"] == "0"
    assert any("this compares dense with dense" in text for text in figures["warnings"])


def test_an_open_loop_from_two_processes(serve: Serve, tmp_path: Path) -> None:
    url, _ = serve(dense=MockVariant(0.02, 0.001), sparse=MockVariant(0.02, 0.001))
    out = tmp_path / "out"
    flags = ["--schedule", "poisson", "--rate", "20", "--processes", "2", "--seed", "3", "--out"]
    cast_loadtest("--url", url, *SMALL, *flags, str(out))
    about = json.loads((out / "run.json").read_text())
    assert (about["schedule"], about["rate_per_s"]) == ("poisson", 20.0)
    assert about["harness"]["num_processes"] == 2
    assert about["workload"]["source"] == "synthetic"
    requests = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert all(request["sent_s"] >= request["intended_send_s"] for request in requests)
    gaps_s = []
    for block in range(4):
        times_s = [r["intended_send_s"] for r in requests if r["block"] == block]
        gaps_s.append([time_s - times_s[0] for time_s in times_s])
    due_s = Schedule("poisson", 20.0, seed=3).times_s(3)
    assert due_s is not None
    assert gaps_s[0] == pytest.approx(gaps_s[1])
    assert gaps_s[0] == pytest.approx([time_s - due_s[0] for time_s in due_s])


@pytest.mark.parametrize(
    ("flags", "loads"),
    [
        ("--concurrency 1,3", ["concurrency-1", "concurrency-3"]),
        ("--schedule poisson --rate 25.5,50", ["rate-25.5", "rate-50"]),
    ],
)
def test_a_sweep_is_a_run_for_each_load(
    serve: Serve, tmp_path: Path, flags: str, loads: list[str]
) -> None:
    url, app = serve(dense=MockVariant(0.01, 0.001), sparse=MockVariant(0.01, 0.001))
    out = tmp_path / "out"
    result = cast_loadtest("--url", url, *SMALL, *flags.split(), "--out", str(out))
    assert len(last_line(result)["sweep"]) == 2
    assert sorted(path.parent.name for path in out.glob("*/run.json")) == loads
    for load in loads:
        assert json.loads((out / load / "result.json").read_text())["num_requests"] == 12
    prompts = [prompt for _, prompt in app.state.requests]
    assert len(prompts) == 2 * (12 + 4)
    # Nothing but the warm-up's prompts, which both variants get, is ever sent twice.
    assert len(set(prompts)) == 2 * (12 + 2)


def test_each_candidate_has_a_record_with_the_same_blocks_of_the_baseline(
    serve: Serve, tmp_path: Path
) -> None:
    quick = MockVariant(0.01, 0.001)
    url, app = serve(dense=quick, sparse=quick, **{"org/draft": quick})
    out = tmp_path / "out"
    flags = ("--candidate", "sparse,org/draft", "--concurrency", "1,2")
    result = cast_loadtest("--url", url, *SMALL, *flags, "--out", str(out))
    found = [(each["candidate"], each["concurrency"]) for each in last_line(result)["sweep"]]
    assert found == [("sparse", 1), ("org/draft", 1), ("sparse", 2), ("org/draft", 2)]
    of_dense = []
    for folder, candidate in (("sparse", "sparse"), ("org%2Fdraft", "org/draft")):
        sweep = json.loads((out / folder / "result.json").read_text())
        assert (sweep["candidate"], len(sweep["runs"])) == (candidate, 2)
        recorded = Recorded.read(out / folder / "concurrency-2")
        assert recorded.variants == ("dense", candidate)
        of_dense.append([r.sent_s for block in recorded.blocks_of("dense") for r in block.requests])
    assert len(of_dense[0]) == 2 * 3
    assert of_dense[0] == of_dense[1]
    assert len(app.state.requests) == 2 * 3 * (2 + 2 * 3)  # dense is not asked again for the second


def test_a_candidate_that_fails_is_named_to_the_others(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK, draft=MockVariant(0.0, 0.0, fail_every=1))
    result = cast_loadtest("--url", url, *SMALL, "--candidate", "sparse,draft")
    assert result.exit_code == 1
    assert "nothing was measured: another candidate; see" in result.stderr
    assert "nothing was measured: draft http_503 x2; see" in result.stderr


def test_until_certain_adds_block_pairs_until_the_limit_is_decided(
    serve: Serve, guard: Path, tmp_path: Path
) -> None:
    url, _ = serve(dense=MockVariant(0.02, 0.008), sparse=MockVariant(0.01, 0.002))
    small = ("--num-prompts", "2", "--blocks", "4", "--output-tokens", "4", "--until", "certain")
    guard.write_text("allow_void = true\nmin_speedup = {tpot_p50 = 1.2}")
    flags = ("--guard", str(guard), "--out", str(tmp_path / "out"))
    done = cast_loadtest("--url", url, *small, *flags)
    figures = last_line(done)
    assert done.exit_code == 0, done.output
    assert figures["verdict"] == "pass"
    # Four pairs could not reject anything, and the interval of few is far wider than a bootstrap's.
    assert figures["num_block_pairs"] >= 6
    assert figures["plan"]["num_block_pairs"] == figures["num_block_pairs"]
    ends = [figures["speedups"]["tpot_p50"][end] for end in ("low", "ratio", "high")]
    assert 1.2 <= ends[0] < ends[1] < ends[2]


def test_what_stays_open_until_the_time_is_over_exits_3(serve: Serve, guard: Path) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)
    guard.write_text("allow_void = true\nmin_speedup = {tpot_p50 = 1.0}")
    small = ("--num-prompts", "2", "--blocks", "4", "--output-tokens", "4", "--until", "certain")
    flags = ("--guard", str(guard), "--max-minutes", "0.0001")
    done = cast_loadtest("--url", url, *small, *flags)
    assert done.exit_code == 3
    assert last_line(done)["verdict"] == "inconclusive"
    assert last_line(done)["num_block_pairs"] == 4
    assert "INCONCLUSIVE: min_speedup.tpot_p50: " in done.stderr


def test_lengths_are_drawn_and_the_same_on_both_variants(serve: Serve, tmp_path: Path) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    flags = ["--num-prompts", "40", "--blocks", "2", "--output-tokens", "2-9"]
    flags += ["--prompt-tokens", "lognormal:20:0.3", "--out", str(tmp_path / "out")]
    figures = last_line(cast_loadtest("--url", url, *flags))
    assert (figures["num_errors"], figures["num_unequal_lengths"]) == (0, 0)
    assert figures["workload"]["output_tokens"] == "2-9"
    recorded = Recorded.read(tmp_path / "out")
    for dense, sparse in recorded.pairs:
        asked = [[request.asked_tokens for request in side.requests] for side in (dense, sparse)]
        assert asked[0] == asked[1]
        assert set(asked[0]) == set(range(2, 10))
    # What the server was asked for is what the record says.
    told = [answer.num_tokens for answer in app.state.truth.answers]
    assert sorted(told) == sorted(request.asked_tokens for request in recorded.requests)
    words = sorted(len(prompt.split("\n")[1].split()) for _, prompt in app.state.requests)
    assert 15 < words[len(words) // 2] < 25
    assert words[-1] <= 49  # 20 exp(0.9)


def test_conversations_and_shared_prefixes_show_what_a_cache_saves(
    serve: Serve, tmp_path: Path
) -> None:
    cached = MockVariant(0.002, 0.001, prefill_s=0.002)
    url, app = serve(dense=cached, sparse=cached)
    flags = ["--num-prompts", "6", "--blocks", "2", "--output-tokens", "4", "--turns", "1-3"]
    flags += ["--prompt-tokens", "10", "--shared-prefix", "40", "--prefix-groups", "2"]
    figures = last_line(cast_loadtest("--url", url, *flags, "--out", str(tmp_path / "out")))
    assert figures["num_errors"] == 0
    assert figures["workload"]["turns"] == "1-3"
    turns_s = figures["ttft_by_turn_s"]["dense"]
    assert len(turns_s) == 3
    assert [turn["n"] for turn in turns_s] == sorted((t["n"] for t in turns_s), reverse=True)
    # The warm-up filled the cache with both prefixes: of a first turn its own number and words are
    # new, of a later one what the user says.
    answers = {(answer.variant, answer.prompt): answer for answer in app.state.truth.answers}
    assert len(answers) == len(app.state.truth.answers)
    counted = [answer for answer in answers.values() if answer.num_new_words < 20]
    assert len(counted) >= figures["num_requests"]
    recorded = Recorded.read(tmp_path / "out")
    for request in (r for block in recorded.blocks for r in block.requests):
        assert request.timing is not None
        num_new = 11 if request.turn == 0 else 10
        assert (request.timing.ttft_s or 0.0) >= 0.002 + 0.002 * num_new
    report = (tmp_path / "out/report.md").read_text()
    assert "| TTFT p50 in turn 3, ms |" in report


def test_answers_that_end_by_themselves_are_not_unequal_work(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=MockVariant(0.0, 0.0, missing_tokens=2))
    result = cast_loadtest("--url", url, *SMALL, "--until-eos")
    figures = last_line(result)
    assert figures["num_unequal_lengths"] == 0
    assert figures["output_tokens_per_request"] == {"dense": 6, "sparse": 4}


def test_a_trace_gives_times_and_lengths(serve: Serve, tmp_path: Path) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    lines = [
        {"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [5, 6]},
        {"timestamp": 1040, "input_length": 520, "output_length": 4, "hash_ids": [5, 7]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--schedule", "trace", "--trace", str(trace), "--blocks", "2"]
    figures = last_line(cast_loadtest("--url", url, *flags, "--out", str(tmp_path / "out")))
    assert figures["num_requests"] == 8
    lengths = [figures["workload"][key] for key in ("prompt_words", "output_tokens", "trace")]
    assert lengths == ["trace", "trace", str(trace)]
    assert figures["output_tokens_per_request"] == {"dense": 3.5, "sparse": 3.5}
    report = (tmp_path / "out/report.md").read_text()
    assert "output tokens (median) dense 3.5, sparse 3.5" in report
    recorded = Recorded.read(tmp_path / "out")
    for block in recorded.blocks:
        assert [request.asked_tokens for request in block.requests] == [3, 4]
        gap_s = block.requests[1].intended_send_s - block.requests[0].intended_send_s
        assert gap_s == pytest.approx(0.04)
        assert [request.prompt_tokens for request in block.requests] == [605, 525]
    refused = cast_loadtest("--url", url, *flags, "--output-tokens", "9")
    assert refused.exit_code == 2
    assert "--output-tokens 9 has no effect on trace" in refused.stderr


def test_chats_from_a_file(serve: Serve, tmp_path: Path) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    chat = {"messages": [{"role": "user", "content": "what is this?"}]}
    (tmp_path / "own.jsonl").write_text(json.dumps(chat) + "\n")
    flags = ("--prompts", str(tmp_path / "own.jsonl"), "--turns", "1")
    result = cast_loadtest("--url", url, *SMALL[:-2], *flags)
    assert last_line(result)["num_errors"] == 0
    assert len(app.state.requests) == 16
    assert all(prompt.endswith("\nwhat is this?") for _, prompt in app.state.requests)


@pytest.mark.parametrize(
    ("sick", "count", "message"),
    [
        # Ten requests to sparse, two of them warm-up: the fourth and the eighth fail.
        ({"fail_every": 4}, ("num_errors", 2), "2 of 16 requests failed: sparse http_503 x2"),
        ({"is_cut_off": True}, ("num_requests", 0), "measured: sparse incomplete_stream x2"),
        ({"missing_tokens": 2}, ("num_unequal_lengths", 8), "8 of 16 responses do not have as"),
    ],
)
def test_what_makes_a_run_unsound_is_counted_and_exits_1(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sick: dict[str, Any],
    count: tuple[str, int],
    message: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url, _ = serve(dense=QUICK, sparse=MockVariant(0.0, 0.0, **sick))
    result = cast_loadtest("--url", url, *SMALL, "--num-prompts", "4")
    assert result.exit_code == 1
    figures = last_line(result)
    assert figures[count[0]] == count[1]
    assert figures["verdict"] == "fail"
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []  # without --out nothing is left behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "3"], "--blocks 3 is odd"),
        (["--timeout-s", "0"], "--timeout-s 0 is out of range"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0 may be less than 1; raise it"),
        (
            ["--candidate", "spares"],
            "variant 'spares' is not served at URL; it serves: dense, sparse",
        ),
        (["--text", "/absent"], "text /absent cannot be read"),
        (["--prompts", "/absent"], "prompts /absent cannot be read"),
        (["--trace", "/absent"], "trace /absent cannot be read"),
        (["--schedule", "poisson"], "--schedule poisson needs --rate"),
        (["--schedule", "poisson", "--rate", "fast"], "--rate fast is not a list of numbers"),
        (["--schedule", "poisson", "--rate", "1,inf"], "--rate 1,inf is not a list of numbers"),
        (["--schedule", "poisson", "--rate", "1,-1"], "--rate -1.0 is out of range"),
        (["--concurrency", "1,,2"], "--concurrency 1,,2 is not a list of whole numbers"),
        (["--concurrency", "1.5"], "--concurrency 1.5 is not a list of whole numbers"),
        (["--concurrency", "1,2,1"], "--concurrency 1,2,1 has a number twice"),
        (["--concurrency", "1,4", "--rate", "1,2"], "--concurrency 1,4 is a sweep of closed loops"),
        (
            ["--concurrency", "1,4", "--schedule", "poisson", "--rate", "1"],
            "--concurrency 1,4 is a sweep of closed loops",
        ),
        (
            ["--concurrency", "1,16", "--num-prompts", "8"],
            "--num-prompts 8 is too small; give at least 16",
        ),
        (["--num-prompts", "0"], "--num-prompts 0 is too small; give at least 1"),
        (["--block-s", "0"], "--block-s 0 is out of range"),
        (["--variant", "dense=/absent"], "give one of --url, --variant NAME=DIR"),
        (["--launches", "2"], "--launches 2 has no effect on the servers at --url; have them"),
        (["--launches", "1"], "--launches 1 has no effect on the servers at --url"),
        (["--vllm-flags", "--seed 3"], "--vllm-flags --seed 3 has no effect on the servers at"),
        (["--processes", "2"], "--processes 2 is more than --concurrency 1"),
        (
            ["--schedule", "poisson", "--rate", "1", "--processes", "4", "--num-prompts", "3"],
            "--processes 4 is more than --num-prompts 3",
        ),
        (
            ["--prompts", "PROMPTS", "--prompt-tokens", "64"],
            "--prompt-tokens 64 has no effect on the prompts of --prompts",
        ),
        (
            ["--prompts", "PROMPTS", "--prompt-tokens", "128"],
            "--prompt-tokens 128 has no effect on the prompts of --prompts",
        ),
        (["--num-prompts", "8", "--block-s", "5"], "--block-s 5 has no effect"),
        (["--num-prompts", "8", "--block-s", "20"], "--block-s 20 has no effect"),
        ([*TRACE, "--block-s", "20"], "--block-s 20 has no effect"),
        ([*TRACE, "--output-tokens", "32"], "--output-tokens 32 has no effect on trace"),
        ([*TRACE, "--prompt-tokens", "128"], "--prompt-tokens 128 has no effect on trace"),
        ([*TRACE, "--text", "/absent"], "--text /absent has no effect on trace"),
        (["--guard", "GOODPUT"], "limits goodput, but nothing measures it; give --slo-ttft-ms"),
        (["--guard", "AGREEMENT"], "limits min_token_agreement, but nothing measures it; give --q"),
        (["--guard", "ACCURACY"], "limits max_accuracy_loss, but nothing measures it; give --cho"),
        (["--slo-ttft-ms", "0"], "--slo-ttft-ms 0 is out of range"),
        (["--slo-tpot-ms", "inf"], "--slo-tpot-ms inf is out of range"),
        (["--quality-prompts", "-1"], "--quality-prompts -1 is too small"),
        (["--choices", "/absent"], "questions /absent cannot be read"),
        (["--choices-limit", "3"], "--choices-limit 3 has no effect without --choices"),
        (["--choices", "CHOICES", "--choices-limit", "0"], "--choices-limit 0 is too small"),
        (["--guard", "SPEED", "--blocks", "2"], "but 2 block pairs give no interval"),
        (["--output-tokens", "1"], "--output-tokens 1 may be less than 2; raise it"),
        (["--output-tokens", "own"], "--output-tokens own needs --prompts FILE whose lines all"),
        (["--output-tokens", "own", "--prompts", "PROMPTS"], "--output-tokens own needs --prompts"),
        (
            ["--until-eos", "--guard", "RATE"],
            "limits throughput, but with --until-eos the variants'",
        ),
        (
            ["--until-eos", "--turns", "2", "--guard", "SPEED"],
            "limits ttft_p50, but with --until-eos the variants' answers and histories have",
        ),
        (
            ["--turns", "2", "--schedule", "constant", "--rate", "9", "--slo-ttft-ms", "9"],
            "--slo-ttft-ms and --slo-tpot-ms count requests by when they leave",
        ),
        (
            ["--turns", "2", "--schedule", "ramp", "--rate", "9", "--rate-to", "10"],
            "--schedule ramp count requests by when they leave",
        ),
        (["--turns", "0-2"], "--turns 0-2 may be less than 1; raise it"),
        (["--turns", "2", "--prompts", "CHAT"], "--turns needs prompts that are texts, but"),
        (["--think-s", "0"], "--think-s 0 has no effect with one turn; give --turns 2"),
        (["--think-s", "1"], "--think-s 1 has no effect with one turn; give --turns 2"),
        (["--think-s", "x", "--turns", "2"], "--think-s 'x' is not a length"),
        (["--shared-prefix", "-1"], "--shared-prefix -1 is too small; give 0 or more"),
        (["--prefix-groups", "1"], "--prefix-groups 1 has no effect without --shared-prefix"),
        (["--prefix-groups", "2"], "--prefix-groups 2 has no effect without --shared-prefix"),
        (["--until", "sure"], "--until sure is unknown; give certain"),
        (["--until", "certain"], "--until certain needs a limit to decide; give --guard"),
        (["--until", "certain", "--guard", "GOODPUT", "--slo-ttft-ms", "5"], "decide goodput of"),
        (
            ["--until", "certain", "--guard", "SPEED", "--max-minutes", "0"],
            "--max-minutes 0 is out",
        ),
        (["--max-minutes", "5"], "--max-minutes 5 has no effect without --until certain"),
    ],
)
def test_wrong_use_exits_2_with_one_line_and_writes_nothing(
    serve: Serve,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    arguments: list[str],
    message: str,
) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    files = tmp_path_factory.mktemp("files")
    texts = {
        "LENGTHS": '{"time_s": 0, "prompt_tokens": 8, "output_tokens": 4}\n',
        "PROMPTS": '{"prompt": "a prompt"}\n',
        "CHAT": '{"messages": [{"role": "user", "content": "a prompt"}]}\n',
        "GOODPUT": "min_speedup = {goodput = 1.1}\n",
        "RATE": "min_speedup = {throughput = 1.1}\n",
        "SPEED": "max_slowdown = {ttft_p50 = 1.1}\n",
        "AGREEMENT": "min_token_agreement = 0.5\n",
        "ACCURACY": "max_accuracy_loss = 0.02\n",
        "CHOICES": '{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}\n',
    }
    for name, content in texts.items():
        (files / f"{name}.jsonl").write_text(content)
    arguments = [str(files / f"{word}.jsonl") if word in texts else word for word in arguments]
    result = cast_loadtest("--url", url, "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert message.replace("URL", url) in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert app.state.requests == []


def test_a_dead_client_process_is_one_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise ChildProcessError("a client process died; see its message above")

    monkeypatch.setattr("loadtest.__main__.measure", measure)
    result = cast_loadtest("--url", serve(dense=QUICK, sparse=QUICK)[0])
    assert result.exit_code == 1
    assert result.stderr == "cast-loadtest: a client process died; see its message above\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "http://[", "ftp://x"])
def test_unreachable_url_exits_2(url: str) -> None:
    result = cast_loadtest("--url", url)
    assert result.exit_code == 2
    assert result.stderr.startswith("cast-loadtest: ")
    assert result.stderr.count("\n") == 1


def test_taken_out_directory_exits_2_before_anything_is_sent(serve: Serve, tmp_path: Path) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    (tmp_path / "kept").touch()
    result = cast_loadtest("--url", url, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert app.state.requests == []
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def fault(*_: object) -> None:
    raise ValueError("a fault in the statistics")


def report_again(stderr: str) -> Any:
    """Follows the last line of a run that went wrong."""
    words = shlex.split(stderr.splitlines()[-1].partition("write their report: ")[2])
    assert words[:2] == ["cast-loadtest", "report"]
    return CliRunner().invoke(app, words[1:])


@pytest.mark.parametrize("has_out", [True, False], ids=["--out", "no --out"])
def test_a_fault_in_the_statistics_costs_no_record(
    serve: Serve,
    guard: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_out: bool,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url, _ = serve(dense=QUICK, sparse=QUICK)
    flags = ("--out", str(tmp_path / "out")) if has_out else ()
    with monkeypatch.context() as patch:
        patch.setattr("loadtest.report.result.summarise", fault)
        result = cast_loadtest("--url", url, *SMALL, "--guard", str(guard), *flags)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ValueError: a fault in the statistics\n" in result.stderr
    assert "this is a bug in cast-loadtest" in result.stderr
    again = report_again(result.stderr)
    assert again.exit_code == 0, again.output
    figures = last_line(again)
    assert (figures["num_requests"], figures["num_errors"]) == (12, 0)
    assert figures["is_complete"]


def stopped_run(url: str, out: Path, by: signal.Signals) -> tuple[int, str]:
    """A run that is sent a signal while its ninth block or a later one is measured."""
    words = ["run", "--url", url, *SMALL, "--blocks", "200", "--out", str(out)]
    command = [sys.executable, "-m", "loadtest", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        file = out / "requests.jsonl"
        while run.poll() is None and not (file.exists() and file.read_text().count("\n") > 28):
            time.sleep(0.02)
        run.send_signal(by)
        _, stderr = run.communicate()
    return run.returncode, stderr


@pytest.mark.parametrize(
    ("by", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)]
)
def test_a_run_that_is_ended_leaves_what_it_measured(
    serve: Serve, tmp_path: Path, by: signal.Signals, status: int
) -> None:
    url, _ = serve(dense=MockVariant(0.01, 0.005), sparse=MockVariant(0.01, 0.005))
    out = tmp_path / "out"
    code, stderr = stopped_run(url, out, by)
    assert code == status, stderr
    again = CliRunner().invoke(app, ["report", str(out)])
    figures = last_line(again)
    assert 4 <= figures["num_block_pairs"] < 200
    assert again.exit_code == 3  # a run that was stopped is inconclusive
    assert figures["num_requests"] == 6 * figures["num_block_pairs"]
    assert not figures["is_complete"]
    text = f"INCOMPLETE: the run was stopped: {figures['num_block_pairs']} of 200 block pairs"
    assert any(text in warning for warning in figures["warnings"])
    assert text in (out / "report.md").read_text()
    assert "complete: the run was stopped" in again.stderr
    if by == signal.SIGTERM:
        assert f"the measurements are in {out}" in stderr


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file of this process can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_found_before_anything_is_sent(serve: Serve, tmp_path: Path) -> None:
    url, server = serve(dense=QUICK, sparse=QUICK)
    with small_disk(1 << 20):
        result = cast_loadtest("--url", url, *SMALL, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert server.state.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_run(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = serve(dense=QUICK, sparse=QUICK)
    monkeypatch.setattr("loadtest.job.check_out", lambda out: None)  # it had room then
    out = tmp_path / "out"
    with small_disk(8 << 10):
        result = cast_loadtest("--url", url, *SMALL, "--blocks", "200", "--out", str(out))
    assert result.exit_code == 1
    assert f"{out} could not be written: File too large; free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(server.state.requests) < 100  # of 1,204
    assert not last_line(report_again(result.stderr))["is_complete"]


def test_a_run_that_is_stopped_in_its_warm_up_leaves_no_directory(
    serve: Serve, tmp_path: Path
) -> None:
    url, _ = serve(dense=MockVariant(5.0, 0.0), sparse=QUICK)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loadtest", "run", "--url", url, *SMALL, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not (out / "run.json").exists():
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, stderr = run.communicate()
    assert run.returncode == 130, stderr
    assert "the measurements are in" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_where_a_record_is_from_is_known_before_anything_is_sent(
    serve_app: ServeApp, tmp_path: Path
) -> None:
    server = create_mock({"dense": QUICK, "sparse": QUICK})
    found: list[dict[str, Any]] = []
    out = tmp_path / "out"

    @server.middleware("http")
    async def note(request: Request, call_next: Any) -> Any:
        if request.url.path == "/v1/completions":
            found.append(json.loads((out / "run.json").read_text()))
        return await call_next(request)

    cast_loadtest("--url", serve_app(server), *SMALL, "--out", str(out))
    after = json.loads((out / "run.json").read_text())
    for key in ("date", "command", "versions", "num_launches", "url", "workload", "timeout_s"):
        assert found[0][key] == after[key], key
    assert after["num_launches"] == 1
    assert found[0]["machine"]["load_average"] == after["machine"]["load_average"][:1]
    machine = {**after["machine"], "load_average": after["machine"]["load_average"][:1]}
    assert found[0]["machine"] == machine
    assert (found[0]["is_complete"], after["is_complete"]) == (False, True)
