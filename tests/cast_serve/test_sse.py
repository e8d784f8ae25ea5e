import pytest
from hypothesis import given
from hypothesis import strategies as some

from cast_serve import sse

STREAM = b': hello\n\nevent: x\ndata: {"a": 1}\r\n\r\ndata:two\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b"two", sse.DONE]


@given(cuts=some.sets(some.integers(1, len(STREAM) - 1)))
def test_events_are_the_same_however_the_bytes_arrive(cuts: set[int]) -> None:
    ends = [*sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    reader = sse.Reader()
    assert [data for piece in pieces for data in reader.feed(piece)] == EVENTS


def test_what_is_written_is_read() -> None:
    assert sse.Reader().feed(sse.event(b"x") + sse.event(sse.DONE)) == [b"x", sse.DONE]


def test_an_event_that_is_not_whole_is_waited_for() -> None:
    reader = sse.Reader()
    assert reader.feed(b"data: x") == []
    assert reader.feed(b"y\n") == [b"xy"]


def test_an_event_without_end_is_refused() -> None:
    reader = sse.Reader()
    for _ in range(sse.MAX_EVENT_BYTES >> 20):
        assert reader.feed(b"x" * (1 << 20)) == []
    with pytest.raises(ValueError, match="longer than 16777216 bytes"):
        reader.feed(b"x")
