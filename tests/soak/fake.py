"""A variant's name and a port -> a process that answers like its vLLM worker, and breaks when told.

    python -m tests.soak.fake NAME PORT

Its answers are those of request.py. `POST /fault {"kind": ..., "seconds": ...}` has it misbehave
for so long: `slow`, `status`, `cut`, `unfinished`, `bad_event`, `error_event`, `metrics`.
"""

import asyncio
import json
import logging
import os
import random
import sys
import threading
import time
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from tests.soak.clients.request import CHAT, COMPLETIONS, gap_s, token

SLOW_S = 0.15  # between two tokens
METRICS = """\
# TYPE cast_worker_vocabulary_size gauge
cast_worker_vocabulary_size 100.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{model_name="x"} 3.0
"""
GARBAGE = (
    "{{{{",
    'x{y="',
    "\0\x01\xff",
    "cast_worker_step_seconds NaN\n",
    "cast_worker_step_seconds +Inf\ncast_worker_vocabulary_size +Inf\n",
    "cast_worker_vocabulary_size -5\ncast_worker_step_seconds -1\n",
    "# TYPE cast_requests_total counter\ncast_requests_total 1e308\n",
    "# TYPE a gauge\n" + "".join(f'a{{b="{i}"}} 1\n' for i in range(20_000)),
)
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]
DIED = {"error": {"message": "EngineCore died", "type": "x", "param": None, "code": 500}}

logger = logging.getLogger(__name__)


class CutError(Exception):
    """Ends the connection in the middle of an answer."""


class Fake:
    """The ASGI application."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fault = ""
        self.until_s = 0.0
        self.random = random.Random(name)

    def has(self, fault: str) -> bool:
        return self.fault == fault and time.monotonic() < self.until_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path in ("/health", "/metrics", "/v1/models"):
            return await self._say(send, 200, self._told(path))
        body = json.loads(await _read(receive))
        if path == "/fault":
            self.fault, self.until_s = body["kind"], time.monotonic() + body["seconds"]
            return await self._say(send, 200, b"{}")
        if path not in (COMPLETIONS, CHAT):
            return await self._say(send, 200, b'{"tokens": [1], "prompt": "a"}')
        logger.info("%s", body.get("max_tokens"))
        if self.has("status"):
            return await self._say(send, 500, json.dumps(DIED).encode())
        answer = Answer(self, path == CHAT, body)
        if body.get("stream"):
            return await answer.stream(send)
        content = await answer.whole()
        if self.has("cut") and not answer.is_canary:
            length = [(b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": JSON + length})
            await send(
                {"type": "http.response.body", "body": content[: len(content) // 2], "more_body": 1}
            )
            raise CutError
        if self.has("bad_event") and not answer.is_canary:
            content = self.random.choice((b"5", b"{", b"null", b'{"choices": [1]}', b"\xff"))
        await self._say(send, 200, content)

    def _told(self, path: str) -> bytes:
        if path == "/metrics":
            text = self.random.choice(GARBAGE) if self.has("metrics") else METRICS
            return text.encode()
        if path == "/health":
            return b""
        if self.has("metrics"):
            return self.random.choice((b"5", b"{", b'{"data": [5]}', b'{"data": 3}', b"[]"))
        card = {"id": self.name, "object": "model", "max_model_len": 4096}
        return json.dumps({"object": "list", "data": [card]}).encode()

    async def _say(self, send: Send, status: int, content: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": JSON})
        await send({"type": "http.response.body", "body": content})


class Answer:
    """The answer to one body."""

    def __init__(self, fake: Fake, is_chat: bool, body: dict[str, Any]) -> None:
        self.fake = fake
        self.is_chat = is_chat
        self.body = body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        words = prompt.split() if isinstance(prompt, str) else []
        is_ours = len(words) == 3 and words[0] == "soak"
        self.is_canary = not words or prompt == "a"
        self.key, self.width = (words[1], int(words[2])) if is_ours else ("0", 0)
        self.num_tokens = min(int(body.get("max_tokens") or 4), 256)
        self.num_choices = int(body.get("n") or 1)
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [0]
        self.num_choices *= len(prompts)
        self.usage = {
            "prompt_tokens": len(words) or 1,
            "completion_tokens": self.num_tokens * self.num_choices,
        }

    async def pause(self) -> None:
        await asyncio.sleep(SLOW_S if self.fake.has("slow") else gap_s(self.key))

    def token(self, choice: int, place: int) -> str:
        return token(self.fake.name, self.key, choice, place, self.width)

    async def whole(self) -> bytes:
        await self.pause()
        choices: list[dict[str, Any]] = []
        for index in range(self.num_choices):
            text = "".join(self.token(index, place) for place in range(self.num_tokens))
            said = {"message": {"role": "assistant", "content": text}}
            choice = {"index": index, "finish_reason": "length"}
            choices.append({**choice, **(said if self.is_chat else {"text": text})})
        if self.body.get("prompt_logprobs"):
            entry = {"1": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}}
            choices[0]["prompt_logprobs"] = [None, *[entry] * (self.usage["prompt_tokens"] - 1)]
        answer = {"object": "x", "model": self.fake.name, "choices": choices, "usage": self.usage}
        return json.dumps(answer).encode()

    async def stream(self, send: Send) -> None:
        fake = self.fake
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        breaks_at = fake.random.randrange(self.num_tokens + 1)
        for place in range(self.num_tokens):
            if place == breaks_at:
                if fake.has("cut"):
                    raise CutError
                if fake.has("unfinished"):
                    return await self._write(send, b"", more_body=False)
                if fake.has("bad_event"):
                    event = fake.random.choice((b"5", b"{", b'{"choices": [1]}', b"\xff"))
                    await self._write(send, b"data: " + event + b"\n\n")
                if fake.has("error_event"):
                    await self._event(send, DIED)
                    return await self._write(send, b"data: [DONE]\n\n", more_body=False)
            for index in range(self.num_choices):
                text = self.token(index, place)
                part = {"delta": {"content": text}} if self.is_chat else {"text": text}
                reason = "length" if place == self.num_tokens - 1 else None
                choice = {"index": index, **part, "finish_reason": reason}
                await self._event(send, {"object": "x", "choices": [choice]})
            await self.pause()
        await self._event(send, {"object": "x", "choices": [], "usage": self.usage})
        await self._write(send, b"data: [DONE]\n\n", more_body=False)

    async def _event(self, send: Send, content: dict[str, Any]) -> None:
        await self._write(send, b"data: " + json.dumps(content).encode() + b"\n\n")

    async def _write(self, send: Send, content: bytes, more_body: bool = True) -> None:
        await send({"type": "http.response.body", "body": content, "more_body": more_body})


async def _read(receive: Receive) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if not message.get("more_body"):
            return content


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(name: str, port: int) -> None:
    """Serves until it is ended, or its parent is."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for quiet in ("uvicorn.error", "asyncio"):  # a cut connection is an exception there
        logging.getLogger(quiet).setLevel(logging.CRITICAL)
    uvicorn.run(Fake(name), port=port, ws="none", lifespan="off", log_config=None, access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
