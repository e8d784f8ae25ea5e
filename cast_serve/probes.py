"""A vLLM server's URL -> what it says of itself: is it healthy, does it move, what are its limits.

/health stays 200 while the engine behind it hangs. So progress is asked for with a canary, one
token long, and read from the engine's own counters where the canary had to wait.
"""

import asyncio
import time
from contextlib import suppress

import httpx
from prometheus_client.parser import text_string_to_metric_families

HEALTH_TIMEOUT_S = 5.0
METRICS_TIMEOUT_S = 2.0

# These move only when the engine reports a step. The counters stand still while a long prompt is
# computed in chunks; the cache's usage does not.
PROGRESS = (
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
)


async def is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        response = await client.get(f"{url}/health", timeout=HEALTH_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return response.status_code == 200


async def read_limits(
    client: httpx.AsyncClient, url: str, model: str
) -> tuple[int | None, int | None] | None:
    """Tokens that a sequence can have, and the size of the vocabulary.

    Returns:
        Each None where the server does not say; None for both if it does not answer.
    """
    try:
        models = await client.get(f"{url}/v1/models", timeout=HEALTH_TIMEOUT_S)
        metrics = await client.get(f"{url}/metrics", timeout=HEALTH_TIMEOUT_S)
    except httpx.HTTPError:
        return None
    max_model_len = None
    with suppress(ValueError, KeyError, TypeError):  # a server that is not vLLM's
        cards = {card["id"]: card for card in models.json()["data"]}
        max_model_len = cards[model]["max_model_len"]
    vocabulary_size = _sums(metrics).get("cast_worker_vocabulary_size")
    return max_model_len, None if vocabulary_size is None else int(vocabulary_size)


async def makes_progress(client: httpx.AsyncClient, url: str, model: str, timeout_s: float) -> bool:
    """Whether a canary is answered within the time-out, or else anything moved meanwhile."""
    begun_s = time.monotonic()
    before, is_answered = await asyncio.gather(
        _progress(client, url), _answers_canary(client, url, model, timeout_s)
    )
    if is_answered:
        return True
    await asyncio.sleep(begun_s + timeout_s - time.monotonic())  # a refusal comes at once
    after = await _progress(client, url)
    return bool(after) and after != before


async def _answers_canary(
    client: httpx.AsyncClient, url: str, model: str, timeout_s: float
) -> bool:
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    try:
        response = await client.post(f"{url}/v1/completions", json=body, timeout=timeout_s)
    except httpx.HTTPError:
        return False
    return response.status_code < 500


async def _progress(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    try:
        response = await client.get(f"{url}/metrics", timeout=METRICS_TIMEOUT_S)
    except httpx.HTTPError:
        return {}
    return {name: value for name, value in _sums(response).items() if name in PROGRESS}


def _sums(metrics: httpx.Response) -> dict[str, float]:
    """Each sample's sum over its labels."""
    sums: dict[str, float] = {}
    with suppress(ValueError):  # not Prometheus text
        for family in text_string_to_metric_families(metrics.text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums
