"""The harness against a mock that notes itself when it did what: `GET /truth`.

No bound here is a time that a machine must keep: a time stamp of the harness is right if it lies
between two of the mock's, on the one clock that both read. What is slow makes both late.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loadtest.mock_server import MockVariant
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from loadtest.send.distribution import Distribution
from loadtest.send.paired import Plan, run_paired
from loadtest.send.schedule import Schedule
from loadtest.send.workload import Workload
from tests.loadtest.conftest import Serve, conversations

StartMock = Callable[..., str]


@pytest.fixture
def start_mock() -> Iterator[StartMock]:
    """`url = start_mock("dense=0.1,0.01", ...)`: a mock in a process of its own, as for a user."""
    running = []

    def start(*variants: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        options = [word for variant in variants for word in ("--variant", variant)]
        command = [sys.executable, "-m", "loadtest.mock_server", *options, "--port", str(port)]
        process = subprocess.Popen(command)
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except urllib.error.URLError:
                time.sleep(0.05)

    yield start
    for process in running:
        process.terminate()
        process.wait()


class RememberingClient(Client):
    """Keeps what it sent: on the clock that the mock reads too, where a record has its own."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout_s=300.0)
        self.sent: list[Sent] = []

    async def send(self, *arguments: Any, **more: Any) -> Sent:
        self.sent.append(await super().send(*arguments, **more))
        return self.sent[-1]


SHORT = Workload(prompt_words=Distribution("8"), output_tokens=Distribution("2"))


def run(
    url: str,
    plan: Plan,
    schedule: Schedule,
    on_response: Callable[[], None] = lambda: None,
    workload: Workload = SHORT,
) -> tuple[dict[str, Any], list[Sent]]:
    """Returns what the run says about its harness, and what was sent in each block."""

    async def measure() -> tuple[dict[str, Any], list[Sent]]:
        async with RememberingClient(url) as client:
            recorded = await run_paired(client, plan, workload, on_response, schedule)
            return recorded.about["harness"], client.sent[2:]  # without the warm-ups

    return asyncio.run(measure())


def told(url: str) -> dict[str, Any]:
    """The mock's `Truth`, as JSON."""
    with urllib.request.urlopen(f"{url}/truth", timeout=60) as response:
        return dict(json.load(response))


def answers_by_request(url: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the mock did, by variant and prompt, which no two requests share."""
    answers = told(url)["answers"]
    found = {(answer["variant"], answer["prompt"]): answer for answer in answers}
    assert len(found) == len(answers)
    return found


@pytest.mark.parametrize(
    ("concurrency", "dense_s", "sparse_s"),
    [
        (1, (0.1, 0.03), (0.05, 0.02)),
        (16, (0.2, 0.04), (0.1, 0.03)),
        (128, (0.4, 0.12), (0.3, 0.1)),
    ],
)
def test_each_time_stamp_lies_where_the_server_allows_it(
    start_mock: StartMock,
    concurrency: int,
    dense_s: tuple[float, float],
    sparse_s: tuple[float, float],
) -> None:
    nominal_s = {"dense": dense_s, "sparse": sparse_s}
    url = start_mock(*(f"{name}={ttft_s},{itl_s}" for name, (ttft_s, itl_s) in nominal_s.items()))
    plan = Plan(
        concurrency=concurrency,
        num_prompts=max(concurrency, 4),
        num_block_pairs=2,
        num_warmup=1,
    )
    workload = Workload(prompt_words=Distribution("8"), output_tokens=Distribution("9"))
    _, blocks = run(url, plan, Schedule(), workload=workload)
    answers = answers_by_request(url)
    seen_in_time = []
    for number, block in enumerate(blocks, start=1):
        assert len(block.requests) == plan.num_prompts
        block_answers = [
            answers[request.variant, str(workload.prompt(request.prompt_index, number))]
            for request in block.requests
        ]
        for request, answer in zip(block.requests, block_answers, strict=True):
            ttft_s, itl_s = nominal_s[request.variant]
            assert request.error is None
            assert request.timing is not None
            # Its clock starts before the server hears of the request.
            assert request.timing.intended_send_s <= request.sent_s <= answer["arrived_s"]
            seen_s = request.timing.token_events_s
            assert len(seen_s) == len(answer["sent_s"]) == 9
            assert all(sent <= seen for sent, seen in zip(answer["sent_s"], seen_s, strict=True))
            # So what it measures is never less than what the server was told to take.
            assert (request.timing.ttft_s or 0.0) >= ttft_s
            assert request.timing.e2e_s >= ttft_s + 8 * itl_s
            # And, for most tokens, too much by less than the server waits before the next.
            next_s = answer["sent_s"][1:]
            seen_in_time += [seen < sent for seen, sent in zip(seen_s, next_s, strict=False)]
        if concurrency == 1:  # the next request leaves when one is over: its end is bounded too
            for request, later in zip(block.requests, block_answers[1:], strict=False):
                assert request.timing is not None
                assert request.timing.last_s <= request.ended_s <= later["arrived_s"]
    assert len(seen_in_time) == 4 * (plan.num_prompts or 0) * 8
    assert sum(seen_in_time) > len(seen_in_time) / 2


def send(url: str, batch: Batch) -> Sent:
    async def measure() -> Sent:
        async with Client(url, timeout_s=300.0) as client:
            return await client.send(batch)

    return asyncio.run(measure())


def test_a_stall_shows_in_all_requests_that_were_due_during_it(serve: Serve) -> None:
    """The server freezes for 1.5 s, one second after the first of 80 requests, due every 50 ms."""
    variant = MockVariant(ttft_s=0.02, itl_s=0.001)
    eighty = conversations((f"a b {number}" for number in range(80)), 2)
    due_s = Schedule("constant", 20.0).times_s(80)
    assert due_s is not None
    url, app = serve(dense=variant, stall_s=(1.0, 2.5))
    sent = send(url, Batch("dense", eighty, 1, due_s))
    frozen_s, thawed_s = app.state.truth.frozen_s
    num_held_up = 0
    for request, after_s in zip(sent.requests, due_s, strict=True):
        assert request.timing is not None
        intended_s = sent.started_s + after_s
        assert request.timing.intended_send_s == pytest.approx(intended_s, abs=1e-6)
        if frozen_s <= intended_s < thawed_s:
            num_held_up += 1
            assert intended_s + (request.timing.ttft_s or 0.0) >= thawed_s
    assert num_held_up > 1

    # A closed loop sends nothing meanwhile: one request meets the stall, the others never know.
    url, app = serve(dense=variant, stall_s=(1.0, 2.5))
    closed = send(url, Batch("dense", eighty, 1))
    _, thawed_s = app.state.truth.frozen_s
    assert sum(r.sent_s < thawed_s <= r.ended_s for r in closed.requests) == 1
    assert max(request.ended_s for request in closed.requests) > thawed_s


PLAN = Plan(num_prompts=30, num_block_pairs=2, num_warmup=1)


def test_a_harness_that_cannot_keep_up_voids_the_run_and_an_idle_one_is_less_late(
    serve: Serve,
) -> None:
    """Each response costs the client 20 ms, and 100 are due a second: it can do 50 at most."""
    url, _ = serve(dense=MockVariant(0.005, 0.001), sparse=MockVariant(0.005, 0.001))

    def work() -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass

    overloaded, _ = run(url, PLAN, Schedule("constant", 100.0), work)
    assert overloaded["is_void"]
    assert "ms late" in overloaded["why"]
    idle, _ = run(url, PLAN, Schedule("poisson", 30.0))
    assert 0 < idle["slip_p99_s"] < overloaded["slip_p99_s"]
    assert 0 < idle["cpu_share"] < overloaded["cpu_share"]
