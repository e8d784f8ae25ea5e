"""Prompts and a gateway's POST /v1/compare -> how far the candidate agrees with the baseline.

The gateway lets the baseline answer, then asks both variants for their likeliest token at each
position of that answer. *Token agreement* is the share of positions where it is the same one; *KL*
is the divergence of the candidate's distribution from the baseline's, a lower bound, in nats a
token. Means are over tokens; their intervals are bootstraps with prompts as the units.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cast_serve.intervals import draws, ratio_of_sums
from loadtest.errors import QualityError
from loadtest.quality.ask import Ask

MEASURES = ("token_agreement", "kl_nats_per_token")
MAX_TOKENS = 512  # the gateway's limit for an answer
PATH = "/v1/compare"
NUM_ANSWERS = 4  # within one request: both variants answer, and both score the baseline's answer
REMEDY = (
    "agreement needs the cast-serve gateway (cast-serve up); serve through it, or leave "
    "--quality-prompts out"
)


async def measure(
    compare: Ask,
    prompts: Sequence[str],
    baseline: str,
    candidate: str,
    output_tokens: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Compares the variants on each prompt, one after the other, by posting to a gateway's PATH.

    `baseline` must be the gateway's own, which gives the answer, of at most MAX_TOKENS.

    Returns:
        MEASURES and `num_tokens` of each prompt, None and 0 where tokens cannot be compared.

    Raises:
        QualityError: if there is no answer, or the gateway compares other variants than these.
    """
    found = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": min(output_tokens, MAX_TOKENS), "ignore_eos": True}
        try:
            agreement = (await compare(body))["agreement"]
        except QualityError as error:
            raise QualityError(f"quality cannot be measured: {error}") from error
        if agreement["baseline"] != baseline or candidate not in agreement:
            others = ", ".join(name for name in agreement if name != "baseline")
            raise QualityError(
                f"quality cannot be measured: the gateway compares {others} with "
                f"{agreement['baseline']}, not {candidate} with {baseline}; name its variants, or "
                "leave --quality-prompts out"
            )
        found.append({key: agreement[candidate][key] for key in (*MEASURES, "num_tokens")})
        on_answer()
    return found


def summarise(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over tokens of what `measure` returns, with intervals over prompts.

    None if no prompt could be compared.
    """
    scored = [one for one in each if one["num_tokens"]]
    found: dict[str, Any] = dict.fromkeys(MEASURES)
    if scored:
        resamples, num_tokens = draws(len(scored)), np.array([one["num_tokens"] for one in scored])
        for name in MEASURES:
            totals = np.array([one[name] for one in scored]) * num_tokens
            mean = ratio_of_sums(totals, num_tokens, resamples)
            found[name] = {"mean": mean.value, "low": mean.low, "high": mean.high}
    num = {"num_prompts": len(each), "num_scored": len(scored)}
    return {**found, **num, "num_tokens": sum(one["num_tokens"] for one in scored)}
