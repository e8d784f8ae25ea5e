"""A prompt, an answer and two variants -> how far they agree about it, token by token.

Both are asked for one token more, with `prompt_logprobs`, so that they judge the same text at every
position (teacher forcing), and one early difference does not spoil the rest.

KL(baseline || candidate) is over the tokens that both top lists hold, and one bucket for all the
others. Merging tokens into a bucket can only hide differences: it is a lower bound.
"""

import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cast_serve.gateway.api.errors import APIError
from cast_serve.latency import RequestTiming

Logprobs = Sequence[Mapping[str, Mapping[str, Any]] | None]
"""vLLM's `prompt_logprobs`: per token {token id: {"logprob": nats, "rank": from 1}}, first None."""

COMPLETIONS = "/v1/completions"
NUM_LOGPROBS = 20  # vLLM's own limit unless --max-logprobs says otherwise
MAX_TOKENS = 1024  # prompt and answer; their logprobs are 1.5 MB of JSON, read beside live traffic
ROUNDING = 1e-6  # of float32 probabilities: less than this in the bucket is noise


@dataclass(frozen=True)
class Agreement:
    """What one prompt, given to both variants, says about them.

    Attributes:
        num_tokens: positions of the answer that both judged; 0 if only latency is known.
        num_agreeing: those where both find the same token likeliest.
        kl_nats: KL(baseline || candidate), a lower bound, summed over the tokens.
        ttft_ratio: baseline over candidate; None if an answer was not streamed.
        e2e_ratio: likewise; None unless both answers have as many tokens.
    """

    num_tokens: int
    num_agreeing: int
    kl_nats: float
    ttft_ratio: float | None
    e2e_ratio: float | None


class RefusedError(Exception):
    """A text cannot be scored; the message says why."""


class Complete(Protocol):
    """Sends a body to a variant, under its name; raises what it likes if that fails.

    Returns:
        The answer, streamed or not in the shape of one that was not, and its timing.
    """

    def __call__(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> Awaitable[tuple[dict[str, Any], RequestTiming]]: ...


def agreement_of(
    baseline_logprobs: Logprobs, candidate_logprobs: Logprobs, first_position: int
) -> Agreement | None:
    """How far two variants agree about one text, token by token.

    Args:
        baseline_logprobs: of the whole text, prompt included.
        candidate_logprobs: likewise.
        first_position: index of the answer's first token. Where the text's tokens differ from the
            prompt's and the answer's own, as when they merge at the seam, it is off by one or two.

    Returns:
        The agreement, without ratios; None if there is no such position, or if the variants cut the
        text into different numbers of tokens.
    """
    if len(baseline_logprobs) != len(candidate_logprobs):
        return None
    pairs = [
        (baseline, candidate)
        for baseline, candidate in zip(
            baseline_logprobs[first_position:], candidate_logprobs[first_position:], strict=True
        )
        if baseline and candidate
    ]
    if not pairs:
        return None
    num_agreeing = sum(_likeliest(p) == _likeliest(q) for p, q in pairs)
    return Agreement(len(pairs), num_agreeing, sum(_kl_nats(p, q) for p, q in pairs), None, None)


def _likeliest(tokens: Mapping[str, Mapping[str, Any]]) -> str:
    return min(tokens, key=lambda token: tokens[token]["rank"])


def _kl_nats(
    baseline: Mapping[str, Mapping[str, Any]], candidate: Mapping[str, Mapping[str, Any]]
) -> float:
    logs = [
        (tokens["logprob"], candidate[token]["logprob"])
        for token, tokens in baseline.items()
        if token in candidate
    ]
    rest_p = max(1 - sum(math.exp(p) for p, _ in logs), ROUNDING)
    rest_q = max(1 - sum(math.exp(q) for _, q in logs), ROUNDING)
    kl_nats = sum(math.exp(p) * (p - q) for p, q in logs) + rest_p * math.log(rest_p / rest_q)
    return max(kl_nats, 0.0)


def max_scored_tokens(context_lengths: Iterable[int | None]) -> int:
    """Tokens that prompt and answer may have to be scored: each variant is asked for one more.

    Args:
        context_lengths: in tokens, of the variants; None: not known.
    """
    return min([MAX_TOKENS, *(length - 1 for length in context_lengths if length is not None)])


def is_scorable(body: Mapping[str, Any]) -> bool:
    prompt = body["prompt"]
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return is_one and body.get("n") in (None, 1) and not body.get("echo")


async def agreements(
    body: Mapping[str, Any],
    answer_text: str,
    num_prompt_tokens: int,
    num_answer_tokens: int,
    variants: Sequence[str],
    complete: Complete,
    max_tokens: int,
) -> dict[str, Agreement | None]:
    """How far each other variant agrees with the first about one answer; see `agreement_of`.

    Args:
        body: that was answered, see `is_scorable`.
        answer_text: the baseline's, or that of live traffic.
        num_prompt_tokens: as the worker counted them, as the next.
        num_answer_tokens: of `answer_text`.
        variants: names, the baseline first.
        complete: asks a variant.
        max_tokens: of prompt and answer together, see `max_scored_tokens`.

    Raises:
        RefusedError: if there are more tokens, or a worker answers 400.
        APIError: if one fails in another way.
    """
    num_tokens = num_prompt_tokens + num_answer_tokens
    if num_tokens > max_tokens:
        raise RefusedError(
            f"prompt and answer have {num_tokens} tokens; up to {max_tokens} are compared"
        )
    try:
        forced = await _forced_text(body, answer_text, variants[0], complete)
        logprobs = {name: await _logprobs_of(body, forced, name, complete) for name in variants}
    except APIError as error:
        if error.status != 400:
            raise
        raise RefusedError(f"a worker refused to score prompt and answer: {error}") from error
    baseline, *others = variants
    return {
        name: agreement_of(logprobs[baseline], logprobs[name], num_prompt_tokens) for name in others
    }


async def _forced_text(
    body: Mapping[str, Any], answer_text: str, variant: str, complete: Complete
) -> str | list[int]:
    """The prompt followed by the answer, as the prompt came: text, or token ids."""
    prompt: str | list[int] = body["prompt"]
    if isinstance(prompt, str):
        return prompt + answer_text
    answer, _ = await complete(
        variant,
        {
            "prompt": answer_text,
            "max_tokens": 1,
            "add_special_tokens": False,
            "return_token_ids": True,
        },
    )
    return [*prompt, *answer["choices"][0]["prompt_token_ids"]]


async def _logprobs_of(
    body: Mapping[str, Any], forced: str | list[int], variant: str, complete: Complete
) -> Logprobs:
    answer, _ = await complete(
        variant,
        {
            "prompt": forced,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": NUM_LOGPROBS,
            "add_special_tokens": body.get("add_special_tokens") is not False,
        },
    )
    choices = answer.get("choices") or [{}]
    found: Logprobs = choices[0].get("prompt_logprobs") or ()  # a server that is not vLLM has none
    if any(entry["logprob"] > ROUNDING for tokens in found if tokens for entry in tokens.values()):
        raise APIError(
            503,
            f"variant {variant!r} reports logits instead of log probabilities, so agreement "
            "cannot be measured; start its worker without --logprobs-mode",
            "server_error",
            "no_log_probabilities",
        )
    return found
