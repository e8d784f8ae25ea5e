"""httpx's way to a worker, with one of its faults mended: a worker that is lost is an httpx error.

anyio reads the address of a connection that it has just opened. On uvloop, if the worker has closed
it by then, that is an AttributeError or OSError which httpx passes on as it is (anyio 4.16).
"""

import httpx


class WorkerTransport(httpx.AsyncHTTPTransport):
    """As its base, but what a lost connection raises is a ConnectError."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except (AttributeError, OSError) as error:
            raise httpx.ConnectError(f"closed while it was opened: {error!r}") from error
