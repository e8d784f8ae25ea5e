"""The mock keeps to what it was told; the truth it tells is judged in test_truth.py."""

import asyncio
import itertools
import random

import pytest
import typer

from loadtest.mock_server import MockVariant, main
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from tests.loadtest.conftest import Serve, conversations


def send(url: str, num: int, concurrency: int, tokens: int = 2, timeout_s: float = 30.0) -> Sent:
    async def measure() -> Sent:
        async with Client(url, timeout_s=timeout_s) as client:
            batch = Batch("dense", conversations(num * ["a b c"], tokens), concurrency)
            return await client.send(batch)

    return asyncio.run(measure())


@pytest.mark.parametrize("text", ["a", "a=0.1", "a=b,c", "a=1,2,3"])
def test_wrong_latencies_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not TTFT_S,ITL_S"):
        main([text])


def test_noise_multiplies_by_seeded_lognormal_factors(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(0.05, 0.02, noise=0.5, seed=4))
    send(url, num=20, concurrency=1)
    answers = app.state.truth.answers
    assert len(answers) == 20
    for number, answer in enumerate(answers, start=1):
        rng = random.Random(f"4/dense/{number}")
        ttft_s, itl_s = (median_s * rng.lognormvariate(0.0, 0.5) for median_s in (0.05, 0.02))
        first_s, second_s = answer.due_s
        assert first_s - answer.arrived_s == pytest.approx(ttft_s)
        assert second_s - first_s == pytest.approx(itl_s)


def test_max_concurrency_makes_requests_wait_their_turn(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.1, 0.0, max_concurrency=2))
    requests = send(url, num=6, concurrency=6).requests
    ttfts_s = sorted(request.timing.ttft_s or 0.0 for request in requests if request.timing)
    assert len(ttfts_s) == 6
    # Never early: two at once, then two after these, then two more.
    assert ttfts_s[2] >= 0.2
    assert ttfts_s[4] >= 0.3


def test_a_client_that_leaves_frees_its_place(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.0, 0.05, max_concurrency=1))
    gone = send(url, num=1, concurrency=1, tokens=10_000, timeout_s=0.2).requests[0]
    assert gone.error == "timeout"  # all its tokens would take 500 s
    assert send(url, num=1, concurrency=1, timeout_s=100.0).requests[0].error is None


def test_a_stall_holds_up_tokens_under_way_and_new_requests(serve: Serve) -> None:
    """Tokens are due every 0.1 s; the stall from 0.25 to 0.75 s pushes the third to 0.8 s."""
    url, app = serve(dense=MockVariant(0.1, 0.1), stall_s=(0.25, 0.75))
    send(url, num=1, concurrency=1, tokens=8)
    (answer,) = app.state.truth.answers
    gaps_s = [later - due for due, later in itertools.pairwise([answer.arrived_s, *answer.due_s])]
    assert gaps_s == pytest.approx([0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1])
    began_s, ended_s = app.state.truth.frozen_s
    assert not [sent_s for sent_s in answer.sent_s if began_s < sent_s < ended_s]
