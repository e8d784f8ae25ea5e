"""Several client processes: one timetable, one result, and no quiet loss."""

import asyncio

import pytest

from loadtest.mock_server import MockVariant
from loadtest.send.batch import Batch
from loadtest.send.client import Sent
from loadtest.send.processes import Processes
from tests.loadtest.conftest import Serve, conversations

PROMPTS = [f"prompt {number}" for number in range(10)]
TEN = conversations(PROMPTS, 2)


def send(url: str, *batches: Batch, num_processes: int = 2) -> list[Sent]:
    async def measure() -> list[Sent]:
        async with Processes(num_processes, url, timeout_s=30.0) as processes:
            return [await processes.send(batch) for batch in batches]

    return asyncio.run(measure())


def test_two_processes_send_a_timetable_and_then_a_closed_loop(serve: Serve) -> None:
    url, app = serve(dense=MockVariant(0.01, 0.0))
    due_s = tuple(0.03 * number for number in range(10))
    opened, closed = send(url, Batch("dense", TEN, 1, due_s), Batch("dense", TEN, concurrency=3))
    for sent in (opened, closed):
        assert [request.prompt_index for request in sent.requests] == list(range(10))
        assert [request.error for request in sent.requests] == [None] * 10
        assert len(sent.cpu_s) == 2
        assert min(sent.cpu_s) > 0
    assert sorted(app.state.requests) == sorted(2 * [("dense", prompt) for prompt in PROMPTS])
    # The clocks of the processes and ours are one: nobody is ahead of the timetable.
    intended_s = [request.intended_send_s - opened.started_s for request in opened.requests]
    assert intended_s == pytest.approx(due_s)
    assert all(request.sent_s >= request.intended_send_s for request in opened.requests)


def test_a_dead_process_is_named(serve: Serve) -> None:
    url, _ = serve(dense=MockVariant(0.0, 0.0))

    async def measure() -> None:
        async with Processes(2, url, timeout_s=30.0) as processes:
            batch = Batch("dense", TEN, concurrency=2)
            await processes.send(batch)
            processes._processes[1].kill()
            processes._processes[1].join()
            await processes.send(batch)

    with pytest.raises(ChildProcessError, match="a client process died"):
        asyncio.run(measure())


def test_no_process_is_refused() -> None:
    with pytest.raises(ValueError, match="--processes 0 is too small; give at least 1"):
        Processes(0, "http://127.0.0.1:1", timeout_s=1.0)
