"""httpx's way to a worker, with three of its properties changed.

- A worker that is lost is an httpx error. anyio reads the address of a connection that it has just
  opened; on uvloop, if the worker has closed it by then, that is an AttributeError or an OSError,
  which httpx passes on as it is (anyio 4.16).
- A time-out is for the whole answer. httpx's own is for each piece of it: a worker that sends a
  byte now and then would hold up a health check, or a scrape of the metrics, for ever.
- An answer has a size at most, and comes as it is: httpx would unpack 16 MB from 16 kB.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx

MAX_BYTES = 16 << 20  # of an answer; vLLM's /metrics has some 100 kB


class WorkerTransport(httpx.AsyncHTTPTransport):
    """As its base, but for these three."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        timeout_s = request.extensions.get("timeout", {}).get("read")
        begun_s = asyncio.get_running_loop().time()
        try:
            response = await super().handle_async_request(request)
        except (AttributeError, OSError) as error:
            raise httpx.ConnectError(f"closed while it was opened: {error!r}") from error
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            await response.aclose()
            raise httpx.RemoteProtocolError(f"an answer encoded as {encoding[:50]!r}, not as asked")
        assert isinstance(response.stream, httpx.AsyncByteStream)
        until_s = None if timeout_s is None else begun_s + timeout_s
        response.stream = _Bounded(response.stream, until_s)
        return response


class _Bounded(httpx.AsyncByteStream):
    """A body that must be whole by a time of the event loop's, and have `MAX_BYTES` at most."""

    def __init__(self, stream: httpx.AsyncByteStream, until_s: float | None) -> None:
        self._stream = stream
        self._until_s = until_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        num_left = MAX_BYTES
        while True:
            try:
                async with asyncio.timeout_at(self._until_s):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise httpx.ReadTimeout("the answer was not whole in time") from None
            num_left -= len(piece)
            if num_left < 0:
                raise httpx.RemoteProtocolError(f"the answer has more than {MAX_BYTES} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
