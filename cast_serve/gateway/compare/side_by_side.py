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
    """One prompt on every variant, one after the other: the body of POST /v1/compare.

    Args:
        prompt_body: of a completion with one text as its prompt and one choice, checked.
        variants: names; the first is the baseline, on whose text agreement is measured.
        complete: sends a body to a variant.
        max_tokens: of prompt and answer together, for agreement; see `max_scored_tokens`.

    Returns:
        `variants`: each one's text and times; `order`: in which they were asked, drawn each
        time, because the first may find colder caches; `agreement`: of each other variant with the
        baseline, None where the tokens cannot be compared, and with a `reason` where prompt and
        answer are longer than `max_tokens`, or a worker refused to judge them.
    """
    order = random.sample(list(variants), len(variants))
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
            "token_agreement": found and found.num_agreeing / found.num_tokens,
            "kl_nats_per_token": found and found.kl_nats / found.num_tokens,
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
