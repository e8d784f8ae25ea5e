"""A variant and prompts -> one streamed completion's time stamps each, or the class of its error.

Nothing is retried and nothing is dropped: each turn becomes one record.Request. Error classes are
`http_<status>`, `timeout` (the whole request took too long), `connect_error`, `disconnected` (the
connection broke), `malformed_response` (no HTTP), `stream_error` (an error object inside the
stream), `malformed_chunk`, `incomplete_stream` (no `[DONE]`), `no_output` (no token event),
`answered_by_fallback` (our gateway let another variant answer) and `turn_before_failed` (not sent:
the conversation had failed). Where a stream ends without `usage`, as llama-cpp-python's do, each of
its token events counts as a token.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from types import TracebackType
from typing import Any, Self

from cast_serve import sse
from cast_serve.latency import RequestTiming, Stopwatch
from loadtest.errors import UnreachableError
from loadtest.record import Request
from loadtest.send.batch import Batch
from loadtest.send.connection import Pool, TransportError, authorization
from loadtest.send.workload import Conversation, Prompt


def _ignore(_: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Sent:
    """What became of a batch.

    Attributes:
        started_s: time 0 of the batch's timetable; all times are those of time.perf_counter.
        requests: one a turn, in the batch's order.
        cpu_s: CPU time that each client process spent on it.
    """

    started_s: float
    requests: tuple[Request, ...]
    cpu_s: tuple[float, ...]

    @property
    def wall_s(self) -> float:
        """From time 0 to the end of the last request."""
        return max(request.ended_s for request in self.requests) - self.started_s


class _Completion:
    """Feeds every event of a streamed completion to a stopwatch; the message is the error class."""

    class Error(Exception):
        pass

    def __init__(
        self, intended_send_s: float, on_chunk: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.watch = Stopwatch(intended_send_s)
        self.on_chunk = on_chunk
        self.usage: Mapping[str, Any] = {}
        self.is_done = False
        self._reader = sse.Reader()

    def feed(self, piece: bytes) -> None:
        for data in self._reader.feed(piece):
            if not self.is_done:
                self._event(data)

    def _event(self, data: bytes) -> None:
        if data == sse.DONE:
            self.is_done = True
            return
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise self.Error("stream_error")
            self.watch.observe(chunk)
            self.usage = chunk.get("usage") or self.usage
            self.on_chunk(chunk)
        except (ValueError, AttributeError, TypeError) as error:
            raise self.Error("malformed_chunk") from error

    def timing(self, status: int, may_be_empty: bool) -> RequestTiming:
        if status != 200:
            raise self.Error(f"http_{status}")
        if not self.is_done:
            raise self.Error("incomplete_stream")
        try:
            timing = self.watch.finish()
        except (ValueError, TypeError) as error:  # a token count that is none
            raise self.Error("malformed_chunk") from error
        if not (timing.token_events_s or may_be_empty):
            raise self.Error("no_output")
        if timing.output_tokens is None:
            return replace(timing, output_tokens=len(timing.token_events_s))
        return timing


class Client:
    """Talks to one OpenAI-compatible server, past any proxy: that would be measured along with it.

    Args:
        url: the server's root, without `/v1`.
        timeout_s: longest time that one request may take as a whole.
        api_key: sent as a bearer token.
    """

    num_processes = 1

    def __init__(self, url: str, *, timeout_s: float, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            self._pool = Pool(self.url, authorization(api_key))
        except ValueError as error:
            raise UnreachableError(f"URL {url!r} is not a URL: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.close()
        await asyncio.sleep(0)  # lets the transports close

    async def variants(self) -> list[str]:
        """The names in `GET /v1/models`, except those that the server says are down.

        Measuring those would measure their fallback.

        Raises:
            UnreachableError: if the server does not answer it as an OpenAI server does, or a model
                is loading.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._pool.exchange("GET", "/v1/models", b"", body.extend)
            if response.status == 200:
                models = json.loads(body)["data"]
                states = ((model["id"], model.get("status")) for model in models)
                loading = [f"{m} is {s}" for m, s in states if str(s).startswith("loading")]
                if not loading:
                    return [str(model["id"]) for model in models if "status" not in model]
                raise UnreachableError(
                    f"{self.url} does not answer for all its models yet: {', '.join(loading)}; "
                    "start again once it is ready"
                )
            reason = f"{response.status} {HTTPStatus(response.status).phrase}"
        except UnreachableError:
            raise
        except TimeoutError:
            reason = f"no answer within {self._timeout_s:g} s"
        except TransportError as error:
            reason = str(error.__cause__ or error)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"the answer is not a list of models ({type(error).__name__})"
        raise UnreachableError(
            f"{self.url}/v1/models cannot be read: {reason}; start the gateway, "
            "or correct --url or --api-key"
        )

    async def check_serves(self, names: Iterable[str], remedy: str = "") -> None:
        """Asks for `variants`, and refuses a server that lacks one of the names.

        Raises:
            UnreachableError: as `variants`, or naming the first that is lacking, with the remedy.
        """
        known = await self.variants()
        for name in names:
            if name not in known:
                raise UnreachableError(
                    f"variant {name!r} is not served at {self.url}; it serves: "
                    f"{', '.join(known)}{remedy}"
                )

    async def send(
        self,
        batch: Batch,
        on_response: Callable[[], None] = lambda: None,
        start: Callable[[], float] = time.perf_counter,
    ) -> Sent:
        """Sends a batch; `start`, called once all is ready, gives the timetable's time 0."""
        done: list[list[Request]] = [[] for _ in batch.conversations]
        waiting = iter(range(len(batch.conversations)))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._pool.open_ahead(batch.concurrency)
        cpu_s = -time.thread_time()
        started_s = start()

        async def one(place: int, intended_send_s: float) -> Request:
            async for request in self._converse(
                batch.variant, batch.conversations[place], intended_send_s, batch.until_eos
            ):
                done[place].append(request)
            on_response()
            return request

        async def keep_busy() -> None:
            free_s = started_s
            for place in waiting:
                free_s = (await one(place, free_s)).ended_s

        async with asyncio.TaskGroup() as tasks:
            await _sleep_until(started_s)
            if batch.due_s is None:
                for _ in range(batch.concurrency):
                    tasks.create_task(keep_busy())
            else:
                for place, due_s in zip(waiting, batch.due_s, strict=True):
                    await _sleep_until(started_s + due_s)
                    tasks.create_task(one(place, started_s + due_s))
        cpu_s += time.thread_time()
        return Sent(started_s, tuple(chain.from_iterable(done)), (cpu_s,))

    async def _converse(
        self, variant: str, conversation: Conversation, intended_send_s: float, until_eos: bool
    ) -> AsyncIterator[Request]:
        """Sends one turn after the other, each with the answers that came before it."""
        history: list[dict[str, str]] = []
        failed: Request | None = None
        for number, turn in enumerate(conversation.turns):
            if failed is not None:
                moment_s = failed.ended_s
                yield replace(
                    failed,
                    turn=number,
                    asked_tokens=turn.output_tokens,
                    error="turn_before_failed",
                    intended_send_s=moment_s,
                    sent_s=moment_s,
                )
                continue
            answer: list[str] = []
            prompt = turn.prompt
            if conversation.is_chat:
                history.append({"role": "user", "content": str(turn.prompt)})
                prompt = history
            if number:
                intended_send_s += turn.think_s
                await _sleep_until(intended_send_s)
            request = await self.complete(
                variant,
                conversation.index,
                prompt,
                turn.output_tokens,
                intended_send_s,
                until_eos=until_eos,
                on_chunk=partial(_collect, answer) if conversation.is_chat else _ignore,
            )
            request = replace(request, turn=number)
            yield request
            if request.error is not None:
                failed = request
            history.append({"role": "assistant", "content": "".join(answer)})
            intended_send_s = request.ended_s

    async def complete(
        self,
        variant: str,
        prompt_index: int,
        prompt: Prompt,
        output_tokens: int,
        intended_send_s: float | None = None,
        *,
        until_eos: bool = False,
        on_chunk: Callable[[Mapping[str, Any]], None] = _ignore,
    ) -> Request:
        """Sends one prompt and reads the whole stream.

        Args:
            variant: the name asked for.
            prompt_index: the prompt's number in its workload.
            prompt: a text, or the messages of a chat.
            output_tokens: of the answer, or with `until_eos` at most.
            intended_send_s: when it should have left (perf_counter); None = now.
            until_eos: whether the answer may end by itself.
            on_chunk: gets each chunk after it has been stamped.
        """
        is_text = isinstance(prompt, str)
        body = {
            "model": variant,
            "prompt" if is_text else "messages": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not until_eos:
            body["ignore_eos"] = True
        path = "/v1/completions" if is_text else "/v1/chat/completions"
        return await self.stream(
            path, body, prompt_index, intended_send_s, on_chunk, may_be_empty=until_eos
        )

    async def stream(
        self,
        path: str,
        body: Mapping[str, Any],
        prompt_index: int,
        intended_send_s: float | None = None,
        on_chunk: Callable[[Mapping[str, Any]], None] = _ignore,
        *,
        may_be_empty: bool = False,
    ) -> Request:
        """Sends a body that asks for a stream with usage, and reads the whole stream.

        `body["model"]` is the variant, `intended_send_s` is as in `complete`, `on_chunk` gets
        each chunk after it has been stamped, and an answer that `may_be_empty` is not a failed one.
        """
        data = json.dumps(body).encode()
        sent_s = time.perf_counter()
        completion = _Completion(sent_s if intended_send_s is None else intended_send_s, on_chunk)
        timing: RequestTiming | None = None
        error: str | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._pool.exchange("POST", path, data, completion.feed)
            ended_s = response.ended_s
            timing = completion.timing(response.status, may_be_empty)
            if response.is_fallback:
                timing, error = None, "answered_by_fallback"
        except TimeoutError:
            ended_s, error = time.perf_counter(), "timeout"
        except (TransportError, _Completion.Error) as exception:
            ended_s, error = time.perf_counter(), str(exception)
        return Request(
            block=None,
            block_pair=None,
            variant=body["model"],
            prompt_index=prompt_index,
            error=error,
            prompt_tokens=completion.usage.get("prompt_tokens") if timing else None,
            output_tokens=timing.output_tokens if timing else None,
            asked_tokens=body["max_tokens"],
            intended_send_s=sent_s if intended_send_s is None else intended_send_s,
            sent_s=sent_s,
            token_events_s=timing.token_events_s if timing else (),
            last_s=timing.last_s if timing else None,
            ended_s=ended_s,
        )


def _collect(answer: list[str], chunk: Mapping[str, Any]) -> None:
    """Adds a chunk's text to the answer."""
    for choice in chunk.get("choices") or ():
        answer.append((choice.get("delta") or {}).get("content") or "")


async def _sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.perf_counter()))
