"""The command against the mock: what it sends, finds, writes and refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.judge import capacity as judge
from loadtest.mock_server import MockVariant
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from tests.loadtest.conftest import Serve

SERVICE_S = 0.02
ONE_BY_ONE = MockVariant(ttft_s=SERVICE_S, itl_s=0.0, max_concurrency=1)
QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)
SMALL = ("--blocks", "4", "--output-tokens", "2", "--prompt-tokens", "4")
LIMIT = ("--slo-ttft-ms", "250")


def cast_loadtest(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["capacity", *arguments])


def last_line(result: Any) -> dict[str, Any]:
    return dict(json.loads(result.stdout.splitlines()[-1]))


def about_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "capacity.json").read_text()))


def requests_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]


def test_two_queues_and_their_record(serve: Serve, tmp_path: Path) -> None:
    """Neither can carry more than a request in SERVICE_S, give or take what short blocks miss."""
    url, _ = serve(dense=ONE_BY_ONE, sparse=ONE_BY_ONE)
    out = tmp_path / "out"
    result = cast_loadtest("--url", url, *SMALL, *LIMIT, "--block-s", "0.6", "--out", str(out))
    found = last_line(result)
    assert result.exit_code == int(found["harness"]["is_void"]), result.output
    assert "minutes, or up to twice as long" in result.stderr
    for name in ("dense", "sparse"):
        variant = found["variants"][name]
        assert variant["low"] < variant["capacity_per_s"] < variant["high"]
        assert variant["capacity_per_s"] < 2 / SERVICE_S
        assert variant["errors"] == {}
    assert found["ratio"]["low"] < found["ratio"]["ratio"] < found["ratio"]["high"]
    assert "sparse / dense: " in result.stdout
    assert "give --block-s" in result.stdout  # so few requests prove little

    about, requests = about_of(out), requests_of(out)
    assert about["is_complete"]
    assert about["result"]["variants"] == found["variants"]
    pairs = [
        (b["block_pair"], b["variant"]) for b in about["blocks"] if b["block_pair"] is not None
    ]
    names = ["dense", "sparse", "sparse", "dense"] * 2
    assert pairs == list(zip([0, 0, 1, 1, 2, 2, 3, 3], names, strict=True))
    assert len({request["block"] for request in requests}) == len(about["blocks"]) + 1
    for pair in range(4):
        due, prompts = {}, {}
        for number, block in enumerate(about["blocks"]):
            if block["block_pair"] == pair:
                sent = [request for request in requests if request["block"] == number]
                first_s = sent[0]["intended_send_s"]
                prompts[block["variant"]] = [request["prompt_index"] for request in sent]
                due[block["variant"]] = [
                    (request["intended_send_s"] - first_s) * block["rate_per_s"] for request in sent
                ]
        num = min(map(len, due.values()))
        assert prompts["dense"][:num] == prompts["sparse"][:num]
        assert due["dense"][:num] == pytest.approx(due["sparse"][:num])

    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    (out / "report.png").unlink()
    again = last_line(cast_loadtest("--from", str(out)))
    assert (out / "report.png").exists()
    assert again["variants"] == found["variants"]
    assert again["ratio"] == found["ratio"]


def test_a_rate_that_is_high_enough_is_a_bound(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)
    flags = ("--slo-ttft-ms", "5000", "--max-rate", "30", "--block-s", "0.5")
    result = cast_loadtest("--url", url, *SMALL, *flags)
    found = last_line(result)
    for variant in found["variants"].values():
        assert (variant["capacity_per_s"], variant["high"]) == (None, None)
        assert 0 < variant["low"] <= 30
    assert found["ratio"] is None
    assert "at least" in result.stdout


def test_requests_that_fail_at_every_rate_are_no_capacity(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.0, 0.0, fail_every=3), sparse=QUICK)
    flags = ("--slo-ttft-ms", "5000", "--max-rate", "60", "--block-s", "0.5")
    result = cast_loadtest("--url", url, *SMALL, *flags)
    assert result.exit_code == 1
    assert "dense failed at every rate: {'http_503': " in result.stderr
    found = last_line(result)["variants"]["dense"]
    assert found["capacity_per_s"] is found["low"] is None
    assert "below" in result.stdout


def test_a_failing_warm_up_ends_the_run(serve: Serve, tmp_path: Path) -> None:
    url, _ = serve(dense=MockVariant(0.0, 0.0, fail_every=1), sparse=QUICK)
    out = tmp_path / "out"
    result = cast_loadtest("--url", url, *SMALL, *LIMIT, "--out", str(out))
    assert result.exit_code == 1
    assert "dense: of 2 requests in the warm-up failed: 2 http_503" in result.stderr
    assert last_line(result)["variants"]["dense"]["capacity_per_s"] is None
    assert len(requests_of(out)) == 2


def test_a_block_without_an_answer_ends_the_run(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the server died after the search: that is not its capacity."""
    url, _ = serve(dense=QUICK, sparse=QUICK)
    send = Client.send

    async def fail(self: Client, batch: Batch) -> Sent:
        sent = await send(self, batch)
        if batch.conversations[0].index < 50:
            return sent
        lost = (
            replace(each, error="connect_error", token_events_s=(), last_s=None)
            for each in sent.requests
        )
        return replace(sent, requests=tuple(lost))

    monkeypatch.setattr(Client, "send", fail)
    out = tmp_path / "out"
    flags = ("--slo-ttft-ms", "5000", "--max-rate", "60", "--block-s", "0.3", "--out", str(out))
    result = cast_loadtest("--url", url, *SMALL, *flags)
    assert result.exit_code == 1
    assert re.search(r"requests in block \d+ failed: \d+ connect_error", result.stderr)
    assert not about_of(out)["is_complete"]


def test_a_stopped_run_keeps_what_it_measured(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)
    next_rate, num_calls = judge.next_rate, 0

    def stop(*given: Any) -> float:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise KeyboardInterrupt
        return next_rate(*given)

    monkeypatch.setattr(judge, "next_rate", stop)
    out = tmp_path / "out"
    flags = ("--slo-ttft-ms", "5000", "--max-rate", "30", "--block-s", "0.3", "--out", str(out))
    result = cast_loadtest("--url", url, *SMALL, *flags)
    assert result.exit_code == 130
    assert "cast-loadtest: stopped" in result.stderr
    with (out / "requests.jsonl").open("a") as file:
        file.write('{"block": 9, "variant": "den')  # as a power cut leaves it
    again = last_line(cast_loadtest("--from", str(out)))
    assert not again["is_complete"]
    assert again["num_block_pairs"] == 1
    assert again["variants"]["dense"]["low"] is None


def test_an_overloaded_client_voids_the_run(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.send.paired.MAX_CPU_SHARE", 0.0)
    url, _ = serve(dense=QUICK, sparse=QUICK)
    flags = ("--slo-ttft-ms", "5000", "--max-rate", "30", "--block-s", "0.3")
    result = cast_loadtest("--url", url, *SMALL, *flags)
    assert result.exit_code == 1
    assert "cast-loadtest: VOID: " in result.stderr


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "give --url"),
        (("--url", "http://127.0.0.1:9"), "give --slo-ttft-ms or --slo-tpot-ms"),
        (("--url", "http://127.0.0.1:9", *LIMIT), "/v1/models cannot be read"),
        (("--url", "http://127.0.0.1:9", "--blocks", "2"), "--blocks 2 is too small"),
        (("--url", "http://127.0.0.1:9", "--blocks", "5"), "--blocks 5 is odd"),
        (("--url", "http://127.0.0.1:9", "--max-rate", "0"), "--max-rate 0 is out of range"),
        (("--url", "http://127.0.0.1:9", "--from", "there"), "so --url has no effect"),
        (
            ("--url", "http://127.0.0.1:9", "--prompts", "there", "--prompt-tokens", "128"),
            "--prompt-tokens 128 has no effect on the prompts of --prompts",
        ),
        (("--from", "there", "--blocks", "10"), "so --blocks has no effect"),
        (("--from", "there"), "--from there cannot be read"),
    ],
)
def test_wrong_use_is_one_line(flags: tuple[str, ...], text: str) -> None:
    result = cast_loadtest(*flags)
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_variant_is_named(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, other=QUICK)
    result = cast_loadtest("--url", url, *LIMIT)
    assert result.exit_code == 2
    assert "variant 'sparse' is not served" in result.stderr
