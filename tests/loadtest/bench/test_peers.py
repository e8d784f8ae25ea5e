"""What of the comparison with llama.cpp needs no llama.cpp: asking, taking turns, ratios."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from cast_serve.latency import RequestTiming
from loadtest.bench import peers
from loadtest.bench.llama import Decode, PeerError
from loadtest.mock_server import MockVariant
from loadtest.send.connection import Pool
from tests.loadtest.conftest import Serve

ROOT = Path(__file__).parents[3]
PLAN = peers.Plan(rounds=2, prompts=2, prompt_words=8, output_tokens=4)


def server_of(name: str, url: str, *, is_ours: bool = True) -> peers.Server:
    return peers.Server(name, f"vLLM, {name}", url, 1000, is_ours, {"ignore_eos": True})


def test_every_server_gets_the_same_prompts_in_turned_order(serve: Serve) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001), rival=MockVariant(0.0, 0.001))
    servers = [server_of("ours", url), server_of("rival", url, is_ours=False)]
    found = asyncio.run(peers.measure(servers, PLAN))
    assert {name: [len(timings) for timings in rounds] for name, rounds in found.items()} == {
        "ours": [2, 2],  # without the first, which warms up
        "rival": [2, 2],
    }
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


def test_ratios_favour_the_last_of_ours() -> None:
    def timing(ttft_s: float, tpot_s: float) -> RequestTiming:
        return RequestTiming(0.0, (ttft_s,), ttft_s + tpot_s, 2)

    servers = [server_of("dense", ""), server_of("sparse", ""), server_of("q", "", is_ours=False)]
    found = {
        "dense": [[timing(0.2, 0.03)], [timing(0.2, 0.03)]],
        "sparse": [[timing(0.1, 0.01)], [timing(0.1, 0.01)]],
        "q": [[timing(0.4, 0.005)], [timing(0.4, 0.005)]],
    }
    result = peers.summary(servers, found)
    assert result["compared"] == "sparse"
    rival = result["servers"]["q"]
    assert (rival["title"], rival["weight_bytes"], rival["ttft_s"]) == ("vLLM, q", 1000, 0.4)
    assert rival["ttft_speedup"] == pytest.approx({"ratio": 4.0, "low": 4.0, "high": 4.0})
    assert rival["tpot_speedup"]["ratio"] == pytest.approx(0.5)
    assert result["servers"]["dense"]["tpot_speedup"]["ratio"] == pytest.approx(3.0)
    assert result["servers"]["sparse"]["tpot_speedup"]["ratio"] == pytest.approx(1.0)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="a name is given twice: dense, dense"):
        peers.compare([("dense", tmp_path), ("dense", tmp_path)], PLAN)


def test_llamas_decode_takes_turns_with_servers_on_the_same_prompts(
    serve: Serve, decode: Decode
) -> None:
    url, app = serve(ours=MockVariant(0.0, 0.001))
    found = asyncio.run(peers.measure([server_of("ours", url), decode], PLAN))
    assert [len(timings) for timings in found[decode.name]] == [2, 2]
    timing = found[decode.name][0][0]
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
    decode: Decode, capsys: pytest.CaptureFixture[str], shares: list[float], is_warned: bool
) -> None:
    decode.core_shares.extend(shares)
    result = peers.summary([decode], {decode.name: [[RequestTiming(0.0, (0.1,), 0.2, 2)]] * 2})
    assert result["servers"][decode.name]["core_share"] == shares[0]
    peers.warn_of_others(result)
    told = "a process had only 90% of the core, which others used, too" in capsys.readouterr().err
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
    models = [("dense", model), ("q8_0", path), ("q8_0:native", path)]
    assert peers.files_of(models) == {
        "dense": {"config.json": hashlib.sha256(b"{}").hexdigest()},
        "q8_0.gguf": {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "weights_by_type": {"F16": 128, "F32": 64},
        },
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "no-such-folder/peers.json"], "--out no-such-folder/peers.json cannot be"),
        (["--peers", "q8_0:fa"], "peer 'q8_0:fa' is not known; write TYPE"),
        (["--model", "dense=no-such-folder"], "--model dense=no-such-folder is no directory"),
    ],
)
def test_wrong_use_is_told_before_the_work(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/compare-peers", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "$" not in done.stderr  # it ran nothing
