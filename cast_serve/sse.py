"""Bytes of a stream -> the data of its server-sent events: the only reader.

Of the format only what OpenAI's servers send is read: one line ``data: ...`` an event.
"""

from collections.abc import AsyncIterator

DONE = b"[DONE]"  # the last event's data


class Reader:
    """Cuts pieces of any size, as they arrive, into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that is whole now."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:")]


async def data_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event of a stream."""
    reader = Reader()
    async for piece in pieces:
        for data in reader.feed(piece):
            yield data


def event(data: bytes) -> bytes:
    """The event that holds the data."""
    return b"data: " + data + b"\n\n"
