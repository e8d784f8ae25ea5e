"""The order of blocks, who gets which prompts, and plans that are refused."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cast_serve.latency import RequestTiming
from loadtest.mock_server import MockVariant
from loadtest.send.client import Client, Outcome
from loadtest.send.paired import Block, Harness, PairedRun, Plan, check_fit, run_paired
from loadtest.send.schedule import Schedule
from loadtest.send.workload import Workload
from tests.loadtest.conftest import Serve

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)
PLAN = Plan(num_prompts=3, num_block_pairs=2, num_warmup=1, output_tokens=4)
CLOSED = Schedule()


def run(
    url: str,
    plan: Plan = PLAN,
    workload: Workload | None = None,
    schedule: Schedule = CLOSED,
) -> PairedRun:
    async def measure() -> PairedRun:
        async with Client(url, timeout_s=30.0) as client:
            return await run_paired(
                client, plan, workload or Workload(prompt_words=5), schedule=schedule
            )

    return asyncio.run(measure())


def test_blocks_run_in_abba_order() -> None:
    order = Plan("a", "b", num_block_pairs=4).block_order()
    assert "".join(variant for _, variant in order) == "abbaabba"
    assert [pair for pair, _ in order] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_the_server_saw(serve: Serve) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    workload = Workload(prompt_words=5, run_number=1)
    paired = run(url, workload=workload)
    order = [("dense", 0, 0), ("sparse", 0, 0)]  # variant, pass, prompt
    order += [("dense", 1, n) for n in (1, 2, 3)] + [("sparse", 2, n) for n in (1, 2, 3)]
    order += [("sparse", 3, n) for n in (4, 5, 6)] + [("dense", 4, n) for n in (4, 5, 6)]
    assert app.state.requests == [
        (variant, workload.prompt(index, pass_number)) for variant, pass_number, index in order
    ]
    assert len(order) == PLAN.num_requests
    assert len(paired.warmup) == 2
    assert paired.schedule == "closed"


def test_both_blocks_of_a_pair_have_one_timetable(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)
    paired = run(url, schedule=Schedule("poisson", rate_per_s=100.0))
    times_s = [
        [outcome.intended_send_s - block.started_s for outcome in block.outcomes]
        for block in paired.blocks
    ]
    assert times_s[0] == pytest.approx(times_s[1])
    assert times_s[2] == pytest.approx(times_s[3])
    assert times_s[0] != pytest.approx(times_s[2])
    assert (paired.schedule, paired.rate_per_s) == ("poisson", 100.0)


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


def late(slip_s: float, ttft_s: float | None) -> Outcome:
    timing = None if ttft_s is None else RequestTiming(0.0, (ttft_s,), ttft_s, 1)
    return Outcome("dense", 0, timing, None, None if timing else "timeout", 0.0, slip_s, 9.0)


@pytest.mark.parametrize(
    ("slip_s", "ttft_s", "cpu_s", "why"),
    [
        (0.009, 0.01, 1.0, None),
        (0.011, 0.01, 1.0, "left 11.0 ms late, limit 10.0; raise --processes above 2"),
        (0.049, 1.0, 1.0, None),  # 5 % of the median TTFT is more than 10 ms
        (0.051, 1.0, 1.0, "left 51.0 ms late, limit 50.0;"),
        (0.011, None, 1.0, "left 11.0 ms late, limit 10.0;"),
        (0.0, 0.01, 8.9, None),
        (0.0, 0.01, 9.1, "used 0.91 of a core, limit 0.9;"),
        (0.5, 0.01, 9.1, "left 500.0 ms late, limit 10.0 and a client process used 0.91"),
    ],
)
def test_a_harness_that_does_not_keep_up_voids_the_run(
    slip_s: float, ttft_s: float | None, cpu_s: float, why: str | None
) -> None:
    # Two blocks of 5 s; the busier of two processes has all its CPU time in the second.
    blocks = [Block(0, "dense", 5.0 * n, 5.0 * n + 5.0, (late(slip_s, ttft_s),)) for n in (0, 1)]
    harness = Harness.of(blocks, [(2.0, 0.0), (2.0, cpu_s)])
    assert harness.num_processes == 2
    assert harness.slip_p99_s == pytest.approx(slip_s)
    assert harness.cpu_share == pytest.approx(max(4.0, cpu_s) / 10)
    assert harness.is_void == (why is not None)
    assert harness.why is None if why is None else why in (harness.why or "")


def test_slip_is_a_99th_percentile() -> None:
    # Ranks 0 to 200, of which 199 and 200 are late: the 99th percentile is rank 198.
    outcomes = tuple(late(0.1 if place > 198 else 0.0, 0.01) for place in range(201))
    assert Harness.of([Block(0, "dense", 0.0, 1.0, outcomes)], [(0.1,)]).slip_p99_s == 0


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


@pytest.mark.parametrize(
    ("schedule", "num_processes", "message"),
    [
        (Schedule(), 2, "--processes 2 is more than --concurrency 1, .* give at most 1"),
        (Schedule("constant", 1.0), 4, "--processes 4 is more than --num-prompts 3"),
        (Schedule("trace", trace_s=(0.0, 1.0)), 1, "--num-prompts 3 is more than the 2 times"),
    ],
)
def test_what_does_not_go_together_is_refused(
    schedule: Schedule, num_processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fit(PLAN, schedule, num_processes)
