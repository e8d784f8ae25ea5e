"""A URL and a body -> the answer's head and its body as it comes: HTTP to the workers, by aiohttp.

This is the way of every token, on which httpx takes more CPU time than all the rest, and its pool
looks at every connection for each request. Probes and /metrics are asked for with httpx.
"""

import asyncio
import io
from collections.abc import Callable, Mapping
from math import inf

import aiohttp

# Servers close a connection that was idle for 5 s (uvicorn's and vLLM's own limit): before that it
# must not be taken for another request.
KEEP_ALIVE_S = 2.0
CONNECT_S = 5.0
LARGE_BYTES = 1 << 16  # a longer body is sent in pieces, so that others are served in between
# RuntimeError: who begins to read when the connection is lost already, and the answer not whole.
LOST = (aiohttp.ClientError, RuntimeError)


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key; none for an empty one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Client:
    """Connections to the workers, each used for one request after the other.

    Args:
        worker_key: sent with every request; empty: none.
    """

    def __init__(self, worker_key: str = "") -> None:
        self._headers = bearer(worker_key)
        self._session: aiohttp.ClientSession | None = None  # it must be made in the event loop

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(
        self, url: str, content: bytes, headers: Mapping[str, str], deadline_s: float
    ) -> aiohttp.ClientResponse:
        """Sends a body of JSON, once more if the connection was closed before an answer began.

        Args:
            url: with the path.
            content: the body.
            headers: besides its type.
            deadline_s: on the event loop's clock; it bounds the wait here, and later each for a
                part of the body, but nothing that is done between them.

        Raises:
            TimeoutError: once the deadline has passed.
            aiohttp.ClientError: if the connection cannot be made or is lost, or this is no HTTP.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # proxies are for the outside, workers are ours
            )
        for is_last in (False, True):
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:  # which aiohttp takes for no limit
                raise TimeoutError
            try:
                return await self._session.post(
                    url,
                    data=content if len(content) <= LARGE_BYTES else io.BytesIO(content),
                    headers={"Content-Type": "application/json", **headers},
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(
                        total=left_s, sock_connect=CONNECT_S, ceil_threshold=inf
                    ),
                )
            except aiohttp.ClientError as error:
                if is_last or not _is_dropped(error):
                    raise
        raise AssertionError("the loop returns or raises")


def _is_dropped(error: aiohttp.ClientError) -> bool:
    """Whether a connection ended before the answer began: the server may close one that is idle."""
    is_ended = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
    is_unmade = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError)
    return is_ended and not is_unmade


def fail_if_lost(upstream: aiohttp.ClientResponse) -> Callable[[], None]:
    """Has reads of a body fail once its connection is lost, whatever the reason.

    aiohttp 3.14 closes it where a chunk's length is none, and leaves who reads waiting.

    Returns:
        Ends this; to be called when nobody reads any more.
    """
    protocol = None if upstream.connection is None else upstream.connection.protocol
    closed = None if protocol is None else protocol.closed
    if closed is None:  # the body is here already
        return lambda: None

    def fail(_: object) -> None:
        if not upstream.content.is_eof() and upstream.content.exception() is None:
            upstream.content.set_exception(aiohttp.ClientPayloadError("the connection was lost"))

    def end() -> None:
        closed.remove_done_callback(fail)

    closed.remove_done_callback(_note)  # of the answer before this one on the connection
    closed.add_done_callback(_note)
    closed.add_done_callback(fail)
    return end


def _note(closed: "asyncio.Future[None]") -> None:
    """Takes note of why a connection was lost, or the event loop logs that nobody did."""
    if not closed.cancelled():
        closed.exception()
