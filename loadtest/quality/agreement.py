"""Prompts and a way to POST /v1/compare -> how far the candidate agrees with the baseline.

The gateway lets the baseline answer, then asks both variants what they find likeliest at each token
of that answer. *Token agreement* is the share of tokens where it is the same one; *KL* is the
divergence of the candidate's distribution from the baseline's, a lower bound, in nats a token.
Means are over tokens; their intervals are bootstraps with prompts as the units.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from cast_serve.intervals import draws, ratio_of_sums
from loadtest.send.connection import authorization

Compare = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""The body of POST /v1/compare -> its answer."""
MEASURES = ("token_agreement", "kl_nats_per_token")
MAX_TOKENS = 512
"""The gateway lets an answer be no longer."""


async def measure(
    compare: Compare,
    prompts: Sequence[str],
    baseline: str,
    candidate: str,
    output_tokens: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Compares the variants on each prompt, one after the other.

    Args:
        compare: sends one body.
        prompts: texts.
        baseline: must be the gateway's own baseline, which gives the answer.
        candidate: who is compared with it.
        output_tokens: length of an answer; no more than MAX_TOKENS are asked for.
        on_answer: called after each prompt, for a progress bar.

    Returns:
        MEASURES and `num_tokens` of each prompt, None and 0 where tokens cannot be compared.

    Raises:
        ValueError: if the gateway compares other variants than these.
    """
    found = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": min(output_tokens, MAX_TOKENS), "ignore_eos": True}
        agreement = (await compare(body))["agreement"]
        if agreement["baseline"] != baseline or candidate not in agreement:
            others = ", ".join(name for name in agreement if name != "baseline")
            raise ValueError(
                f"quality cannot be measured: the gateway compares {others} with "
                f"{agreement['baseline']}, not {candidate} with {baseline}; name its variants, or "
                "leave --quality-prompts out"
            )
        found.append({key: agreement[candidate][key] for key in (*MEASURES, "num_tokens")})
        on_answer()
    return found


async def measure_over_http(
    url: str, api_key: str | None, timeout_s: float, *arguments: Any
) -> list[dict[str, Any]]:
    """`measure` with a gateway's POST /v1/compare; `arguments` are its others.

    Raises:
        ValueError: also if the gateway cannot be reached or refuses a prompt.
    """
    headers = authorization(api_key)
    # Both variants answer, and both are asked for their opinion of the answer.
    async with httpx.AsyncClient(headers=headers, timeout=4 * timeout_s, trust_env=False) as client:

        async def compare(body: dict[str, Any]) -> Mapping[str, Any]:
            try:
                response = await client.post(f"{url.rstrip('/')}/v1/compare", json=body)
                reason = f"{response.status_code} {response.text[:200]}"
                if response.status_code == 200:
                    answer: dict[str, Any] = response.json()
                    return answer
            except (httpx.HTTPError, ValueError) as error:
                reason = f"{type(error).__name__} {error}".strip()
            raise ValueError(
                f"quality cannot be measured: POST {url}/v1/compare gave {reason}; it needs our "
                "gateway (cast-serve up), or leave --quality-prompts out"
            )

        return await measure(compare, *arguments)


def summarise(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over tokens with intervals over prompts, None if no prompt could be compared.

    Args:
        each: as `measure` returns it.
    """
    scored = [one for one in each if one["num_tokens"]]
    found: dict[str, Any] = dict.fromkeys(MEASURES)
    if scored:
        counts, num_tokens = draws(len(scored)), np.array([one["num_tokens"] for one in scored])
        for name in MEASURES:
            totals = np.array([one[name] for one in scored]) * num_tokens
            mean = ratio_of_sums(totals, num_tokens, counts)
            found[name] = {"mean": mean.value, "low": mean.low, "high": mean.high}
    num_tokens_scored = sum(one["num_tokens"] for one in scored)
    return {
        **found,
        "num_prompts": len(each),
        "num_scored": len(scored),
        "num_tokens": num_tokens_scored,
    }
