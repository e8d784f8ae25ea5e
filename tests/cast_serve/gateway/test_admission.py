import asyncio
import random

import pytest

from cast_serve.gateway.admission import Admission
from cast_serve.gateway.api.errors import APIError


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


@pytest.mark.parametrize("is_late", [False, True])
def test_a_turn_that_comes_as_its_client_leaves_is_no_ones_error(is_late: bool) -> None:
    """The place is given back in the same pass of the loop in which the next in line leaves."""

    async def scenario() -> None:
        admission = Admission(lambda: 1, max_queued=5)
        first, second, third = (admission.place(10) for _ in range(3))
        await first.__aenter__()
        leaving = asyncio.create_task(second.__aenter__())
        waiting = asyncio.create_task(third.__aenter__())
        await asyncio.sleep(0.01)
        if is_late:  # its turn has come, and it does not know yet
            await first.__aexit__(None, None, None)
            leaving.cancel()
        else:
            leaving.cancel()
            await first.__aexit__(None, None, None)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.wait_for(waiting, 1)
        assert (admission.num_running, admission.num_queued) == (1, 0)
        await third.__aexit__(None, None, None)
        assert admission.num_running == 0

    asyncio.run(scenario())


def test_clients_that_leave_around_their_turn_take_no_place_along() -> None:
    """3,000 clients before one place, half of which leave at a time of their own."""

    async def scenario() -> None:
        admission = Admission(lambda: 1, max_queued=5000)
        chance = random.Random(0)
        answered = 0

        async def request() -> None:
            nonlocal answered
            async with admission.place(chance.choice([0.05, 30])):
                await asyncio.sleep(0)
            answered += 1

        tasks = [asyncio.create_task(request()) for _ in range(3000)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            # Right behind who has the place stand those whose turn is about to come.
            queued = [task for task in tasks if not task.done()][:4]
            for task in queued:
                if chance.random() < 0.3:
                    task.cancel()
        ends = [task.exception() for task in tasks if not task.cancelled()]
        assert all(end is None or isinstance(end, APIError) for end in ends), set(map(repr, ends))
        assert 0 < answered < 3000
        assert (admission.num_running, admission.num_queued) == (0, 0)
        for _ in range(20):
            async with admission.place(1):
                pass

    asyncio.run(scenario())


def test_retry_after_is_backlog_over_the_rate_while_at_work() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        admission = Admission(lambda: 1, max_queued=100, clock=lambda: now)
        for _ in range(5):
            async with admission.place(1):
                now += 4.0
            now += 1000.0  # nobody asks for anything
        assert admission.retry_after_s() == 4  # one every 4 s

    asyncio.run(scenario())
