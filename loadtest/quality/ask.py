"""A URL and an API key -> a function that posts JSON there and returns the JSON of the answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from loadtest.errors import QualityError
from loadtest.send.connection import authorization

Ask = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""A body -> the answer; raises QualityError without one."""


@asynccontextmanager
async def asking(
    url: str, api_key: str | None, timeout_s: float, remedy: str
) -> AsyncIterator[Ask]:
    """Opens connections while the block lasts; any answer but 200 is a QualityError.

    `remedy` ends the error's text: what the user can do if there is no answer.
    """
    headers = authorization(api_key)
    async with httpx.AsyncClient(headers=headers, timeout=timeout_s, trust_env=False) as client:

        async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
            try:
                response = await client.post(url, json=body)
                reason = f"{response.status_code} {response.text[:200]}"
                if fallback := response.headers.get("X-Cast-Fallback"):
                    reason = f"the answer of another variant, since {fallback} is down"
                elif response.status_code == 200:
                    answer: dict[str, Any] = response.json()
                    return answer
            except (httpx.HTTPError, ValueError) as error:
                reason = f"{type(error).__name__} {error}".strip()
            raise QualityError(f"POST {url} gave {reason}; {remedy}")

        yield ask


async def at_once(num: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs `work` `num` times at once; the first error ends the others and is raised."""
    tasks = [asyncio.create_task(work()) for _ in range(num)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
