"""Workers that are there and do not answer: canaries, and when one hangs."""

import asyncio
import json
import os
import signal
import time

import pytest

from tests.cast_serve.gateway.upstream.scripted_worker import Worker, is_running, watching

pytestmark = pytest.mark.anyio


async def test_a_stopped_worker_is_killed_and_restarted(local: Worker) -> None:
    async with watching(local, hang_timeout_s=2) as watch:
        await watch.until(lambda: local.replica.is_up)
        stopped = local.pid
        os.kill(stopped, signal.SIGSTOP)
        await watch.until(lambda: not is_running(stopped))
        await watch.until(lambda: local.replica.is_up and local.replica.num_restarts)


@pytest.mark.parametrize("trouble", ["hang", "status"])
async def test_a_healthy_worker_that_answers_no_completion_is_restarted(
    local: Worker, trouble: str
) -> None:
    local.set("metrics", "vllm:generation_tokens_total 5.0\n")
    async with watching(local, hang_timeout_s=1) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set(trouble, "500")
        await watch.until(lambda: ("sparse", False, 1) in watch.told)
        local.clear(trouble)
        await watch.until(lambda: local.replica.is_up)
    down = watch.told.index(("sparse", False, 0), 1)
    assert watch.told[:down] == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_remote_replica_that_hangs_is_down_until_it_answers(remotes: list[Worker]) -> None:
    worker, _ = remotes
    async with watching(worker, hang_timeout_s=2) as watch:
        await watch.until(lambda: worker.replica.is_up)
        worker.set("hang")
        await watch.until(lambda: not worker.replica.is_up)
        num_canaries = len(worker.lines("canaries"))
        await watch.until(lambda: len(worker.lines("canaries")) > num_canaries)
        assert not worker.replica.is_up  # for all its good /health
        worker.clear("hang")
        await watch.until(lambda: worker.replica.is_up)
    assert worker.replica.num_restarts == 0


@pytest.mark.parametrize(
    "counter",
    [
        'vllm:iteration_tokens_total_count{engine="0"}',
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:kv_cache_usage_perc",  # alone, while a long prompt is computed in chunks
    ],
)
async def test_a_worker_whose_counters_move_is_busy_and_not_hung(
    local: Worker, counter: str
) -> None:
    local.set("metrics", f"{counter} NUM_READS\n")
    async with watching(local, hang_timeout_s=0.5) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        num_canaries = len(local.lines("canaries"))
        await watch.until(lambda: len(local.lines("canaries")) >= num_canaries + 3)
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_worker_that_finishes_requests_during_a_canary_is_not_hung(local: Worker) -> None:
    async with watching(local, hang_timeout_s=0.5) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        before = len(local.lines("canaries"))
        for num_canaries in range(1, 4):
            await watch.until(lambda n=num_canaries: len(local.lines("canaries")) >= before + n)
            local.replica.num_received += 1
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_canary_is_one_token_and_no_traffic_and_any_refusal_is_progress(
    local: Worker,
) -> None:
    local.set("status", "400")
    async with watching(local, hang_timeout_s=5) as watch:
        await watch.until(lambda: len(local.lines("canaries")) >= 3)
    assert json.loads(local.lines("canaries")[0]) == {
        **{"model": "sparse", "prompt": "a"},
        "max_tokens": 1,
    }
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]
    assert (local.replica.num_outstanding, local.replica.num_received) == (0, 0)


async def test_there_is_no_canary_while_requests_finish(local: Worker) -> None:
    async def finish() -> None:
        while True:
            local.replica.num_received += 1
            await asyncio.sleep(0.001)

    async with watching(local) as watch:
        traffic = asyncio.create_task(finish())
        await watch.until(lambda: local.replica.is_up)
        num_looks = len(local.lines("looks"))
        await watch.until(lambda: len(local.lines("looks")) >= num_looks + 10)
        assert len(local.lines("canaries")) == 1  # the one that it came up with
        traffic.cancel()
        await watch.until(lambda: len(local.lines("canaries")) > 1)


async def test_the_hang_limit_is_that_of_the_machines_own_step(
    local: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    local.set("metrics", "cast_worker_step_seconds 0.2\n")
    async with watching(local, hang_timeout_s=0.1) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        begun_s = time.monotonic()
        await watch.until(lambda: not local.replica.is_up)
        assert time.monotonic() - begun_s >= 2
    assert "made no progress for 2 s (CAST_HANG_TIMEOUT_S is 0.1 s, raised to 10" in caplog.text
