"""Time stamps of one streamed request -> TTFT, ITL, TPOT and E2E, in seconds: the only definition.

    intended send      first token        token event          last
         |------ TTFT ------|------ ITL ------|------ ITL ------|
         |------------------------ E2E -------------------------|

    TTFT = first token - intended send
    ITL  = gaps between neighbouring token events
    E2E  = last - intended send
    TPOT = (E2E - TTFT) / (output_tokens - 1); none for fewer than 2 tokens

*Intended send* is when the request should have left: for a load test its place in the timetable,
for the gateway the arrival of the request. Waiting in a queue therefore counts.

A *token event* is an SSE data chunk that carries output: non-empty text, content, reasoning or
tool calls, or token ids. A chunk that only names the role, ends a choice or reports usage
is none. One event may carry several tokens, so ITL tells what a reader sees, and TPOT what the
model does. With several choices in one request the events of all of them count.

*Last* is the last token event or, when it comes later, the chunk that ends a choice (a token whose
text is empty shows only there). The usage chunk and `[DONE]` are not waited for.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TIMES = ("ttft", "tpot", "itl", "e2e")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}  # that are reported and limited

_OUTPUT_KEYS = ("text", "content", "reasoning", "reasoning_content", "tool_calls", "token_ids")


# Of every latency histogram, the workers' too: vLLM's own start at 10 ms, above a small model's
# inter-token latency.
BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0,
)  # fmt: skip


@dataclass(frozen=True)
class RequestTiming:
    """The time stamps of one finished request, on one monotonic clock, and what follows from them.

    Attributes:
        intended_send_s: when the request should have left.
        token_events_s: when each token event arrived, ascending; empty if nothing was streamed.
        last_s: when the output was complete.
        output_tokens: `usage.completion_tokens`; None if the server did not report it.
    """

    intended_send_s: float
    token_events_s: tuple[float, ...]
    last_s: float
    output_tokens: int | None

    def __post_init__(self) -> None:
        stamps = (self.intended_send_s, *self.token_events_s, self.last_s)
        if any(later < earlier for earlier, later in zip(stamps, stamps[1:], strict=False)):
            raise ValueError(f"time stamps run backwards: {stamps}; take them from one clock")
        if self.output_tokens is not None and self.output_tokens < 0:
            raise ValueError(f"output_tokens is {self.output_tokens}, but must be 0 or more")

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None if nothing was streamed."""
        return self.token_events_s[0] - self.intended_send_s if self.token_events_s else None

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies, one fewer than token events."""
        events = self.token_events_s
        return [later - earlier for earlier, later in zip(events, events[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """End-to-end latency."""
        return self.last_s - self.intended_send_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None below 2 tokens or if nothing was streamed."""
        if not self.token_events_s or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.token_events_s[0]) / (self.output_tokens - 1)


def carries_output(chunk: Mapping[str, Any]) -> bool:
    """Whether a parsed SSE data chunk of a completion or chat completion is a token event."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        for key in _OUTPUT_KEYS:
            if choice.get(key) or delta.get(key):
                return True
    return False


class Stopwatch:
    """Takes the time stamps of one request while its response streams in.

    Args:
        intended_send_s: when the request should have left, on `clock`; None means now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        intended_send_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._intended_send_s = clock() if intended_send_s is None else intended_send_s
        self._token_events_s: list[float] = []
        self._last_s: float | None = None
        self._output_tokens: int | None = None

    def observe(self, chunk: Mapping[str, Any]) -> bool:
        """Stamps one parsed SSE data chunk as it arrives; reads `usage` when the chunk has it.

        Returns:
            Whether the chunk was a token event.
        """
        now_s = self._clock()
        if usage := chunk.get("usage"):
            self._output_tokens = usage.get("completion_tokens", self._output_tokens)
        is_token_event = carries_output(chunk)
        if is_token_event:
            self._token_events_s.append(now_s)
        if is_token_event or any(c.get("finish_reason") for c in chunk.get("choices") or ()):
            self._last_s = now_s
        return is_token_event

    def finish(self, output_tokens: int | None = None) -> RequestTiming:
        """Closes the request.

        Args:
            output_tokens: the count, if known from elsewhere than the stream's own `usage`.

        Returns:
            The timing; for a response that was not streamed, `last` is now.
        """
        return RequestTiming(
            intended_send_s=self._intended_send_s,
            token_events_s=tuple(self._token_events_s),
            last_s=self._clock() if self._last_s is None else self._last_s,
            output_tokens=self._output_tokens if output_tokens is None else output_tokens,
        )
