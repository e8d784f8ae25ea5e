"""Chosen TTFT and ITL a variant -> an OpenAI-compatible server that keeps exactly to them.

A harness is checked against a server whose truth is known: `python -m loadtest.mock`, or
`create_app` in a test. It makes no output worth reading, and can be told to fail.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass(frozen=True)
class MockVariant:
    """How one variant behaves.

    Attributes:
        ttft_s: from the request's arrival to the first token.
        itl_s: from each token to the next.
        fail_every: every so-manyth request is answered 503; 0 = none.
        missing_tokens: so many fewer tokens than asked for.
        is_cut_off: the stream ends without usage and `[DONE]`.
    """

    ttft_s: float
    itl_s: float
    fail_every: int = 0
    missing_tokens: int = 0
    is_cut_off: bool = False

    @classmethod
    def parse(cls, text: str) -> "MockVariant":
        """Parses `TTFT_S,ITL_S`."""
        try:
            ttft_s, itl_s = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"{text!r} is not TTFT_S,ITL_S; write for instance 0.1,0.01") from None
        return cls(ttft_s, itl_s)


def create_app(variants: Mapping[str, MockVariant]) -> FastAPI:
    """The server. `app.state.requests` lists (variant, prompt) in order of arrival."""
    app = FastAPI()
    app.state.requests = []

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "owned_by": "mock"} for name in variants]
        return {"object": "list", "data": data}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Response:
        name = body["model"]
        if name not in variants:
            return _error(404, f"the model {name!r} does not exist")
        app.state.requests.append((name, body["prompt"]))
        variant = variants[name]
        number = sum(earlier == name for earlier, _ in app.state.requests)
        if variant.fail_every and number % variant.fail_every == 0:
            return _error(503, "told to fail")
        return StreamingResponse(_stream(name, variant, body), media_type="text/event-stream")

    return app


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


async def _stream(name: str, variant: MockVariant, body: Mapping[str, Any]) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {"object": "text_completion", "model": name, "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    now = asyncio.get_running_loop().time
    first_s = now() + variant.ttft_s
    num_tokens = body["max_tokens"] - variant.missing_tokens
    for token in range(num_tokens):
        await asyncio.sleep(first_s + token * variant.itl_s - now())  # due times, so no drift
        reason = "length" if token == num_tokens - 1 else None
        yield event([{"index": 0, "text": f" {token}", "finish_reason": reason}])
    if variant.is_cut_off:
        return
    if (body.get("stream_options") or {}).get("include_usage"):
        prompt_tokens = len(body["prompt"].split())
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        yield event([], usage=usage)
    yield "data: [DONE]\n\n"


def main(
    variant: Annotated[list[str], typer.Option(help="NAME=TTFT_S,ITL_S; may be repeated.")],
    host: str = "127.0.0.1",
    port: int = 8009,
) -> None:
    """Serves variants with known latencies, to check a load test against."""
    try:
        pairs = [text.partition("=") for text in variant]
        variants = {name: MockVariant.parse(numbers) for name, _, numbers in pairs}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    uvicorn.run(create_app(variants), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
