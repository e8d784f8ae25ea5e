"""One prompt -> every variant's answer to it, its times, and their agreement: POST /v1/compare."""

import random
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from cast_serve.gateway.compare.agreement import (
    MAX_TOKENS,
    Agreement,
    Complete,
    RefusedError,
    agreements,
)


async def compare(
    prompt_body: dict[str, Any],
    variants: Sequence[str],
    complete: Complete,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Asks every variant the same prompt, one after the other.

    Args:
        prompt_body: a checked body of /v1/completions, with one text as its prompt and one choice.
        variants: names; the first is the baseline, on whose text agreement is measured.
        complete: sends a body to a variant; returns the answer and its timing.
        max_tokens: of prompt and answer together, for agreement; see `max_scored_tokens`.

    Returns:
        The answer of POST /v1/compare. `order` is drawn each time, because the first to be asked
        may find colder caches. In `agreement`, the figures of a variant are None where its tokens
        cannot be compared with the baseline's; `reason` is there where prompt and answer exceed
        `max_tokens` or a worker refused to judge them.

    Raises:
        Whatever `complete` raises when a variant does not answer.
    """
    order = random.sample(variants, len(variants))
    answers, timings = {}, {}
    for variant in order:
        body = {**prompt_body, "stream": True}
        answers[variant], timings[variant] = await complete(variant, body)

    choices = {variant: answer["choices"][0] for variant, answer in answers.items()}
    baseline = variants[0]
    prompt_tokens = answers[baseline]["usage"]["prompt_tokens"]
    text = choices[baseline]["text"]
    answer_tokens = timings[baseline].output_tokens or 0
    reason = None
    judged: dict[str, Agreement | None] = dict.fromkeys(variants[1:])
    try:
        judged = await agreements(
            prompt_body, text, prompt_tokens, answer_tokens, variants, complete, max_tokens
        )
    except RefusedError as error:
        reason = str(error)

    shown: dict[str, Any] = {"baseline": baseline}
    for variant, found in judged.items():
        shown[variant] = {
            "token_agreement": found.num_agreeing / found.num_tokens if found else None,
            "kl_nats_per_token": found.kl_nats / found.num_tokens if found else None,
            "num_tokens": found.num_tokens if found else 0,
            "common_prefix_characters": len(commonprefix([text, choices[variant]["text"]])),
        }
        if reason is not None:
            shown[variant]["reason"] = reason
    return {
        "prompt_tokens": prompt_tokens,
        "order": order,
        "variants": {
            variant: {
                "text": choices[variant]["text"],
                "output_tokens": timings[variant].output_tokens,
                "ttft_s": timings[variant].ttft_s,
                "tpot_s": timings[variant].tpot_s,
                "e2e_s": timings[variant].e2e_s,
                "finish_reason": choices[variant]["finish_reason"],
            }
            for variant in variants
        },
        "agreement": shown,
    }
