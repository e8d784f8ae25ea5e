"""What of the comparison with llama.cpp needs no llama.cpp: asking, taking turns, ratios."""

import asyncio

import pytest

from cast_serve.latency import RequestTiming
from loadtest.bench import peers
from loadtest.mock_server import MockVariant
from loadtest.send.connection import Pool
from tests.loadtest.conftest import Serve

PLAN = peers.Plan(rounds=2, prompts=2, prompt_words=8, output_tokens=4)


def server_of(name: str, url: str, *, is_ours: bool = True) -> peers.Server:
    return peers.Server(name, url, 1000, is_ours, {"ignore_eos": True})


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

    with pytest.raises(peers.PeerError, match="sparse gave 503"):
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
    assert (rival["weight_bytes"], rival["ttft_s"]) == (1000, 0.4)
    assert rival["ttft_speedup"] == pytest.approx({"ratio": 4.0, "low": 4.0, "high": 4.0})
    assert rival["tpot_speedup"]["ratio"] == pytest.approx(0.5)
    assert result["servers"]["dense"]["tpot_speedup"]["ratio"] == pytest.approx(3.0)
    assert result["servers"]["sparse"]["tpot_speedup"]["ratio"] == pytest.approx(1.0)


def test_an_unknown_type_of_peer_is_named() -> None:
    with pytest.raises(peers.PeerError, match="'q5' is no type of peer; choose from q4_1, q8_0"):
        peers.gguf("q5")
