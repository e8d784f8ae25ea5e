import asyncio
from contextlib import AsyncExitStack

import pytest

from cast_serve.admission import Admission
from cast_serve.errors import APIError


def test_first_come_first_served_and_a_full_queue_is_429() -> None:
    async def scenario() -> None:
        admission = Admission(lambda: 1, max_queued=2)
        order: list[int] = []
        doors = [asyncio.Event() for _ in range(3)]

        async def request(number: int) -> None:
            async with admission.place(10):
                order.append(number)
                await doors[number].wait()

        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(request(number)))
            await asyncio.sleep(0)
        assert (admission.num_running, admission.num_queued) == (1, 2)
        with pytest.raises(APIError) as caught:
            async with admission.place(10):
                pass
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"] == "3"  # 3 to go, at 1 a second until measured
        for number in range(3):
            doors[number].set()
            await tasks[number]
        assert order == [0, 1, 2]
        assert (admission.num_running, admission.num_queued) == (0, 0)

    asyncio.run(scenario())


def test_who_gives_up_leaves_the_queue_in_order() -> None:
    async def scenario() -> None:
        admission = Admission(lambda: 1, max_queued=5)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(admission.place(1))
            with pytest.raises(APIError) as caught:
                async with admission.place(0.01):
                    pass
            assert caught.value.status == 504
            left = asyncio.create_task(admission.place(10).__aenter__())
            await asyncio.sleep(0.01)
            assert admission.num_queued == 1
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            assert admission.num_queued == 0
        async with admission.place(1):  # no place was lost
            assert admission.num_running == 1

    asyncio.run(scenario())


def test_a_new_replica_brings_places() -> None:
    async def scenario() -> None:
        places = 0
        admission = Admission(lambda: places, max_queued=5)
        door = asyncio.Event()

        async def request() -> None:
            async with admission.place(10):
                await door.wait()

        requests = [asyncio.create_task(request()) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert (admission.num_running, admission.num_queued) == (0, 3)
        places = 2
        admission.admit()
        assert (admission.num_running, admission.num_queued) == (2, 1)
        door.set()
        await asyncio.gather(*requests)

    asyncio.run(scenario())


def test_retry_after_is_backlog_over_rate() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        admission = Admission(lambda: 1, max_queued=100, clock=lambda: now)
        for _ in range(5):
            now += 4.0
            async with admission.place(1):
                pass
        assert admission.retry_after_s() == 4  # 5 in 16 s: 1 to go needs 3.2 s

    asyncio.run(scenario())
