"""A worker's metrics as they come: relabelled, refused, and never all at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cast_serve.gateway.upstream.client import MAX_REPLY_BYTES, Client
from cast_serve.gateway.upstream.exposition import (
    SLICE_BYTES,
    ExpositionError,
    Family,
    merged,
    read_families,
    read_sums,
)
from tests.cast_serve.gateway.stack import running
from tests.cast_serve.gateway.upstream.scripted_worker import closing
from tests.cast_serve.gateway.upstream.test_questions import server

LABELS = {"replica": "0", "variant": 'a "b" \\c'}
TEXT = b"""\
# HELP vllm:latency_seconds How long.
# TYPE vllm:latency_seconds histogram
vllm:latency_seconds_bucket{le="0.5",model="x"} 1.0
vllm:latency_seconds_bucket{le="+Inf",model="x"} 2.0
vllm:latency_seconds_sum{model="x"} 1.5
vllm:latency_seconds_count{model="x"} 2.0

# a comment
# HELP vllm:running Requests.
# TYPE vllm:running gauge
vllm:running{model="a,variant=\\"}",variant="own"} 3 1700000000000
vllm:running{} NaN
bare 1e-3
# TYPE python_info gauge
python_info{version="3"} 1.0
"""


@asynccontextmanager
async def worker(content: bytes, status: str = "200 OK") -> AsyncIterator[tuple[Client, str]]:
    """A client, and the URL of a worker with these metrics."""
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    async with server(answer) as url, closing(Client()) as client:
        yield client, url


async def families_of(content: bytes) -> dict[bytes, Family]:
    async with worker(content) as (client, url):
        return await read_families(client, url, LABELS, 20)


def exposed(*contents: bytes) -> str:
    return merged(asyncio.run(families_of(content)) for content in contents).decode()


def test_every_sample_gets_the_labels_and_keeps_its_value() -> None:
    before = list(text_string_to_metric_families(TEXT.decode()))
    after = list(text_string_to_metric_families(exposed(TEXT)))
    assert [family.name for family in after] == [family.name for family in before[:-1]]
    assert [family.type for family in after] == [family.type for family in before[:-1]]
    assert [family.documentation for family in after] == [f.documentation for f in before[:-1]]
    for was, found in zip(before, after, strict=False):
        for sample, other in zip(was.samples, found.samples, strict=True):
            assert other.labels == {**sample.labels, **LABELS}
            assert (other.name, other.timestamp) == (sample.name, sample.timestamp)
            assert repr(other.value) == repr(sample.value)


def test_the_metrics_of_two_workers_are_described_once() -> None:
    text = exposed(TEXT, TEXT)
    lines = text.splitlines()
    assert lines.count("# TYPE vllm:running gauge") == 1
    assert lines.count("# HELP vllm:latency_seconds How long.") == 1
    (running,) = [f for f in text_string_to_metric_families(text) if f.name == "vllm:running"]
    assert len(running.samples) == 4


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"{{{{",
            b"a b c d",
            b'x{y="',
            b"# TYPE x y z",
            b"\0\x01",
            b"x 1e",
            b"x",
            b"x{} ",
            b"1x 1",
        ),
        *(b'x{y="\\z"} 1', b'x{y="a"b="c"} 1', b"# TYPE x", b"# HELP 1x y", b"x 1 2.5", b"x 0x10"),
        *(b'x{y="\xff"} 1', b"# HELP x \xff", b"x 1_0", b'x{y="a"} 1 2 3', b"# TYPE x info"),
    ],
)
def test_what_prometheus_would_refuse_is_refused(line: bytes) -> None:
    with pytest.raises(ExpositionError, match="is not Prometheus's text format"):
        asyncio.run(families_of(TEXT + line + b"\n"))


def test_values_are_summed_over_labels() -> None:
    async def read(content: bytes, status: str = "200 OK") -> dict[str, float]:
        async with worker(content, status) as (client, url):
            return await read_sums(client, url, ("a", "b", "c"), 20)

    assert asyncio.run(read(b'a{x="1"} 1\na{x="2"} 2\nbb 9\nb garbage\nc 4')) == {"a": 3.0, "c": 4}
    assert asyncio.run(read(b"a 1\n", "401 X")) == {}


def test_others_have_their_turn_while_a_large_text_is_read() -> None:
    """However much comes at once; here a turn is a slice's."""
    num_turns = 0

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def read(content: bytes) -> None:
        counting = asyncio.create_task(count_turns())
        await families_of(content)
        async with worker(content) as (client, url):
            await read_sums(client, url, ("a",), 20)
        counting.cancel()

    content = TEXT * (3_000_000 // len(TEXT))
    asyncio.run(read(content))
    assert num_turns >= 2 * len(content) // SLICE_BYTES


def test_a_worker_with_too_much_to_say_is_left_out() -> None:
    with running() as stack:
        stack.workers["sparse"].state.metrics = TEXT.decode() * (MAX_REPLY_BYTES // len(TEXT) + 1)
        text = stack.client.get("/metrics").text
        assert len(text) < MAX_REPLY_BYTES
        assert 'variant="dense"} 3.0' in text
        assert "vllm:latency" not in text
        stack.workers["sparse"].state.metrics = TEXT.decode()
        assert "vllm:latency" in stack.client.get("/metrics").text
