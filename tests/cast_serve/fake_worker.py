"""A server that answers like one vLLM worker, and can be told to misbehave."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

METRICS = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="x"} 3.0
# HELP python_info Python.
# TYPE python_info gauge
python_info{version="3"} 1.0
"""


def create_app(name: str, words: tuple[str, ...] = ("one", " two", " three")) -> FastAPI:
    """A worker that always says `words`.

    ``app.state.bodies`` holds every request body; ``app.state.is_cut_off`` ends streams early;
    ``app.state.is_healthy`` is what /health says.
    """
    app = FastAPI()
    app.state.bodies = []
    app.state.is_cut_off = False
    app.state.is_healthy = True
    usage = {"prompt_tokens": 2, "completion_tokens": len(words), "total_tokens": 2 + len(words)}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if app.state.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(METRICS)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm"}]}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Response:
        app.state.bodies.append(body)
        if body.get("max_tokens") == -1:
            return JSONResponse({"error": {"message": "max_tokens", "code": 400}}, 400)
        if body.get("stream"):
            return StreamingResponse(stream(body), media_type="text/event-stream")
        choice = {"index": 0, "text": "".join(words), "finish_reason": "length"}
        return JSONResponse({"object": "text_completion", "choices": [choice], "usage": usage})

    async def stream(body: dict[str, Any]) -> AsyncIterator[str]:
        for number, word in enumerate(words):
            reason = "length" if number == len(words) - 1 else None
            choice = {"index": 0, "text": word, "finish_reason": reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            if app.state.is_cut_off:
                return
        if (body.get("stream_options") or {}).get("include_usage"):
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return app
