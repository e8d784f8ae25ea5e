"""A server that answers like one vLLM worker, and can be told to misbehave."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

METRICS = """\
# HELP cast_worker_vocabulary_size Token ids lie below it.
# TYPE cast_worker_vocabulary_size gauge
cast_worker_vocabulary_size 100.0
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="x"} 3.0
# HELP python_info Python.
# TYPE python_info gauge
python_info{version="3"} 1.0
"""


ENGINE_DIED = {
    "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "type": "InternalServerError",
    "param": None,
    "code": 500,
}


def create_app(name: str, words: tuple[str, ...] = ("one", " two", " three")) -> FastAPI:
    """A worker that always says `words`.

    ``app.state.bodies`` holds every request body but canaries, ``app.state.traces`` their
    traceparents. ``app.state.json`` is said in chats that ask for a schema.
    ``app.state.is_cut_off`` ends streams early; ``app.state.is_healthy`` is what
    /health says; ``app.state.gate``, once cleared, holds answers (of streams, after the first word)
    back until it is set; ``app.state.num_left`` counts the clients that left meanwhile, and
    ``app.state.most_at_once`` the bodies that were being answered at the same time.

    Faults: ``app.state.status`` is a completion's if not 200, ``app.state.canary_status`` a
    canary's; a stream ends after ``app.state.error_at`` words with ``app.state.error``, or
    ``app.state.raw_event``, and [DONE], as vLLM's does when its engine dies;
    ``app.state.metrics`` is what /metrics says, ``app.state.cards`` the models of /v1/models if not
    its own, ``app.state.reason`` an answer's finish_reason, and without ``app.state.has_usage``
    streams have no usage.
    """
    app = FastAPI()
    app.state.status = app.state.canary_status = 200
    app.state.error_at = None
    app.state.error = ENGINE_DIED
    app.state.raw_event = None
    app.state.metrics = METRICS
    app.state.cards = [{"id": name, "object": "model", "max_model_len": 64}]
    app.state.has_usage = True
    app.state.reason = "length"
    app.state.num_at_once = app.state.most_at_once = 0
    app.state.bodies = []
    app.state.traces = []
    app.state.json = "{}"
    app.state.is_cut_off = False
    app.state.is_healthy = True
    app.state.num_left = 0
    app.state.gate = threading.Event()
    app.state.gate.set()

    def usage_of(body: dict[str, Any]) -> dict[str, int]:
        prompt = body["prompt"]
        count = len(prompt.split() if isinstance(prompt, str) else prompt)
        return {"prompt_tokens": count, "completion_tokens": len(words)}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if app.state.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(app.state.metrics)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": app.state.cards}

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Response:
        if body == {"model": name, "prompt": "a", "max_tokens": 1}:
            if app.state.canary_status != 200:
                return JSONResponse({"error": ENGINE_DIED}, app.state.canary_status)
            first = {"index": 0, "text": words[0], "finish_reason": app.state.reason}
            return JSONResponse({"choices": [first], "usage": usage_of(body)})
        if body["model"] != name:
            return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)
        app.state.bodies.append(body)
        app.state.traces += request.headers.getlist("traceparent")
        if body.get("user") == "unwelcome":
            return JSONResponse({"error": {"message": "not you", "code": 400}}, 400)
        if app.state.status != 200:
            return JSONResponse({"error": ENGINE_DIED}, app.state.status)
        if body.get("stream"):
            return StreamingResponse(stream(body), media_type="text/event-stream")
        with counted():
            await opened(request)
        choice: dict[str, Any] = {"index": 0, "text": "".join(words)}
        choice["finish_reason"] = app.state.reason
        usage = usage_of(body)
        if body.get("prompt_logprobs"):
            token = {"1": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}}
            choice["prompt_logprobs"] = [None, *[token] * (usage["prompt_tokens"] - 1)]
        return JSONResponse({"object": "text_completion", "choices": [choice], "usage": usage})

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> Response:
        app.state.bodies.append(body)
        usage = {"prompt_tokens": 1, "completion_tokens": len(words)}
        if body.get("stream"):
            return StreamingResponse(chat_words_of(usage), media_type="text/event-stream")
        is_json = (body.get("response_format") or {}).get("type") == "json_schema"
        content = app.state.json if is_json else "".join(words)
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"object": "chat.completion", "choices": [choice], "usage": usage})

    async def chat_words_of(usage: dict[str, int]) -> AsyncIterator[str]:
        for number, word in enumerate(words):
            reason = "stop" if number == len(words) - 1 else None
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    @app.post("/tokenize")
    async def tokenize(body: dict[str, Any]) -> Response:
        if not isinstance(body.get("prompt"), str):
            return JSONResponse({"detail": "prompt"}, 422)
        return JSONResponse({"tokens": [ord(letter) % 100 for letter in body["prompt"]]})

    @app.post("/detokenize")
    async def detokenize(body: dict[str, Any]) -> dict[str, str]:
        return {"prompt": "".join(map(chr, body["tokens"]))}

    async def opened(request: Request | None = None) -> None:
        while not app.state.gate.is_set():
            if request is not None and await request.is_disconnected():
                app.state.num_left += 1
                return
            await asyncio.sleep(0.01)

    @contextmanager
    def counted() -> Iterator[None]:
        app.state.num_at_once += 1
        app.state.most_at_once = max(app.state.most_at_once, app.state.num_at_once)
        try:
            yield
        finally:
            app.state.num_at_once -= 1

    async def stream(body: dict[str, Any]) -> AsyncIterator[str]:
        with counted():
            async for event in words_of(body):
                yield event

    async def words_of(body: dict[str, Any]) -> AsyncIterator[str]:
        for number, word in enumerate(words):
            if app.state.error_at == number:
                event = app.state.raw_event or json.dumps({"error": app.state.error})
                yield f"data: {event}\n\ndata: [DONE]\n\n"
                return
            reason = app.state.reason if number == len(words) - 1 else None
            choice = {"index": 0, "text": word, "finish_reason": reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            if app.state.is_cut_off:
                return
            try:
                await opened()
            except asyncio.CancelledError:
                app.state.num_left += 1
                raise
        if (body.get("stream_options") or {}).get("include_usage") and app.state.has_usage:
            yield f"data: {json.dumps({'choices': [], 'usage': usage_of(body)})}\n\n"
        yield "data: [DONE]\n\n"

    return app
