"""A vLLM server's URL -> whether it is healthy and makes progress, and what its limits are.

/health stays 200 while the engine behind it hangs. So progress is asked for with a canary, one
token long, and read from the engine's own counters where the canary had to wait.
"""

import asyncio
import enum
import math
import time
from dataclasses import dataclass

from cast_serve.gateway.api import answers
from cast_serve.gateway.upstream import exposition
from cast_serve.gateway.upstream.client import Client, Reply, SilentError, WorkerError

HEALTH_TIMEOUT_S = 5.0
METRICS_TIMEOUT_S = 2.0
# Published by `cast-serve worker`.
VOCABULARY = "cast_worker_vocabulary_size"
STEP = "cast_worker_step_seconds"

# These change only when the engine reports a step. While a long prompt is computed in chunks the
# counters stay the same, and the cache's usage changes.
PROGRESS = (
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
)


class Canary(enum.Enum):
    """What became of a request for one token.

    ANSWERED also means a refusal by another status 4xx than these two: the server is at work.
    REFUSED is a status 5xx, a failed connection or an answer that the engine gave up, SILENT is no
    answer in time: the engine hangs, or is busy. LOCKED is 401: the server asks for another key
    than the gateway's. UNKNOWN is 404: it serves no model of the variant's name.
    """

    ANSWERED = enum.auto()
    REFUSED = enum.auto()
    SILENT = enum.auto()
    LOCKED = enum.auto()
    UNKNOWN = enum.auto()


NOT_FOR_US = (Canary.LOCKED, Canary.UNKNOWN)  # the server is at work, but not for this gateway


@dataclass(frozen=True)
class Limits:
    """A server's own limits; each None if it does not publish it.

    Attributes:
        max_model_len: tokens of prompt and answer together.
        vocabulary_size: token ids lie below it.
        step_s: seconds of one full engine step, measured by `cast-serve worker` at its start.
    """

    max_model_len: int | None = None
    vocabulary_size: int | None = None
    step_s: float | None = None


async def is_healthy(client: Client, url: str) -> bool:
    try:
        return (await client.ask(f"{url}/health", HEALTH_TIMEOUT_S)).status == 200
    except WorkerError:
        return False


async def read_limits(client: Client, url: str, model: str) -> Limits | None:
    """Asks a server for its limits; None if it does not answer."""
    try:
        models = await client.ask(f"{url}/v1/models", HEALTH_TIMEOUT_S)
        sums = await exposition.read_sums(client, url, (VOCABULARY, STEP), HEALTH_TIMEOUT_S)
    except WorkerError:
        return None
    # Of a server whose metrics are garbage nothing is known: no limit, rather than a wrong one.
    known = {name: value for name, value in sums.items() if 0 < value < math.inf}
    vocabulary_size = known.get(VOCABULARY)
    return Limits(
        max_model_len=_max_model_len(models, model),
        vocabulary_size=None if vocabulary_size is None else int(vocabulary_size),
        step_s=known.get(STEP),
    )


def _max_model_len(models: Reply, model: str) -> int | None:
    try:
        cards = {card["id"]: card for card in models.json()["data"]}
        found = cards[model]["max_model_len"]
    except (ValueError, KeyError, TypeError):  # a server that is not vLLM's
        return None
    return found if isinstance(found, int) else None


async def look_for_progress(client: Client, url: str, model: str, timeout_s: float) -> Canary:
    """What became of a canary; ANSWERED also if it was not, but a counter changed meanwhile."""
    begun_s = time.monotonic()
    before, canary = await asyncio.gather(
        _progress(client, url), send_canary(client, url, model, timeout_s)
    )
    if canary in (Canary.ANSWERED, *NOT_FOR_US):
        return canary
    await asyncio.sleep(begun_s + timeout_s - time.monotonic())  # a refusal comes at once
    after = await _progress(client, url)
    return Canary.ANSWERED if after and after != before else canary


async def send_canary(client: Client, url: str, model: str, timeout_s: float) -> Canary:
    """Asks for one token."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    try:
        response = await client.ask(f"{url}/v1/completions", timeout_s, body)
    except SilentError:
        return Canary.SILENT
    except WorkerError:
        return Canary.REFUSED
    if response.status == 401:
        return Canary.LOCKED
    if response.status == 404:
        return Canary.UNKNOWN
    if response.status >= 500 or _is_aborted(response):
        return Canary.REFUSED
    return Canary.ANSWERED


def _is_aborted(response: Reply) -> bool:
    try:
        return answers.is_aborted(response.json())
    except (ValueError, AttributeError, TypeError):  # a refusal, or not an OpenAI server
        return False


async def _progress(client: Client, url: str) -> dict[str, float]:
    try:
        return await exposition.read_sums(client, url, PROGRESS, METRICS_TIMEOUT_S)
    except WorkerError:
        return {}
