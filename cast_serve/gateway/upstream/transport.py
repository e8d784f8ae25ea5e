"""httpx's way to a worker, with two of its properties changed.

- A worker that is lost is an httpx error. anyio reads the address of a connection that it has just
  opened; on uvloop, if the worker has closed it by then, that is an AttributeError or an OSError,
  which httpx passes on as it is (anyio 4.16).
- A time-out is for the whole answer. httpx's own is for each piece of it: a worker that sends a
  byte now and then would hold up a health check, or a scrape of the metrics, for ever.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx


class WorkerTransport(httpx.AsyncHTTPTransport):
    """As its base, but for these two."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout_s = request.extensions.get("timeout", {}).get("read")
        begun_s = asyncio.get_running_loop().time()
        try:
            response = await super().handle_async_request(request)
        except (AttributeError, OSError) as error:
            raise httpx.ConnectError(f"closed while it was opened: {error!r}") from error
        if timeout_s is not None:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _Bounded(response.stream, begun_s + timeout_s)
        return response


class _Bounded(httpx.AsyncByteStream):
    """A body that must be whole by a time of the event loop's."""

    def __init__(self, stream: httpx.AsyncByteStream, until_s: float) -> None:
        self._stream = stream
        self._until_s = until_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout_at(self._until_s):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise httpx.ReadTimeout("the answer was not whole in time") from None
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
