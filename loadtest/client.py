"""A variant and a prompt -> one streamed completion's time stamps, or the class of its error.

Nothing is retried and nothing is dropped: every request becomes one Outcome. Error classes are
`http_<status>`, the name of httpx's exception, `timeout` (the whole request took too long),
`stream_error` (an error object inside the stream), `malformed_chunk`, `incomplete_stream` (no
`[DONE]`), `no_output` (no token event) and `no_usage`.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from cast_serve.latency import RequestTiming, Stopwatch


class UnreachableError(ValueError):
    """The server cannot be asked for its variants."""


class _StreamError(Exception):
    """A response that is no complete completion; the message is its error class."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        variant: the name asked for.
        prompt_index: which prompt of the workload.
        timing: the time stamps; None exactly if `error` is set.
        prompt_tokens: as the server counted them; None if it did not.
        error: error class; None for a complete response.
    """

    variant: str
    prompt_index: int
    timing: RequestTiming | None
    prompt_tokens: int | None
    error: str | None


class Client:
    """Talks to one OpenAI-compatible server, straight: a proxy would be measured along with it.

    Args:
        url: the server's root, without `/v1`.
        concurrency: connections kept open.
        timeout_s: longest time that one request may take as a whole.
        api_key: sent as a bearer token; None sends none.
    """

    def __init__(
        self, url: str, *, concurrency: int, timeout_s: float, api_key: str | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                limits=httpx.Limits(max_connections=concurrency, keepalive_expiry=None),
                timeout=timeout_s,
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise UnreachableError(f"URL {url!r} is no URL: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def variants(self) -> list[str]:
        """The names in `GET /v1/models`.

        Raises:
            UnreachableError: if the server does not answer it as an OpenAI server does.
        """
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            return [str(model["id"]) for model in response.json()["data"]]
        except httpx.HTTPError as error:
            reason = str(error).split("\n")[0] or type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            reason = f"the answer is no list of models ({type(error).__name__})"
        raise UnreachableError(
            f"{self.url}/v1/models cannot be read: {reason}; start the gateway, "
            "or correct --url or --api-key"
        )

    async def complete(
        self, variant: str, prompt_index: int, prompt: str, output_tokens: int
    ) -> Outcome:
        """Sends one prompt and reads the whole stream; the clock starts before anything is sent."""
        watch = Stopwatch()
        error: str
        try:
            async with asyncio.timeout(self._timeout_s):
                usage = await self._stream(watch, variant, prompt, output_tokens)
            timing = watch.finish()
            if not timing.token_events_s:
                raise _StreamError("no_output")
            if timing.output_tokens is None:
                raise _StreamError("no_usage")
            return Outcome(variant, prompt_index, timing, usage.get("prompt_tokens"), None)
        except TimeoutError:
            error = "timeout"
        except httpx.HTTPError as exception:
            error = type(exception).__name__
        except _StreamError as exception:
            error = str(exception)
        return Outcome(variant, prompt_index, None, None, error)

    async def _stream(
        self, watch: Stopwatch, variant: str, prompt: str, output_tokens: int
    ) -> Mapping[str, Any]:
        """Feeds every data chunk to the stopwatch and returns the usage."""
        body = {
            "model": variant,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage: Mapping[str, Any] = {}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _StreamError(f"http_{response.status_code}")
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[len("data:") :].strip()
                if data == "[DONE]":
                    return usage
                try:
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise _StreamError("stream_error")
                    watch.observe(chunk)
                    usage = chunk.get("usage") or usage
                except (ValueError, AttributeError, TypeError) as error:
                    raise _StreamError("malformed_chunk") from error
        raise _StreamError("incomplete_stream")
