"""Bytes of a stream -> the data of its server-sent events: the only reader.

Of the format only what OpenAI's servers send is read: one line ``data: ...`` an event.
"""

DONE = b"[DONE]"  # the last event's data
MAX_EVENT_BYTES = 16 << 20  # of one that has not ended; a token with 20 logprobs has some thousand


class Reader:
    """Cuts pieces of any size, as they arrive, into events."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # joined only when a line ends, so that a long one is cheap
        self._num_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that is whole now.

        Raises:
            ValueError: if one is longer than `MAX_EVENT_BYTES`.
        """
        self._rest.append(piece)
        self._num_bytes += len(piece)
        if b"\n" not in piece:
            if self._num_bytes > MAX_EVENT_BYTES:
                raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
            return []
        *lines, rest = b"".join(self._rest).split(b"\n")
        self._rest, self._num_bytes = [rest], len(rest)
        return [line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:")]


def event(data: bytes) -> bytes:
    """The event that holds the data."""
    return b"data: " + data + b"\n\n"
