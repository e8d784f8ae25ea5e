import asyncio

import pytest

from loadtest.bench.gateway.added import measure
from loadtest.mock_server import MockVariant
from tests.loadtest.conftest import Serve


def test_what_the_longer_way_adds(serve: Serve) -> None:
    gateway, _ = serve(sparse=MockVariant(ttft_s=0.03, itl_s=0.004))
    worker, _ = serve(sparse=MockVariant(ttft_s=0.01, itl_s=0.002))
    found = asyncio.run(measure(gateway, worker, "sparse", 4, 8, 6))
    assert found["pairs"] == 4
    assert found["added_ttft_ms"] == pytest.approx(20, abs=5)
    assert found["tpot_ratio"] == pytest.approx(2, abs=0.4)
    low, middle, high = found["added_ttft_ms_quartiles"]
    assert low <= middle <= high
    assert found["ttft_ms_p95"]["gateway"] > found["ttft_ms_p95"]["worker"] >= 10


def test_a_request_that_fails_is_named(serve: Serve) -> None:
    gateway, _ = serve(sparse=MockVariant(ttft_s=0.0, itl_s=0.0, fail_every=1))
    worker, _ = serve(sparse=MockVariant(ttft_s=0.0, itl_s=0.0))
    with pytest.raises(RuntimeError, match="a request to the gateway failed: http_503"):
        asyncio.run(measure(gateway, worker, "sparse", 2, 8, 2))


@pytest.mark.parametrize(("pairs", "output_tokens"), [(1, 8), (8, 1)])
def test_too_few_are_refused(pairs: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="ask for 2 of each or more"):
        asyncio.run(measure("http://a", "http://b", "sparse", pairs, 8, output_tokens))
