"""The order of blocks, who gets which prompts, and plans that are refused."""

import asyncio
from dataclasses import asdict, replace
from typing import Any

import pytest

from loadtest.mock_server import MockVariant
from loadtest.record import Recorded, Request
from loadtest.send.client import Client, Sent
from loadtest.send.distribution import Distribution
from loadtest.send.paired import Harness, Plan, check_fit, part_of, run_paired, sized, worst
from loadtest.send.schedule import Schedule
from loadtest.send.trace import Arrival
from loadtest.send.workload import Workload
from tests.loadtest.conftest import Serve

QUICK = MockVariant(ttft_s=0.0, itl_s=0.0)
PLAN = Plan(num_prompts=3, num_block_pairs=2, num_warmup=1)
SHORT = Workload(prompt_words=Distribution("5"), output_tokens=Distribution("4"), run_number=1)
CLOSED = Schedule()


def arrivals(*times_s: float) -> tuple[Arrival, ...]:
    return tuple(Arrival(time_s, None, None) for time_s in times_s)


def run(
    url: str,
    plan: Plan = PLAN,
    workload: Workload | None = None,
    schedule: Schedule = CLOSED,
) -> Recorded:
    async def measure() -> Recorded:
        async with Client(url, timeout_s=30.0) as client:
            return await run_paired(client, plan, workload or SHORT, schedule=schedule)

    return asyncio.run(measure())


def test_what_the_server_saw(serve: Serve) -> None:
    url, app = serve(dense=QUICK, sparse=QUICK)
    paired = run(url)
    order = [("dense", 0, 0), ("sparse", 0, 0)]  # variant, pass, prompt
    order += [("dense", 1, n) for n in (1, 2, 3)] + [("sparse", 2, n) for n in (1, 2, 3)]
    order += [("sparse", 3, n) for n in (4, 5, 6)] + [("dense", 4, n) for n in (4, 5, 6)]
    assert app.state.requests == [
        (variant, SHORT.prompt(index, pass_number)) for variant, pass_number, index in order
    ]
    assert len(order) == PLAN.num_conversations
    assert len(paired.warmup) == 2
    assert paired.about["plan"] == asdict(PLAN)
    assert (paired.about["schedule"], paired.about["rate_per_s"]) == ("closed", None)
    # Blocks in the order run, and times from the run's start, which is the warm-up's.
    assert [(b.variant, b.block_pair) for b in paired.blocks] == [
        (variant, pair) for pair, variant in PLAN.block_order()
    ]
    starts_s = [paired.warmup[0].intended_send_s, *(b.started_s for b in paired.blocks)]
    assert starts_s[0] == 0.0
    assert starts_s == sorted(starts_s)


def test_several_candidates_share_the_blocks_of_the_baseline(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK, draft=QUICK)
    both = run(url, replace(PLAN, others=("draft",)))
    assert len(both.requests) == replace(PLAN, others=("draft",)).num_conversations
    order = ["dense", "sparse", "draft"]
    assert [block.variant for block in both.blocks] == order + order[::-1]
    for candidate, other in (("sparse", "draft"), ("draft", "sparse")):
        requests, about = part_of(candidate, both.requests, both.about)
        part = Recorded(about, tuple(requests))
        assert part.variants == ("dense", candidate)
        assert about["plan"]["others"] == [other]
        # In the order of a run of the two.
        assert [(block.block_pair, block.variant) for block in part.blocks] == Plan(
            candidate=candidate, num_block_pairs=2
        ).block_order()
        sent = [each.sent_s for each in both.requests if each.variant in ("dense", candidate)]
        assert [each.sent_s for each in requests] == sent


def test_a_plan_goes_on_two_block_pairs_at_a_time(serve: Serve) -> None:
    url, _ = serve(dense=QUICK, sparse=QUICK)
    sizes: list[int] = []
    recorded: list[int] = []

    def goes_on() -> bool:
        return len(sizes) < 3

    async def measure() -> Recorded:
        async with Client(url, timeout_s=30.0) as client:
            return await run_paired(
                client,
                PLAN,
                SHORT,
                on_plan=lambda plan: sizes.append(plan.num_block_pairs),
                on_sent=lambda requests, about: recorded.append(about["plan"]["num_block_pairs"]),
                goes_on=goes_on,
            )

    run = asyncio.run(measure())
    assert sizes == [2, 4, 6]
    assert recorded == [2] * 6 + [4] * 4 + [6] * 4
    assert run.about["plan"]["num_block_pairs"] == 6
    longer = replace(PLAN, num_block_pairs=6)
    assert [(b.block_pair, b.variant) for b in run.blocks] == longer.block_order()
    sent = [{r.prompt_index for r in pair[0].requests} for pair in run.pairs]
    assert len(set.union(*sent)) == 6 * 3  # no pair has another's prompts


def test_a_failed_warmup_measures_nothing(serve: Serve) -> None:
    url, app = serve(dense=QUICK, sparse=MockVariant(0.0, 0.0, fail_every=1))
    paired = run(url)
    assert paired.blocks == []
    assert [request.error for request in paired.warmup] == [None, "http_503"]
    assert len(app.state.requests) == 2


def late(slip_s: float, ttft_s: float | None, ended_s: float) -> Request:
    failed = ttft_s is None
    return Request(
        block=None,
        block_pair=None,
        variant="dense",
        prompt_index=0,
        error="timeout" if failed else None,
        prompt_tokens=None,
        output_tokens=None if failed else 1,
        intended_send_s=0.0,
        sent_s=slip_s,
        token_events_s=() if ttft_s is None else (ttft_s,),
        last_s=ttft_s,
        ended_s=ended_s,
    )


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
    block = (late(slip_s, ttft_s, ended_s=5.0),)
    harness = Harness.of([Sent(0.0, block, (2.0, 0.0)), Sent(0.0, block, (2.0, cpu_s))])
    assert harness.num_processes == 2
    assert harness.slip_p99_s == pytest.approx(slip_s)
    assert harness.cpu_share == pytest.approx(max(4.0, cpu_s) / 10)
    assert harness.is_void == (why is not None)
    assert harness.why is None if why is None else why in (harness.why or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": "dense"}, "'dense' twice"),
        ({"others": ("a", "sparse")}, "'sparse' twice"),
        ({"concurrency": 0}, "--concurrency 0 is too small; give at least 1"),
        ({"concurrency": 9}, "--num-prompts 3 is too small; give at least 9 to keep"),
        ({"num_block_pairs": 0}, "--blocks 0 is too small"),
        ({"num_block_pairs": 3}, "--blocks 3 is odd.*give 4"),
        ({"num_warmup": 0}, "--warmup 0 is too small"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_a_trace_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="--num-prompts 3 is more than the 2 times"):
        check_fit(PLAN, Schedule("trace", trace=arrivals(0.0, 1.0)), 1)


def test_a_block_keeps_up_its_load_for_as_long_as_asked(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.02, 0.0), sparse=MockVariant(0.02, 0.0))
    plan = replace(PLAN, num_prompts=None, block_s=0.4, concurrency=2)
    paired = run(url, plan=plan)
    # A request takes 20 ms and a little, so two places need up to 40 prompts for 0.4 s.
    num_prompts = paired.about["plan"]["num_prompts"]
    assert 8 < num_prompts <= 40
    assert {len(block.requests) for block in paired.blocks} == {num_prompts}
    assert len(paired.warmup) == 2 * 2  # as many as are in flight


@pytest.mark.parametrize(
    ("schedule", "num_prompts"),
    [
        (Schedule("poisson", 3.0), 30),
        (Schedule("ramp", 1.0, 3.0), 20),
        (Schedule("constant", 0.1), 8),
        (Schedule("trace", trace=arrivals(0.0, 0.5, 0.9)), 3),
    ],
)
def test_the_size_of_a_block_in_an_open_loop(schedule: Schedule, num_prompts: int) -> None:
    plan = replace(PLAN, num_prompts=None, block_s=10.0)
    assert sized(plan, schedule, []).num_prompts == num_prompts
    assert sized(replace(plan, num_prompts=5), schedule, []).num_prompts == 5


def test_the_harness_that_kept_up_worst_speaks_for_all_launches() -> None:
    good = {"is_void": False, "slip_p99_s": 0.01}
    better, bad = {**good, "slip_p99_s": 0.001}, {"is_void": True, "slip_p99_s": 0.0}
    assert worst([better, good]) == good
    assert worst([bad, good]) == bad
