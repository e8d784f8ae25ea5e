"""What of the comparison with llama.cpp needs no llama.cpp: asking, taking turns, ratios."""

import asyncio
import hashlib
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fastapi import FastAPI, Response

from benchmarks.peers import compare, files
from benchmarks.peers.__main__ import main
from benchmarks.peers.compare import Found
from benchmarks.peers.names import PeerError
from benchmarks.peers.process import Process
from benchmarks.peers.server import Server
from cast_serve.latency import RequestTiming
from loadtest.mock_server import MockVariant
from loadtest.send.connection import Pool
from tests.benchmarks.conftest import LoadOf
from tests.loadtest.conftest import Serve, ServeApp

PLAN = compare.Plan(rounds=2, prompts=2, at_once=0, prompt_words=8, output_tokens=4)


def server_of(name: str, url: str) -> Server:
    return Server(name, f"vLLM, {name}", url, 1000, os.getpid())


def test_every_server_gets_the_same_prompts_in_turned_order(serve: Serve) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001), rival=MockVariant(0.0, 0.001))
    servers = [server_of("ours", url), server_of("rival", url)]
    found = asyncio.run(compare.measure(servers, PLAN))
    for name in ("ours", "rival"):  # without the first round, which warms up
        assert [len(timings) for timings in found[name].timings] == [2, 2]
        assert found[name].tokens_per_s == [0.0, 0.0]  # none at once
    names = [name for name, _ in app.state.requests]
    assert names == [n for first in ("rival", "ours", "rival") for n in turn(first)]
    prompts = {name: [p for n, p in app.state.requests if n == name] for name in ("ours", "rival")}
    assert prompts["ours"] == prompts["rival"]
    assert len(set(prompts["ours"])) == 6


def turn(first: str) -> list[str]:
    other = {"ours": "rival", "rival": "ours"}[first]
    return [first, first, other, other]


def test_an_answer_that_is_not_whole_is_refused(serve: Serve) -> None:
    url, _ = serve(sparse=MockVariant(0.0, 0.0, fail_every=1))

    async def ask() -> RequestTiming:
        pool = Pool(url, {})
        try:
            return await server_of("sparse", url).ask(pool, "Hello", 4)
        finally:
            pool.close()

    with pytest.raises(PeerError, match="sparse gave 503"):
        asyncio.run(ask())


def test_a_server_that_is_gone_or_refuses_is_named(serve_app: ServeApp) -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    def complete() -> Response:
        return Response("too long", 400)

    refusing = server_of("sparse", serve_app(app))
    with pytest.raises(PeerError, match="sparse gave 400: too long"):
        refusing.nats_of([7, 5])
    gone = server_of("gone", "http://127.0.0.1:9")
    with pytest.raises(PeerError, match=r"gone did not answer: ConnectError\("):
        gone.prompt_tokens("Hello")
    with pytest.raises(PeerError, match="gone did not answer: connect_error"):
        asyncio.run(gone.ask(Pool(gone.url, {}), "Hello", 4))


def test_ratios_favour_the_last_of_ours(decode: Process) -> None:
    def timing(ttft_s: float, tpot_s: float) -> RequestTiming:
        return RequestTiming(0.0, (ttft_s,), ttft_s + tpot_s, 2)

    servers: list[compare.Peer] = [server_of("dense", ""), server_of("sparse", ""), decode]
    found = {
        "dense": Found([[timing(0.2, 0.03)], [timing(0.2, 0.03)]], [50.0, 50.0]),
        "sparse": Found([[timing(0.1, 0.01)], [timing(0.1, 0.01)]], [100.0, 100.0]),
        decode.name: Found([[timing(0.4, 0.005)], [timing(0.4, 0.005)]], [25.0, 25.0]),
    }
    result = compare.summary(servers, found, 8)
    assert result["compared"] == "sparse"
    rival = result["servers"][decode.name]
    assert (rival["weight_bytes"], rival["ttft_ms"]) == (4, 400.0)
    assert rival["title"] == "llama.cpp's decode, q8_0"
    assert rival["ttft_speedup"] == pytest.approx({"ratio": 4.0, "low": 4.0, "high": 4.0})
    assert rival["tpot_speedup"]["ratio"] == pytest.approx(0.5)
    assert (rival["tokens_per_s_8"], rival["throughput_speedup"]["ratio"]) == (25.0, 4.0)
    dense = result["servers"]["dense"]
    assert dense["tpot_speedup"]["ratio"] == pytest.approx(3.0)
    assert (dense["tokens_per_s_8"], dense["throughput_speedup"]["ratio"]) == (50.0, 2.0)
    assert result["servers"]["sparse"]["tpot_speedup"]["ratio"] == pytest.approx(1.0)


def test_many_at_once_come_after_those_one_at_a_time(serve: Serve, decode: Process) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001))
    servers: list[compare.Peer] = [server_of("ours", url), decode]
    plan = compare.Plan(rounds=1, prompts=1, at_once=3, prompt_words=8, output_tokens=4)
    found = asyncio.run(compare.measure(servers, plan))
    assert all(found["ours"].tokens_per_s)
    assert all(found[decode.name].tokens_per_s)
    prompts = [prompt for _, prompt in app.state.requests]
    assert len(prompts) == len(set(prompts)) == 8


def test_vllm_tells_the_likelihood_of_a_block(serve_app: ServeApp) -> None:
    asked = []
    app = FastAPI()

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        found = [None, {"5": {"logprob": -1.5}}, {"9": {"logprob": -0.25}}]
        return {"choices": [{"prompt_logprobs": found}]}

    assert server_of("sparse", serve_app(app)).nats_of([7, 5, 9]) == 1.75
    body = {"model": "sparse", "prompt": [7, 5, 9], "max_tokens": 1, "prompt_logprobs": 0}
    assert asked == [body]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": 0}, "--prompts 0 is too small; give at least 1"),
        ({"output_tokens": 1}, "--output-tokens 1 is too small; give at least 2"),
        (
            {"blocks": 1, "block_size": 256, "context": 256},
            "--block-size 256 must be less than --context 256; give at most 255",
        ),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.Plan(**given)


def test_llamas_decode_takes_turns_with_servers_on_the_same_prompts(
    serve: Serve, decode: Process
) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001))
    found = asyncio.run(compare.measure([server_of("ours", url), decode], PLAN))
    assert [len(timings) for timings in found[decode.name].timings] == [2, 2]
    timing = found[decode.name].timings[0][0]
    assert (len(timing.token_events_s), timing.output_tokens) == (4, 4)
    assert len(decode.core_shares) == 6
    prompts = [prompt for _, prompt in app.state.requests]
    logged = decode.log.read_text().splitlines()
    assert len(prompts) == 6
    assert [line for line in logged if line.startswith("prompt: ")] == [
        f"prompt: {prompt!r}" for prompt in prompts
    ]


@pytest.mark.parametrize(("shares", "is_warned"), [([0.9, 0.9, 1.0], True), ([0.96], False)])
def test_a_core_that_others_used_is_told(
    decode: Process, capsys: pytest.CaptureFixture[str], shares: list[float], is_warned: bool
) -> None:
    decode.core_shares.extend(shares)
    timings = [[RequestTiming(0.0, (0.1,), 0.2, 2)]] * 2
    result = compare.summary([decode], {decode.name: Found(timings)}, 0)
    assert result["servers"][decode.name]["core_share"] == shares[0]
    compare.warn_of_others(result)
    told = "one peer had only 90% of" in capsys.readouterr().err
    assert told == is_warned


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    path = tmp_path / "q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    writer.add_tensor("b", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    models = [("dense", model), ("q8_0:native", path), ("q8_0:openvino", path)]
    assert compare.files_of(models) == {
        "dense": {"config.json": hashlib.sha256(b"{}").hexdigest()},
        "q8_0.gguf": {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "weights_by_type": {"F16": 128, "F32": 64},
        },
    }


def test_where_a_record_is_from_is_stamped_first(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_of: LoadOf
) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001))
    app.add_api_route("/metrics", lambda: Response())
    monkeypatch.setattr(Server, "prompt_tokens", lambda *_: 8)  # the mock streams every answer
    monkeypatch.setattr(compare, "running", lambda name, *_: nullcontext(server_of(name, url)))
    check_stamp = load_of(app.state.requests)
    with_core = replace(PLAN, cores=str(min(os.sched_getaffinity(0))))
    before = os.sched_getaffinity(0)
    rounds: list[dict[str, Any]] = []
    try:
        found = compare.compare([("ours", tmp_path)], with_core, on_round=rounds.append)
    finally:
        os.sched_setaffinity(0, before)
    check_stamp(found)
    assert [each["num_rounds"] for each in rounds] == [1, 2]
    last, ended = rounds[-1]["servers"], found["servers"]
    for servers in (last, ended):
        assert servers["ours"].pop("memory_bytes") > 1e6  # this process's, a little later
    assert last == ended
    assert found["machine"]["load_average"][1] == len(app.state.requests)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "no-such-folder/peers.json"], "--out no-such-folder/peers.json cannot be"),
        (["--peers", "q8_0:fa"], "peer 'q8_0:fa' is not known; write one of q8_0:native"),
        (["--model", "dense=no-such-folder"], "--model dense=no-such-folder is not a directory"),
        (["--blocks", "2"], "perplexity needs --text FILE, --blocks NUMBER and a --model NAME=DIR"),
        (["--rounds", "0"], "--rounds 0 is too small; give at least 1"),
        (["--peers", "", "--cores", "99"], "cores 99 are not available to this process"),
    ],
)
def test_wrong_use_is_told_before_the_work(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    for module, work in ((files, "install"), (compare, "compare")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("it went to work"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
