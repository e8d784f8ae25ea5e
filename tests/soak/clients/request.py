"""A key -> one request of a client's, and the only answer that is right for it.

A fake worker's token says for which variant, request, choice and place it is, so that one that was
lost, doubled, swapped or given to another client is seen:

    prompt  soak KEY WIDTH          answer  <dense KEY 0 0><dense KEY 0 1>...     (choice 0)

WIDTH is the least number of characters of a token. Real workers are asked for a text of one choice
(`structured_outputs`), which they can answer by nothing else.
"""

import random
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT, COMPARE = "/v1/completions", "/v1/chat/completions", "/v1/compare"
VARIANTS = ("dense", "sparse")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def token(variant: str, key: str, choice: int, place: int, width: int) -> str:
    """One token of a fake worker's."""
    return f"<{variant} {key} {choice} {place}>".ljust(width, ".")


def gap_s(key: str) -> float:
    """What a fake worker waits between two tokens of a request."""
    return (0.0, 0.0, 0.001, 0.003, 0.02)[int(key[-1], 16) % 5]


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        key: hexadecimal digits, its own; also its X-Request-Id.
        route: COMPLETIONS, CHAT or COMPARE.
        variant: who is asked; empty for a comparison.
        num_tokens: of each choice.
        num_choices: how many.
        width: characters of a token, at least.
        is_stream: whether its answer is streamed.
        has_usage: whether the stream shall end with the usage.
        text: what a real worker must say, empty: anything; None: the worker is a fake.
        headers: beside X-Request-Id.
    """

    key: str
    route: str
    variant: str
    num_tokens: int
    num_choices: int = 1
    width: int = 0
    is_stream: bool = False
    has_usage: bool = False
    text: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        prompt = f"soak {self.key} {self.width}"
        body: dict[str, Any] = {"max_tokens": self.num_tokens}
        if self.route == COMPARE:
            return {**body, "prompt": prompt}
        body |= {"model": self.variant, "n": self.num_choices, "stream": self.is_stream}
        if self.text:
            body["structured_outputs"] = {"choice": [self.text]}
        if self.has_usage:
            body["stream_options"] = {"include_usage": True}
        if self.route == CHAT:
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}

    def expected(self, variant: str, choice: int) -> str:
        """The text of a choice, if that variant answers."""
        if self.text is not None:
            return self.text
        places = range(self.num_tokens)
        return "".join(token(variant, self.key, choice, place, self.width) for place in places)


class Asks:
    """Requests in an order that a seed fixes.

    Args:
        seed: of what is drawn.
        is_real: whether workers are vLLM's. How many tokens their text has only they know.
    """

    def __init__(self, seed: str, is_real: bool) -> None:
        self.random = random.Random(seed)
        self._is_real = is_real
        self._number = 0

    def next(self, route: str, *, is_stream: bool = True, num_tokens: int = 0, **more: Any) -> Ask:
        """The next request; what is not given is drawn."""
        draw = self.random
        self._number += 1
        key = f"{self._number:010x}{draw.getrandbits(16):04x}"
        num_tokens = num_tokens or draw.choice((1, 2, 4, 8, 12, 24))
        text = None
        if route == COMPARE:
            text = "" if self._is_real else None  # "": any
            return Ask(key, route, "", max(2, min(num_tokens, 8)), text=text)
        if self._is_real:
            text = "".join(draw.choices(LETTERS, k=num_tokens))
        else:
            more = {"num_choices": draw.choice((1, 1, 1, 1, 2)), **more}
        has_usage = is_stream and (self._is_real or draw.random() < 0.3)
        variant = draw.choice(VARIANTS)
        return Ask(
            key,
            route,
            variant,
            num_tokens,
            is_stream=is_stream,
            has_usage=has_usage,
            text=text,
            **more,
        )
