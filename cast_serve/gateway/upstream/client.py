"""A URL and a body -> the answer's head and its body as it comes: HTTP to the workers, by aiohttp.

`Client.post` is the way of every token; httpx takes more CPU time there than all the rest. What
went wrong says how far the request came:

    UnsentError            no connection was made: the worker has not seen the request
    StaleError             a kept connection closed as the request was written to it
    aiohttp.ClientError    the connection was lost later: the worker may have begun

`Client.ask` is for the gateway's own questions: probes, metrics, models.
"""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace
from typing import Any

import aiohttp

# Servers close a connection that was idle for 5 s (uvicorn's and vLLM's own limit): before that it
# must not be taken for another request.
KEEP_ALIVE_S = 2.0
# Kubernetes moves no connection away from a pod that ends, so each is used for new requests this
# long only: less than deploy/k8s has such a pod wait before it stops.
RENEW_S = 5.0
CLOSE_AFTER_S = 60.0  # after the last deadline: what has come in time is still passed on
CONNECT_S = 5.0
LARGE_BYTES = 1 << 16  # a longer body is sent in pieces, so that others are served in between
# A kept connection that closes within this time of being used again had been given up by the
# worker before. Later, the worker may be at work on the request.
STALE_S = 0.1


class UnsentError(Exception):
    """No connection was made, so the worker has not seen the request.

    Args:
        cause: aiohttp's error.

    Attributes:
        is_refused: whether the worker, or its host, said so; False for a time-out.
    """

    def __init__(self, cause: aiohttp.ClientError) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.is_refused = not isinstance(cause, TimeoutError)


class StaleError(Exception):
    """A kept connection was closed as the request was written to it; a new one may work."""


MAX_REPLY_BYTES = 16 << 20  # to a question; vLLM's /metrics has some 100 kB


class WorkerError(Exception):
    """A worker did not answer a question, or not in HTTP, or with too much."""


class SilentError(WorkerError):
    """A worker did not answer a question in time."""


@dataclass(frozen=True)
class Reply:
    """A worker's answer to a question."""

    status: int
    content: bytes

    def json(self) -> Any:
        """Raises ValueError if it is not JSON."""
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("its lists and objects are nested too deeply") from None


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key; none for an empty one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Connections:
    """A session, which must be made in the event loop, and until when its answers may be read.

    Args:
        headers: of each request.
        keep_alive_s: how long a connection is kept for the next one; 0: not at all.
    """

    def __init__(self, headers: Mapping[str, str], keep_alive_s: float) -> None:
        self.made_s = asyncio.get_running_loop().time()
        self.last_deadline_s = 0.0
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_note_reuse)
        kept = {"keepalive_timeout": keep_alive_s} if keep_alive_s else {"force_close": True}
        self.session = aiohttp.ClientSession(
            # A compressed answer could be a thousand times as large as what was read of it.
            headers={"Accept-Encoding": "identity", **headers},
            auto_decompress=False,
            trace_configs=[reuse],
            connector=aiohttp.TCPConnector(limit=0, **kept),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # proxies are for the outside, workers are ours
        )


class Client:
    """Connections to the workers, each used for one request after the other, for RENEW_S."""

    def __init__(self, worker_key: str = "") -> None:
        self._headers = bearer(worker_key)
        self._current: _Connections | None = None
        self._old: list[_Connections] = []
        self._for_questions: _Connections | None = None

    async def close(self) -> None:
        for found in (self._current, *self._old, self._for_questions):
            if found is not None:
                await found.session.close()

    async def post(
        self, url: str, content: bytes, headers: Mapping[str, str], deadline_s: float
    ) -> aiohttp.ClientResponse:
        """Sends a body of JSON, once.

        Args:
            url: with the path.
            content: the body.
            headers: beside the content type.
            deadline_s: on the event loop's clock; it bounds the wait here, and later each for a
                part of the body, but nothing that is done between them.

        Raises:
            TimeoutError: once the deadline has passed.
            UnsentError: if no connection could be made.
            StaleError: if a kept connection had been closed by the worker.
            aiohttp.ClientError: if the connection was lost later, or this is not HTTP.
        """
        left_s = deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:  # which aiohttp takes for no limit
            raise TimeoutError
        session = await self._session(deadline_s)
        trace = SimpleNamespace(reused_s=None)
        try:
            return await session.post(
                url,
                data=content if len(content) <= LARGE_BYTES else io.BytesIO(content),
                headers={"Content-Type": "application/json", **headers},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    total=left_s, sock_connect=CONNECT_S, ceil_threshold=inf
                ),
                trace_request_ctx=trace,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UnsentError(error) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if trace.reused_s is not None and time.monotonic() - trace.reused_s < STALE_S:
                raise StaleError(f"{type(error).__name__}: {error}") from None
            raise

    async def ask(self, url: str, timeout_s: float, body: object = None) -> Reply:
        """A question: GET, or POST with a body of JSON.

        Raises:
            WorkerError: if the whole answer has not come within `timeout_s`.
        """
        async with self.asking(url, timeout_s, body) as upstream:
            content = b"".join([piece async for piece in pieces(upstream, LARGE_BYTES)])
            return Reply(upstream.status, content)

    @asynccontextmanager
    async def asking(
        self, url: str, timeout_s: float, body: object = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The head of the answer to a question, as `ask`; `pieces` reads the rest."""
        if self._for_questions is None:
            # No connection is kept: one to a pod that ends would find it well.
            self._for_questions = _Connections(self._headers, 0)
        try:
            async with self._for_questions.session.request(
                "GET" if body is None else "POST",
                url,
                json=body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, ceil_threshold=inf),
                trace_request_ctx=SimpleNamespace(),
            ) as upstream:
                if is_packed(upstream):
                    raise aiohttp.ClientPayloadError(
                        "the answer is compressed, which was not asked for"
                    )
                yield upstream
        except TimeoutError:
            raise SilentError(f"no whole answer within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from None

    async def _session(self, deadline_s: float) -> aiohttp.ClientSession:
        """The session for a new request. What runs on older ones goes on, until its deadline."""
        now_s = asyncio.get_running_loop().time()
        if self._current is not None and now_s - self._current.made_s > RENEW_S:
            self._old.append(self._current)
            self._current = None
        if self._current is None:
            self._current = _Connections(self._headers, KEEP_ALIVE_S)
        current = self._current
        current.last_deadline_s = max(current.last_deadline_s, deadline_s)
        over = [found for found in self._old if now_s > found.last_deadline_s + CLOSE_AFTER_S]
        self._old = [found for found in self._old if found not in over]
        for found in over:
            await found.session.close()
        return current.session


async def _note_reuse(
    _: aiohttp.ClientSession, trace: SimpleNamespace, __: aiohttp.TraceConnectionReuseconnParams
) -> None:
    trace.trace_request_ctx.reused_s = time.monotonic()


async def pieces(upstream: aiohttp.ClientResponse, num_bytes: int) -> AsyncIterator[bytes]:
    """The answer to a question, in pieces of so many bytes at most.

    Raises:
        aiohttp.ClientError, TimeoutError: as `read_piece`, and if it has more than
            `MAX_REPLY_BYTES`.
    """
    num_left = MAX_REPLY_BYTES
    while piece := await read_piece(upstream, num_bytes):
        num_left -= len(piece)
        if num_left < 0:
            raise aiohttp.ClientPayloadError(f"the answer has more than {MAX_REPLY_BYTES} bytes")
        yield piece


def is_packed(upstream: aiohttp.ClientResponse) -> bool:
    """Whether the answer is compressed, which was not asked for."""
    return upstream.headers.get("content-encoding", "identity") != "identity"


async def read_piece(upstream: aiohttp.ClientResponse, num_bytes: int = -1) -> bytes:
    """The next part of a body, as much as has come; empty at its end.

    Args:
        upstream: the answer.
        num_bytes: at most; below 0: all that has come.

    Raises:
        TimeoutError: once the request's deadline has passed.
        aiohttp.ClientError: if the connection is lost.
    """
    try:
        if num_bytes >= 0:
            return await upstream.content.read(num_bytes)
        return await upstream.content.readany()
    except RuntimeError as error:  # aiohttp's, where it was lost before this began to wait
        raise aiohttp.ClientPayloadError(f"the connection was lost: {error}") from error
