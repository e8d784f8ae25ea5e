"""A reading counts what a fake worker sent, and refuses answers that are not whole."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.gateway import fake_worker
from benchmarks.gateway.fake_worker import Load
from benchmarks.gateway.reading import Reading, Stream
from benchmarks.gateway.ways import Way
from loadtest.send.connection import Pool

LOAD = Load(3, 2)


def token(sent_s: float) -> bytes:
    return b'data: {"choices":[{"text":" %017.6f"}]}\n\n' % sent_s


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def against_worker(ask: Callable[[Pool], Awaitable[None]]) -> None:
    """Runs `ask` with a pool of connections to a fake worker."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        serving = asyncio.create_task(fake_worker.serve(port))
        pool = Pool(f"http://127.0.0.1:{port}", {})
        try:
            async with asyncio.timeout(20):
                while not is_listening(port):
                    assert not serving.done(), serving.exception()
                    await asyncio.sleep(0.01)
                await ask(pool)
        finally:
            pool.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(run())


def test_streams_begin_together_and_every_token_is_counted_once() -> None:
    seen: list[list[float]] = [[], [], []]

    async def ask(pool: Pool) -> None:
        begun_s = time.perf_counter()
        streams = [
            Stream(lambda _, sent_s, __, sent=sent: sent.append(sent_s))  # type: ignore[misc]
            for sent in seen
        ]
        first = [asyncio.create_task(each.read(pool, LOAD, 5)) for each in streams[:2]]
        await asyncio.sleep(0.05)
        assert seen == [[], [], []]  # the third is not there yet
        await asyncio.gather(*first, streams[2].read(pool, LOAD, 5))
        assert seen[0] == seen[1] == seen[2]  # one step is one moment
        assert len(set(seen[0])) == 5
        assert begun_s + 0.05 < seen[0][0] < seen[0][-1] < time.perf_counter()

    against_worker(ask)


def test_a_stream_that_lacks_tokens_is_an_error() -> None:
    async def ask(pool: Pool) -> None:
        streams = [Stream(lambda *_: None) for _ in range(3)]
        streams[0].feed(token(1.0))  # so that it counts one more than was asked for
        await asyncio.gather(*(each.read(pool, LOAD, 3) for each in streams))

    with pytest.raises(RuntimeError, match="3x2ms: status 200, 4 of 3 tokens"):
        against_worker(ask)


@pytest.mark.parametrize("late", [token(1.0), b"data: [DONE]\n\n" + token(3.0)])
def test_tokens_out_of_order_or_after_the_end_are_an_error(late: bytes) -> None:
    stream = Stream(lambda *_: None)
    stream.feed(token(2.0))
    with pytest.raises(RuntimeError, match="out of order"):
        stream.feed(late)


def test_the_cpu_time_is_that_of_the_way() -> None:
    clock = iter([5.0, 7.0])

    async def ask(pool: Pool) -> None:
        way = Way("", lambda: next(clock))
        seen = await Reading(LOAD, 5, way).run(pool)
        assert seen.cpu_s == 2.0
        assert 3 <= len(seen.delays_s) <= 3 * 3 + 1  # the second to the last but one of each
        assert seen.cpu_us == pytest.approx(2e6 / len(seen.delays_s))
        assert all(delay_s > 0 for delay_s in seen.delays_s)

    against_worker(ask)
