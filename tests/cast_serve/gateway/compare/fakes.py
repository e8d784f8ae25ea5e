"""Variants with fixed answers, and the KL divergence computed from these answers by hand."""

import math
from typing import Any

from cast_serve.gateway.api.errors import APIError
from cast_serve.latency import RequestTiming

COMPLETIONS = "/v1/completions"
BODY = {"model": "any", "prompt": "Hi", "max_tokens": 3}


def position(**probabilities: float) -> dict[str, dict[str, Any]]:
    """One entry of vLLM's prompt_logprobs: the k-th named token has rank k."""
    return {
        token: {"logprob": math.log(p), "rank": rank, "decoded_token": token}
        for rank, (token, p) in enumerate(probabilities.items(), start=1)
    }


class FakeVariants:
    """Variants that answer " a b c" after 0.2 s to the first and 0.3 s to the last token.

    A prompt of two tokens and the answer's three have the logprobs of `dense` or `sparse`, unless
    `refusal` is what asking for them raises.
    """

    dense: tuple[Any, ...] | None = (None, position(x=0.9), *[position(x=0.5, y=0.3)] * 3)
    sparse = (None, position(y=0.9), *[position(x=0.4, y=0.2)] * 2, position(y=0.6, x=0.3))

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], str]] = []
        self.refusal: APIError | None = None
        self.texts = {"dense": " a b c", "sparse": " a b d"}

    async def complete(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        self.calls.append((variant, body, route))
        choice: dict[str, Any] = {"text": self.texts[variant], "finish_reason": "length"}
        if body.get("prompt_logprobs"):
            if self.refusal is not None:
                raise self.refusal
            choice["prompt_logprobs"] = list(getattr(self, variant))
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = [7, 8, 9]
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        events = (0.2, 0.25, 0.3) if body.get("stream") else ()
        return {"choices": [choice], "usage": usage}, RequestTiming(0.0, events, 0.3, 3)


KL_OF_ANSWER = (
    2 * (0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.4))
    + 0.5 * math.log(0.5 / 0.3)
    + 0.3 * math.log(0.3 / 0.6)
    + 0.2 * math.log(0.2 / 0.1)
)
