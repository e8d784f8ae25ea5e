"""A TTFT and an ITL for each variant -> an OpenAI-compatible server with these latencies.

The load test is tested against it: `python -m loadtest.mock_server`, or `create_app` in a test.
Its output is numbered, made-up tokens. It can vary its latencies, queue, stall and fail, and it
records when each request arrived and when each token left: `GET /truth`.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from loadtest.errors import UsageError


@dataclass(frozen=True)
class MockVariant:
    """How one variant behaves.

    Attributes:
        ttft_s: from the request's arrival, or with `max_concurrency` from the end of its wait, to
            the first token.
        itl_s: from each token to the next.
        fail_every: every n-th request is answered 503; 0 = none.
        missing_tokens: how many tokens fewer than asked for are sent.
        is_cut_off: the stream ends without usage and `[DONE]`.
        noise: TTFT and each ITL are multiplied by exp(noise * z), z standard normal, drawn each
            time: the medians stay, the mean ITL, and so TPOT, grows by exp(noise^2 / 2).
        seed: the same seed gives the n-th request the same factors.
        max_concurrency: how many requests are worked on at once, the others wait; 0 = all.
        prefill_s: more TTFT for each word of a prompt at which it begins to differ from all earlier
            prompts and their answers, as with a prefix cache that forgets nothing.
    """

    ttft_s: float
    itl_s: float
    fail_every: int = 0
    missing_tokens: int = 0
    is_cut_off: bool = False
    noise: float = 0.0
    seed: int = 0
    max_concurrency: int = 0
    prefill_s: float = 0.0


@dataclass
class Answer:
    """What the mock did with one request.

    Attributes:
        variant: the name asked for.
        prompt: as received; of a chat, one message a line.
        arrived_s: when the request's head had arrived.
        num_tokens: asked for.
        num_new_words: of the prompt, behind what an earlier prompt and its answer began with; all
            of them without `prefill_s`.
        due_s: when each token was to leave.
        sent_s: when each token was handed to the connection; fewer if the client left.
    """

    variant: str
    prompt: str
    arrived_s: float
    num_tokens: int
    num_new_words: int
    due_s: list[float] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)


@dataclass
class Truth:
    """What the mock did; times on CLOCK_MONOTONIC, on Linux time.perf_counter of every process.

    Attributes:
        answers: one for each request that was not told to fail, in order of arrival.
        frozen_s: when the stall really began and ended; None before its end.
    """

    answers: list[Answer] = field(default_factory=list)
    frozen_s: tuple[float, float] | None = None


def create_app(
    variants: Mapping[str, MockVariant], stall_s: tuple[float, float] | None = None
) -> FastAPI:
    """The server. `app.state.requests` lists (variant, prompt) in order of arrival, and
    `app.state.truth` is what GET /truth answers.

    Args:
        variants: by name.
        stall_s: start and end of a stall, in which nothing is accepted, read or written. Seconds
            after the first completion request, as a client's clock starts only then.
    """
    app = FastAPI()
    app.state.requests = []
    app.state.truth = Truth()

    @app.get("/truth")
    async def truth() -> dict[str, Any]:
        return asdict(app.state.truth)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "owned_by": "mock"} for name in variants]
        return {"object": "list", "data": data}

    completions = _Completions(variants, stall_s, app.state.requests, app.state.truth)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.routes.append(Route(path, endpoint=completions, methods=["POST"]))
    return app


class _Completions:
    """Both completion routes, as plain ASGI: FastAPI's responses would cost CPU time a token.

    Each token is due at a moment, not a pause after the token before it, so delays do not add up.
    """

    def __init__(
        self,
        variants: Mapping[str, MockVariant],
        stall_s: tuple[float, float] | None,
        requests: list[tuple[str, str]],
        truth: Truth,
    ) -> None:
        self._variants = variants
        self._stall_s = stall_s
        self._requests = requests
        self._truth = truth
        self._counts: Counter[str] = Counter()
        self._places = {
            name: asyncio.Semaphore(variant.max_concurrency) if variant.max_concurrency else None
            for name, variant in variants.items()
        }
        self._seen: dict[str, list[list[str]]] = {name: [] for name in variants}
        self._frozen_s: tuple[float, float] | None = None  # the stall, on the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s = asyncio.get_running_loop().time()
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        request = json.loads(body)
        name = request["model"]
        if name not in self._variants:
            return await _error(404, f"the model {name!r} does not exist")(scope, receive, send)
        self._start_clock(arrived_s)
        chat = request.get("messages")
        prompt = "\n".join(m["content"] for m in chat) if chat else request["prompt"]
        self._requests.append((name, prompt))
        self._counts[name] += 1
        variant, number = self._variants[name], self._counts[name]
        if variant.fail_every and number % variant.fail_every == 0:
            return await _error(503, "told to fail")(scope, receive, send)
        words = prompt.split()
        seen = self._seen[name] if variant.prefill_s else []
        num_new = len(words) - max((_num_alike(words, one) for one in seen), default=0)
        seen.append(words + [str(token) for token in range(request["max_tokens"])])
        answer = Answer(name, prompt, arrived_s, request["max_tokens"], num_new)
        self._truth.answers.append(answer)
        has_left = asyncio.ensure_future(receive())  # the next message is the client's disconnect
        try:
            async with self._places[name] or nullcontext():
                rng = random.Random(f"{variant.seed}/{name}/{number}")
                await self._stream(variant, rng, request, answer, send, has_left.done)
        finally:
            has_left.cancel()

    def _start_clock(self, first_arrived_s: float) -> None:
        if self._stall_s and not self._frozen_s:
            start_s, end_s = (first_arrived_s + after_s for after_s in self._stall_s)
            self._frozen_s = start_s, end_s
            asyncio.get_running_loop().call_at(start_s, self._freeze, end_s)

    def _freeze(self, end_s: float) -> None:
        began_s = time.monotonic()
        time.sleep(max(0.0, end_s - began_s))
        self._truth.frozen_s = began_s, time.monotonic()

    async def _stream(
        self,
        variant: MockVariant,
        rng: random.Random,
        request: Mapping[str, Any],
        answer: Answer,
        send: Send,
        has_left: Callable[[], bool],
    ) -> None:
        now = asyncio.get_running_loop().time
        is_chat = "messages" in request
        kind = "chat.completion.chunk" if is_chat else "text_completion"

        async def emit(choices: list[dict[str, Any]], **more: Any) -> None:
            chunk = {"object": kind, "model": request["model"], "choices": choices, **more}
            await write(f"data: {json.dumps(chunk)}\n\n")

        async def write(text: str, more_body: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more_body}
            await send(message)

        due_s = now() if self._places[answer.variant] else answer.arrived_s
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        num_tokens = request["max_tokens"] - variant.missing_tokens
        for token in range(num_tokens):
            first_s = variant.ttft_s + variant.prefill_s * answer.num_new_words
            gap_s = variant.itl_s if token else first_s
            due_s = self._after(due_s, gap_s * rng.lognormvariate(0.0, variant.noise))
            answer.due_s.append(due_s)
            await asyncio.sleep(due_s - now())
            if has_left():
                return
            reason = "length" if token == num_tokens - 1 else None
            output = {"delta": {"content": f" {token}"}} if is_chat else {"text": f" {token}"}
            answer.sent_s.append(now())
            await emit([{"index": 0, **output, "finish_reason": reason}])
        if variant.is_cut_off:
            return await write("", more_body=False)
        if (request.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(answer.prompt.split()), "completion_tokens": num_tokens}
            await emit([], usage=usage)
        await write("data: [DONE]\n\n", more_body=False)

    def _after(self, due_s: float, gap_s: float) -> float:
        """The moment after `gap_s` of work from `due_s` on; during the stall no work is done."""
        if self._frozen_s and due_s < self._frozen_s[0] <= due_s + gap_s:
            gap_s += self._frozen_s[1] - self._frozen_s[0]
        return due_s + gap_s


def _num_alike(words: Sequence[str], earlier: Sequence[str]) -> int:
    """How many words both begin with."""
    pairs = enumerate(zip(words, earlier, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(words), len(earlier)))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def _two_numbers(text: str, form: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not {form}") from None
    return first, second


def main(
    variant: Annotated[list[str], typer.Option(help="NAME=TTFT_S,ITL_S; repeatable.")],
    noise: Annotated[
        float, typer.Option(help="Sigma of the log-normal factor on every time.", min=0)
    ] = MockVariant.noise,
    seed: Annotated[int, typer.Option(help="Same seed, same noise.")] = MockVariant.seed,
    max_concurrency: Annotated[
        int, typer.Option(help="Concurrent requests per variant; 0: no limit.", min=0)
    ] = MockVariant.max_concurrency,
    stall: Annotated[
        str | None, typer.Option(help="Stall from FROM_S to TO_S after the first request.")
    ] = None,
    host: str = "127.0.0.1",
    port: int = 8009,
) -> None:
    """Serve variants with known latencies, to check a load test against."""
    try:
        more: dict[str, Any] = {"noise": noise, "seed": seed, "max_concurrency": max_concurrency}
        variants = {
            name: MockVariant(*_two_numbers(numbers, "TTFT_S,ITL_S; write 0.1,0.01"), **more)
            for name, _, numbers in (text.partition("=") for text in variant)
        }
        stall_s = None if stall is None else _two_numbers(stall, "FROM_S,TO_S; write 2,3.5")
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    # uvloop, which uvicorn prefers, rounds times to whole milliseconds: tokens would leave early.
    app = create_app(variants, stall_s)
    uvicorn.run(app, host=host, port=port, log_level="warning", loop="asyncio")


if __name__ == "__main__":
    typer.run(main)
