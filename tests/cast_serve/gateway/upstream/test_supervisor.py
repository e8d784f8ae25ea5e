"""The watch over workers: starts, deaths, restarts, and what it tells."""

import asyncio
import errno
import json
import logging
import os
import signal

import pytest

from cast_serve.errors import VariantError
from cast_serve.gateway.app import Gateway
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import supervisor
from cast_serve.gateway.upstream.client import Client
from cast_serve.gateway.upstream.probes import Limits
from cast_serve.gateway.upstream.replica import Replica, note_failure, start_worker
from tests.cast_serve.gateway.upstream.scripted_worker import Worker, is_running, watching

pytestmark = pytest.mark.anyio


async def test_limits_are_read_before_a_worker_is_up(remotes: list[Worker]) -> None:
    silent, talkative = remotes
    cards = [{"id": "adapter", "max_model_len": 1}, {"id": "sparse", "max_model_len": 2048}]
    talkative.set("models", json.dumps({"data": cards}))
    talkative.set("metrics", "cast_worker_vocabulary_size 49152.0\ncast_worker_step_seconds 0.5\n")
    silent.set("metrics", "<html>")
    limits: dict[str, Limits] = {}

    def note(replica: Replica) -> None:
        if replica.is_up:
            limits[replica.variant] = replica.limits

    async with watching(*remotes, on_change=note) as watch:
        await watch.until(lambda: len(limits) == 2)
    assert limits == {"dense": Limits(), "sparse": Limits(2048, 49152, 0.5)}


async def test_a_replica_that_does_not_answer_keeps_no_other_waiting(
    remotes: list[Worker],
) -> None:
    slow, quick = remotes
    slow.set("hold")
    async with watching(slow, quick) as watch:
        await watch.until(lambda: slow.lines("looks"))
        await watch.until(lambda: quick.replica.is_up)
        assert not slow.replica.is_up
        slow.clear("hold")
        await watch.until(lambda: slow.replica.is_up)


async def test_a_worker_that_dies_is_restarted_after_growing_pauses(
    local: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    url = local.replica.url
    async with watching(local) as watch:
        for num_restarts in range(4):
            if num_restarts == 3:
                monkeypatch.setattr(supervisor, "STEADY_S", 0)
            await watch.until(lambda: local.replica.is_up)
            os.kill(local.pid, signal.SIGKILL)
            await watch.until(lambda count=num_restarts: local.replica.num_restarts > count)
        await watch.until(lambda: local.replica.is_up)
    assert local.replica.url == url
    assert watch.told[:4] == [
        *(("sparse", False, 0), ("sparse", True, 0)),
        *(("sparse", False, 0), ("sparse", False, 1)),
    ]
    ends = [text for text in caplog.messages if "ended with -9" in text]
    assert [text.partition("restart in ")[2].split(" s")[0] for text in ends] == [
        *("0.05", "0.1", "0.2"),
        "0.05",  # it was up long enough
    ]
    assert ends[0].endswith("its log: worker starts")
    assert "\n" not in "".join(ends)


async def test_what_a_dead_worker_left_behind_is_killed(local: Worker) -> None:
    local.set("child")
    async with watching(local) as watch:
        await watch.until(lambda: local.replica.is_up)
        child = int(local.lines("children")[0])
        assert is_running(child)
        os.kill(local.pid, signal.SIGKILL)
        await watch.until(lambda: local.replica.num_restarts)
        assert not is_running(child)


async def test_a_worker_that_ends_before_it_was_up_is_not_restarted(local: Worker) -> None:
    local.set("fail")
    async with watching(local) as watch:
        with pytest.raises(VariantError, match="variant sparse at .* ended with 1; ") as error:
            await watch.until(lambda: False)
    assert str(error.value).endswith("its log says:\nworker starts\nno such model")


async def test_a_worker_that_takes_too_long_to_start_is_given_up(local: Worker) -> None:
    local.set("unhealthy")
    async with watching(local, startup_timeout_s=1) as watch:
        with pytest.raises(VariantError, match="did not answer within 1 s"):
            await watch.until(lambda: False)


async def test_a_worker_that_loads_is_looked_at_however_long_the_interval_is(
    local: Worker,
) -> None:
    local.set("unhealthy")
    async with watching(local, interval_s=900) as watch:
        await watch.until(lambda: local.lines("looks"))
        local.clear("unhealthy")
        await watch.until(lambda: local.replica.is_up)


async def test_a_worker_that_does_not_come_back_is_given_up(local: Worker) -> None:
    async with watching(local) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("fail")
        os.kill(local.pid, signal.SIGKILL)
        with pytest.raises(VariantError, match=r"ended with 1 \(5 starts in a row failed\)"):
            await watch.until(lambda: False)
    assert local.replica.num_restarts == 5


async def test_a_noted_failure_lasts_until_a_look_that_began_after_it(
    remotes: list[Worker],
) -> None:
    worker, _ = remotes
    num_looks_when_up: list[int] = []

    def note(replica: Replica) -> None:
        if replica.is_up:
            num_looks_when_up.append(len(worker.lines("looks")))

    async with watching(worker, on_change=note) as watch:
        await watch.until(lambda: worker.replica.is_up)
        worker.set("hold")
        num_looks = len(worker.lines("looks"))
        await watch.until(lambda: len(worker.lines("looks")) > num_looks)
        num_looks = len(worker.lines("looks"))
        note_failure(worker.replica)
        assert worker.variant.pick() is None
        worker.clear("hold")
        await watch.until(lambda: worker.replica.is_up)
    assert len(num_looks_when_up) == 2
    assert num_looks_when_up[1] > num_looks


async def test_every_noted_failure_and_return_is_told(remotes: list[Worker]) -> None:
    worker, _ = remotes
    async with watching(worker) as watch:
        for num_failures in range(5):
            await watch.until(lambda n=num_failures: len(watch.told) == 2 * n + 2)
            note_failure(worker.replica)
        await watch.until(lambda: len(watch.told) == 12)
    assert watch.told == [("dense", False, 0), ("dense", True, 0)] * 6


async def test_a_worker_is_up_once_it_has_answered_and_may_take_its_time(local: Worker) -> None:
    """A first answer that takes longer than a hang may is no reason to end it, nor to ask it."""
    local.set("hang")
    async with watching(local, hang_timeout_s=0.3) as watch:
        await watch.until(lambda: local.lines("canaries"))
        await asyncio.sleep(1)
        assert watch.told == [("sparse", False, 0)]
        local.clear("hang")
        await watch.until(lambda: local.replica.is_up)
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]
    assert len(local.lines("canaries")) >= 1


async def test_a_worker_that_never_answers_is_given_up(local: Worker) -> None:
    local.set("hang")
    async with watching(local, startup_timeout_s=1, hang_timeout_s=0.1) as watch:
        with pytest.raises(VariantError, match=r"within 1 s \(CAST_STARTUP_TIMEOUT_S\)"):
            await watch.until(lambda: False)


async def test_a_restart_that_fails_for_want_of_memory_is_tried_again(
    local: Worker, remotes: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = remotes
    num_failures = 0

    def start(replica: Replica) -> None:
        nonlocal num_failures
        if num_failures < 2:
            num_failures += 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        start_worker(replica)

    async with watching(local, other) as watch:
        await watch.until(lambda: local.replica.is_up and other.replica.is_up)
        monkeypatch.setattr(supervisor, "start_worker", start)
        os.kill(local.pid, signal.SIGKILL)
        await watch.until(lambda: num_failures == 2 and local.replica.is_up)
        assert local.replica.num_restarts == 1
        other.set("unhealthy")
        await watch.until(lambda: not other.replica.is_up)


async def test_a_fault_of_the_watch_ends_neither_it_nor_the_worker(
    local: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_healthy = supervisor.probes.is_healthy
    num_faults = 0

    async def faulty(client: Client, url: str) -> bool:
        nonlocal num_faults
        if local.replica.is_up and num_faults < 3:
            num_faults += 1
            raise KeyError("of ours")
        return await is_healthy(client, url)

    monkeypatch.setattr(supervisor.probes, "is_healthy", faulty)
    async with watching(local) as watch:
        await watch.until(lambda: num_faults == 3)
        local.set("unhealthy")
        await watch.until(lambda: not local.replica.is_up)
    assert local.replica.num_restarts == 0
    assert caplog.text.count("watching it failed") == 3


async def test_a_gateway_whose_watch_ends_has_failed(
    remotes: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def watch(*_: object, **__: object) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(supervisor.Supervisor, "run", watch)
    gateway = Gateway([worker.variant for worker in remotes], GatewaySettings())
    ended = asyncio.Event()
    await gateway.watch(ended.set)
    assert ended.is_set()
    assert "RuntimeError('gone')" in str(gateway.failure)
    await gateway.close()
