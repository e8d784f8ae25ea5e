"""A finished request -> the same on the other variant, unseen: paired latency and agreement.

    client <-- answer -- gateway, variant A
                            | offer(), returns at once
                            v
              1. the request again, on B            the ratio of the two latencies
              2. prompt and A's answer, on both     what each would have said at every token

Step 2 is *teacher-forced*: one token is asked for, with `prompt_logprobs`, so that both variants
judge the same text at every position, and one early difference does not spoil the rest. It needs
a completion with one prompt and one choice; chat completions and long texts give latency alone.

KL(baseline || candidate) is over the tokens that both top lists hold, and one bucket for all the
others. Merging tokens into a bucket can only hide differences: it is a lower bound.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any, Protocol

from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.compare.live import Agreement, Comparison
from cast_serve.latency import RequestTiming

logger = logging.getLogger(__name__)

Logprobs = Sequence[Mapping[str, Mapping[str, Any]] | None]
"""vLLM's `prompt_logprobs`: per token {token id: {"logprob": nats, "rank": from 1}}, first None."""

COMPLETIONS = "/v1/completions"
NUM_LOGPROBS = 20  # vLLM's own limit unless --max-logprobs says otherwise
MAX_TOKENS = 1024  # prompt and answer; their logprobs are 1.5 MB of JSON, read beside live traffic
ROUNDING = 1e-6  # of float32 probabilities: less than this in the bucket is noise
LOG_INTERVAL_S = 60.0


class Complete(Protocol):
    """Sends a body to a variant; raises what it likes if that fails.

    Returns:
        The answer, streamed or not in the shape of one that was not, and its timing.
    """

    def __call__(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> Awaitable[tuple[dict[str, Any], RequestTiming]]: ...


class Shadow:
    """Repeats a share of the finished requests on the other variant, within a budget.

    Args:
        fraction: share of the requests, 0 to 1; 0 does nothing.
        max_concurrent: how many may be repeated at once; more are dropped and counted.
        comparison: where the agreements go.
        complete: streams if the body says so.
        seed: of the choice of requests.

    Attributes:
        num_finished: repeated requests whose agreement was observed.
        num_dropped: chosen requests that were not repeated for want of room.
        num_failed: those that were, but in vain.
    """

    def __init__(
        self,
        fraction: float,
        max_concurrent: int,
        comparison: Comparison,
        complete: Complete,
        seed: int = 0,
    ) -> None:
        self.num_finished = 0
        self.num_dropped = 0
        self.num_failed = 0
        self._fraction = fraction
        self._max_concurrent = max_concurrent
        self._comparison = comparison
        self._complete = complete
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._logged_s = -math.inf

    @property
    def is_on(self) -> bool:
        """Whether an offer can lead to anything."""
        return self._fraction > 0 and self._comparison.candidate is not None

    def offer(
        self,
        route: str,
        body: Mapping[str, Any],
        variant: str,
        answer_text: str,
        timing: RequestTiming,
    ) -> None:
        """Takes note of a finished request; returns at once and never raises.

        Args:
            route: where it came in, as /v1/completions.
            body: what the client sent.
            variant: who answered.
            answer_text: the first choice's text.
            timing: from when the worker got it, as a repetition does not queue at the gateway.
        """
        comparison = self._comparison
        if not self.is_on or variant not in (comparison.baseline, comparison.candidate):
            return
        if self._random.random() >= self._fraction:
            return
        if len(self._running) >= self._max_concurrent:
            self.num_dropped += 1
            return
        task = asyncio.create_task(self._run(route, dict(body), variant, answer_text, timing))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancels what runs; later offers do nothing."""
        self._fraction = 0
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(
        self, route: str, body: dict[str, Any], variant: str, text: str, timing: RequestTiming
    ) -> None:
        try:
            agreement = await self._measure(route, body, variant, text, timing)
        except Exception as error:  # whatever it is, no client may notice
            self.num_failed += 1
            if time.monotonic() - self._logged_s >= LOG_INTERVAL_S:
                self._logged_s = time.monotonic()
                logger.warning(
                    "%d shadow requests failed so far, the last with %s: %s",
                    self.num_failed,
                    type(error).__name__,
                    str(error)[:200],
                )
        else:
            self.num_finished += 1
            self._comparison.observe_agreement(agreement)

    async def _measure(
        self, route: str, body: dict[str, Any], variant: str, text: str, timing: RequestTiming
    ) -> Agreement:
        baseline, candidate = self._comparison.baseline, self._comparison.candidate
        assert candidate is not None
        is_baseline = variant == baseline
        other = candidate if is_baseline else baseline
        repeated = {**body, "model": other}
        if body.get("stream"):
            repeated["stream_options"] = {"include_usage": True}
        answer, other_timing = await self._complete(other, repeated, route)
        slow, fast = (timing, other_timing) if is_baseline else (other_timing, timing)

        agreement = None
        first_position = answer["usage"]["prompt_tokens"]
        num_tokens = first_position + (timing.output_tokens or 0)
        if route == COMPLETIONS and text and _is_scorable(body) and num_tokens <= MAX_TOKENS:
            forced = await _forced(body, text, baseline, self._complete)
            agreement = agreement_of(
                await _logprobs(body, forced, baseline, self._complete),
                await _logprobs(body, forced, candidate, self._complete),
                first_position,
            )
        return replace(
            agreement or Agreement(0, 0, 0.0, None, None),
            ttft_ratio=_ratio(slow.ttft_s, fast.ttft_s),
            e2e_ratio=_ratio(slow.e2e_s, fast.e2e_s)
            if slow.output_tokens == fast.output_tokens
            else None,
        )


async def compare(
    prompt_body: dict[str, Any],
    variants: Sequence[str],
    complete: Complete,
) -> dict[str, Any]:
    """One prompt on every variant, one after the other: the body of POST /v1/compare.

    Args:
        prompt_body: of a completion with one text as its prompt and one choice, checked.
        variants: names; the first is the baseline, on whose text agreement is measured.
        complete: sends a body to a variant.

    Returns:
        `variants`: each one's text and times; `order`: in which they were asked, drawn anew each
        time, because the first may find colder caches; `agreement`: of each other variant with the
        baseline, None where the tokens cannot be compared, and with a `reason` where prompt and
        answer are longer than `MAX_TOKENS`.
    """
    order = random.sample(list(variants), len(variants))
    answers, timings = {}, {}
    for variant in order:
        body = {**prompt_body, "model": variant, "stream": True}
        body["stream_options"] = {"include_usage": True}
        answers[variant], timings[variant] = await complete(variant, body)
    choices = {variant: answer["choices"][0] for variant, answer in answers.items()}
    baseline = variants[0]
    prompt_tokens = answers[baseline]["usage"]["prompt_tokens"]
    text = choices[baseline]["text"]
    num_tokens = prompt_tokens + (timings[baseline].output_tokens or 0)
    is_short = num_tokens <= MAX_TOKENS
    logprobs: dict[str, Logprobs] = dict.fromkeys(variants, ())
    if is_short:
        forced = await _forced(prompt_body, text, baseline, complete)
        for name in variants:
            logprobs[name] = await _logprobs(prompt_body, forced, name, complete)

    agreements: dict[str, Any] = {"baseline": baseline}
    for variant in variants[1:]:
        found = agreement_of(logprobs[baseline], logprobs[variant], prompt_tokens)
        agreements[variant] = {
            "token_agreement": found and found.num_agreeing / found.num_tokens,
            "kl_nats_per_token": found and found.kl_nats / found.num_tokens,
            "num_tokens": found.num_tokens if found else 0,
            "common_prefix_characters": len(commonprefix([text, choices[variant]["text"]])),
        }
        if not is_short:
            agreements[variant]["reason"] = (
                f"prompt and answer have {num_tokens} tokens; up to {MAX_TOKENS} are compared"
            )
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
        "agreement": agreements,
    }


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


def _is_scorable(body: Mapping[str, Any]) -> bool:
    prompt = body["prompt"]
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return is_one and body.get("n") in (None, 1) and not body.get("echo")


async def _forced(
    body: Mapping[str, Any], answer_text: str, variant: str, complete: Complete
) -> str | list[int]:
    """The prompt followed by the answer, as the prompt came: text, or token ids."""
    prompt: str | list[int] = body["prompt"]
    if isinstance(prompt, str):
        return prompt + answer_text
    answer, _ = await complete(
        variant,
        {
            "model": variant,
            "prompt": answer_text,
            "max_tokens": 1,
            "add_special_tokens": False,
            "return_token_ids": True,
        },
    )
    return [*prompt, *answer["choices"][0]["prompt_token_ids"]]


async def _logprobs(
    body: Mapping[str, Any], forced: str | list[int], variant: str, complete: Complete
) -> Logprobs:
    answer, _ = await complete(
        variant,
        {
            "model": variant,
            "prompt": forced,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": NUM_LOGPROBS,
            "add_special_tokens": body.get("add_special_tokens") is not False,
        },
    )
    found: Logprobs = answer["choices"][0]["prompt_logprobs"]
    if any(entry["logprob"] > ROUNDING for tokens in found if tokens for entry in tokens.values()):
        raise APIError(
            503,
            f"variant {variant!r} reports logits and not log probabilities, so agreement cannot be "
            "measured; start its worker without --logprobs-mode",
            "server_error",
            "no_log_probabilities",
        )
    return found


def _ratio(slow_s: float | None, fast_s: float | None) -> float | None:
    return slow_s / fast_s if slow_s and fast_s else None
