import asyncio

import pytest

from benchmarks.gateway.added import measure
from loadtest.mock_server import MockVariant
from loadtest.record import Request
from loadtest.send.client import Client
from loadtest.send.workload import Prompt
from tests.benchmarks.conftest import LoadOf
from tests.loadtest.conftest import Serve
from tests.loadtest.recordings import request


def test_the_figures_of_timings_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the gateway adds 1 to 19 ms and multiplies TPOT by 1.1 to 2.9."""
    number_of = [7 * pair % 19 + 1 for pair in range(19)]  # 1 to 19, in no order
    asked: list[tuple[str, int, int]] = []

    async def complete(
        self: Client, variant: str, pair: int, prompt: Prompt, output_tokens: int
    ) -> Request:
        way, number = self.url.removeprefix("http://"), number_of[pair]
        asked.append((way, pair, output_tokens))
        ttft_s, tpot_s = 0.05 if pair % 2 else 0.01, 0.001 * (1 + pair)
        if way == "gateway":
            ttft_s, tpot_s = ttft_s + 0.001 * number, tpot_s * (1 + number / 10)
        return request(None, None, variant, ttft_s, tpot_s, output_tokens=output_tokens)

    monkeypatch.setattr(Client, "complete", complete)
    found = asyncio.run(measure("http://gateway", "http://worker", "sparse", 19, 8, 6))
    assert found["pairs"] == 19
    assert found["added_ttft_ms"] == pytest.approx(10)
    assert found["added_ttft_ms_quartiles"] == pytest.approx([5, 10, 15])
    assert found["tpot_ratio"] == pytest.approx(2)
    assert found["tpot_ratio_quartiles"] == pytest.approx([1.5, 2, 2.5])
    # Between the 18th and the 19th, a tenth of the way.
    *_, second, first = sorted(number_of[1::2])
    assert found["ttft_ms_p95"] == pytest.approx(
        {"gateway": 50 + second + 0.1 * (first - second), "worker": 50}
    )
    # Each pair is warmed up, and its order turned.
    assert asked[:6] == [
        *(("worker", 0, 2), ("worker", 0, 6), ("gateway", 0, 6)),
        *(("worker", 1, 2), ("gateway", 1, 6), ("worker", 1, 6)),
    ]


def test_what_the_longer_way_adds(serve: Serve, load_of: LoadOf) -> None:
    gateway, server = serve(sparse=MockVariant(ttft_s=0.05, itl_s=0.01))
    worker, _ = serve(sparse=MockVariant(ttft_s=0.01, itl_s=0.002))
    check_stamp = load_of(server.state.requests)
    found = asyncio.run(measure(gateway, worker, "sparse", 4, 8, 6))
    check_stamp(found)
    assert found["pairs"] == 4
    assert found["added_ttft_ms"] > 0
    assert found["tpot_ratio"] > 1
    low, middle, high = found["added_ttft_ms_quartiles"]
    assert low <= middle <= high


def test_a_request_that_fails_is_named(serve: Serve) -> None:
    gateway, _ = serve(sparse=MockVariant(ttft_s=0.0, itl_s=0.0, fail_every=1))
    worker, _ = serve(sparse=MockVariant(ttft_s=0.0, itl_s=0.0))
    with pytest.raises(RuntimeError, match="a request to the gateway failed: http_503"):
        asyncio.run(measure(gateway, worker, "sparse", 2, 8, 2))


@pytest.mark.parametrize(("pairs", "output_tokens"), [(1, 8), (8, 1)])
def test_too_few_are_refused(pairs: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="ask for 2 of each or more"):
        asyncio.run(measure("http://a", "http://b", "sparse", pairs, 8, output_tokens))
