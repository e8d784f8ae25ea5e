"""A worker's URL -> the least that stands between it and a client: what a gateway is held against.

Neither checks, counts nor limits anything; they pass requests and answers on as they come.

    python -m benchmarks.gateway.passthrough starlette|aiohttp PORT URL
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import httpx
import uvicorn
import uvloop
from aiohttp import web
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


def starlette(port: int, worker: str) -> None:
    """Starlette and httpx on uvicorn with its fastest parts: httptools and uvloop."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)  # 20 is the default
    client = httpx.AsyncClient(base_url=worker, timeout=None, limits=limits, trust_env=False)

    async def forward(request: Request) -> StreamingResponse:
        asked = client.build_request(
            request.method,
            request.url.path,
            content=await request.body(),
            headers={"content-type": "application/json"},
        )
        answer = await client.send(asked, stream=True)
        return StreamingResponse(
            answer.aiter_raw(),
            answer.status_code,
            media_type=answer.headers["content-type"],
            background=BackgroundTask(answer.aclose),
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    app = Starlette(
        routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=lifespan
    )
    uvicorn.run(
        app, port=port, http="httptools", loop="uvloop", access_log=False, log_level="warning"
    )


def aiohttp_(port: int, worker: str) -> None:
    """aiohttp on both sides, on uvloop."""

    async def forward(request: web.Request) -> web.StreamResponse:
        client: aiohttp.ClientSession = request.app["client"]
        async with client.request(
            request.method,
            worker + request.path,
            data=await request.read(),
            headers={"content-type": "application/json"},
        ) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"content-type": answer.headers["content-type"]}
            )
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            app["client"] = client
            yield

    app = web.Application()
    app.cleanup_ctx.append(lifespan)
    app.router.add_route("*", "/{path:.*}", forward)
    web.run_app(
        app, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop()
    )


KINDS = {"starlette": starlette, "aiohttp": aiohttp_}

if __name__ == "__main__":
    KINDS[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
