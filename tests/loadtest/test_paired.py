"""The order of blocks, who gets which prompts, and plans that are refused."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from loadtest.client import Client
from loadtest.mock import MockVariant
from loadtest.paired import PairedRun, Plan, run_paired
from loadtest.workload import Workload
from tests.loadtest.conftest import Serve

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)
PLAN = Plan(num_prompts=3, num_block_pairs=2, num_warmup=1, output_tokens=4)


def run(url: str, plan: Plan = PLAN, workload: Workload | None = None) -> PairedRun:
    async def measure() -> PairedRun:
        async with Client(url, concurrency=plan.concurrency, timeout_s=30.0) as client:
            return await run_paired(client, plan, workload or Workload(prompt_words=5))

    return asyncio.run(measure())


def test_blocks_run_in_abba_order() -> None:
    order = Plan("a", "b", num_block_pairs=4).block_order()
    assert "".join(variant for _, variant in order) == "abbaabba"
    assert [pair for pair, _ in order] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_the_server_saw(serve: Serve) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    workload = Workload(prompt_words=5, run_number=1)
    paired = run(url, workload=workload)
    numbers = {workload.prompt(index): index for index in range(10)}
    seen = [(variant, numbers[prompt]) for variant, prompt in app.state.requests]
    warmup = [("dense", 0), ("sparse", 0)]
    pair_0 = [("dense", n) for n in (1, 2, 3)] + [("sparse", n) for n in (1, 2, 3)]
    pair_1 = [("sparse", n) for n in (4, 5, 6)] + [("dense", n) for n in (4, 5, 6)]
    assert seen == warmup + pair_0 + pair_1
    assert len(seen) == PLAN.num_requests
    assert [block.output_tokens for block in paired.blocks] == [12] * 4
    assert len(paired.warmup) == 2
    assert not paired.unequal_lengths()


def test_concurrency_keeps_that_many_in_flight(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.05, 0.0), sparse=MockVariant(0.05, 0.0))
    block = run(url, replace(PLAN, concurrency=3)).blocks[0]
    timings = [outcome.timing for outcome in block.outcomes]
    assert all(timings)
    latest_send = max(timing.intended_send_s for timing in timings if timing)
    assert latest_send < min(timing.last_s for timing in timings if timing)
    assert [outcome.prompt_index for outcome in block.outcomes] == [1, 2, 3]


def test_a_failed_warmup_measures_nothing(serve: Serve) -> None:
    url, app = serve(dense=QUICK, sparse=MockVariant(0.0, 0.0, fail_every=1))
    paired = run(url)
    assert paired.blocks == ()
    assert [outcome.error for outcome in paired.warmup] == [None, "http_503"]
    assert len(app.state.requests) == 2


def test_unequal_lengths_are_found(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=MockVariant(0.0, 0.0, missing_tokens=1))
    unequal = run(url).unequal_lengths()
    assert {outcome.variant for outcome in unequal} == {"sparse"}
    assert len(unequal) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": "dense"}, "both 'dense'"),
        ({"concurrency": 0}, "--concurrency 0 is too small; give at least 1"),
        ({"concurrency": 9}, "--num-prompts 3 is too small; give at least 9 to keep"),
        ({"num_block_pairs": 0}, "--blocks 0 is too small"),
        ({"num_block_pairs": 3}, "--blocks 3 is odd.*give 4"),
        ({"num_warmup": 0}, "--warmup 0 is too small"),
        ({"output_tokens": 1}, "--output-tokens 1 is too small; give at least 2"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)
