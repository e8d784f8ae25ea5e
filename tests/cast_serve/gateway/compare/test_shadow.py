import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.latency import RequestTiming
from tests.cast_serve.gateway.compare.fakes import BODY, COMPLETIONS, KL_OF_ANSWER, FakeVariants

CHAT = "/v1/chat/completions"
PRIMARY = RequestTiming(0.0, (0.4, 0.5, 0.6), 0.6, 3)
FINISHED = {"finished": 1, "failed": 0, "dropped": 0}
Offer = Callable[[Shadow], None]


def offer(
    route: str = COMPLETIONS,
    body: dict[str, Any] = BODY,
    variant: str = "dense",
    text: str = " a b c",
    timing: RequestTiming = PRIMARY,
) -> Offer:
    return lambda shadow: shadow.offer(route, body, variant, text, timing)


def run_shadow(fake: FakeVariants, *offers: Offer, **settings: Any) -> tuple[Any, dict[str, int]]:
    """The comparison's agreement and the outcomes once everything offered has ended."""

    async def run() -> tuple[Any, dict[str, int]]:
        comparison = Comparison(["dense", "sparse"], window=16)
        defaults: dict[str, Any] = {"fraction": 1.0, "max_concurrent": 4}
        shadow = Shadow(**defaults | settings, comparison=comparison, complete=fake.complete)
        for each in offers:
            each(shadow)
        await ended()
        return comparison.snapshot()["agreement"], shadow.outcomes

    return asyncio.run(run())


async def ended() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=10)


@pytest.mark.parametrize(("variant", "ratio"), [("dense", 0.6 / 0.3), ("sparse", 0.3 / 0.6)])
def test_a_request_is_repeated_on_the_other_and_both_are_scored(variant: str, ratio: float) -> None:
    fake = FakeVariants()
    found, outcomes = run_shadow(fake, offer(variant=variant))
    other = {"dense": "sparse", "sparse": "dense"}[variant]
    assert fake.calls[0] == (other, BODY, COMPLETIONS)
    for name, (asked, body, _) in zip(("dense", "sparse"), fake.calls[1:], strict=True):
        assert asked == name
        assert body["prompt"] == "Hi a b c"
        assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0, 20)
    assert found["token_agreement"]["mean"] == pytest.approx(2 / 3)
    assert found["token_agreement"]["n_tokens"] == 3
    assert found["kl_nats"]["mean"] == pytest.approx(KL_OF_ANSWER / 3)
    assert found["e2e_ratio"]["ratio"] == pytest.approx(ratio)
    assert found["ttft_ratio"] is None  # the repetition was not streamed
    assert outcomes == FINISHED


def test_a_streamed_request_is_repeated_streamed() -> None:
    fake = FakeVariants()
    found, _ = run_shadow(fake, offer(body={**BODY, "stream": True}))
    assert fake.calls[0][1]["stream"] is True
    assert not any("stream" in body for _, body, _ in fake.calls[1:])
    assert found["ttft_ratio"]["ratio"] == pytest.approx(0.4 / 0.2)


def test_answers_of_different_lengths_have_no_ratio_of_e2e() -> None:
    found, _ = run_shadow(FakeVariants(), offer(timing=RequestTiming(0.0, (), 0.9, 4)))
    assert found["e2e_ratio"] is None
    assert found["token_agreement"]["n_tokens"] == 3


def test_a_prompt_of_token_ids_is_followed_by_the_answers() -> None:
    fake = FakeVariants()
    found, _ = run_shadow(fake, offer(body={**BODY, "prompt": [5, 6], "add_special_tokens": False}))
    _, tokenised, *forced = (body for _, body, _ in fake.calls)
    assert (tokenised["prompt"], tokenised["add_special_tokens"]) == (" a b c", False)
    assert [body["prompt"] for body in forced] == [[5, 6, 7, 8, 9]] * 2
    assert [body["add_special_tokens"] for body in forced] == [False] * 2
    assert found["token_agreement"]["n_tokens"] == 3


@pytest.mark.parametrize(
    ("offered", "settings"),
    [
        ({"route": CHAT, "body": {"messages": [{"role": "user", "content": "Hi"}]}}, {}),
        ({"body": {**BODY, "prompt": ["Hi", "Ho"]}}, {}),
        ({"body": {**BODY, "prompt": [[5], [6]]}}, {}),
        ({"body": {**BODY, "n": 2}}, {}),
        ({"body": {**BODY, "echo": True}}, {}),
        ({"text": ""}, {}),
        ({"timing": RequestTiming(0.0, (), 0.6, 1023)}, {}),  # and two tokens of the prompt
        ({}, {"max_tokens": lambda: 4}),  # they would fill a worker's context
    ],
)
def test_what_cannot_be_scored_gives_latency_alone(
    offered: dict[str, Any], settings: dict[str, Any]
) -> None:
    fake = FakeVariants()
    found, outcomes = run_shadow(fake, offer(**offered), **settings)
    assert [variant for variant, _, _ in fake.calls] == ["sparse"]
    assert (found["token_agreement"], outcomes) == (None, FINISHED)


def test_a_refusal_to_score_gives_latency_alone(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeVariants()
    fake.refusal = APIError(400, "the context is 5 tokens", "invalid_request_error")
    found, outcomes = run_shadow(fake, offer())
    assert found["token_agreement"] is None
    assert found["e2e_ratio"]["ratio"] == pytest.approx(2)
    assert outcomes == FINISHED
    assert "the context is 5 tokens" in caplog.text


@pytest.mark.parametrize(("variant", "fraction"), [("dense", 0.0), ("third", 1.0)])
def test_off_and_a_third_variant_do_nothing(variant: str, fraction: float) -> None:
    fake = FakeVariants()
    found, outcomes = run_shadow(fake, *[offer(variant=variant)] * 100, fraction=fraction)
    assert (found, fake.calls, set(outcomes.values())) == (None, [], {0})


def test_the_fraction_is_kept_and_the_seed_chooses() -> None:
    def chosen(seed: int) -> list[int]:
        fake = FakeVariants()
        offers = [offer(CHAT, {**BODY, "max_tokens": number}) for number in range(1000)]
        run_shadow(fake, *offers, fraction=0.2, max_concurrent=1000, seed=seed)
        return [body["max_tokens"] for _, body, _ in fake.calls]

    assert 150 < len(chosen(0)) < 250
    assert chosen(0) == chosen(0) != chosen(1)


class Slow(FakeVariants):
    """Answers once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.num_running = self.highest = 0

    async def complete(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        self.num_running += 1
        self.highest = max(self.highest, self.num_running)
        try:
            await self.gate.wait()
        finally:
            self.num_running -= 1
        return await super().complete(variant, body, route)


def test_the_budget_is_kept_and_what_is_above_it_counted() -> None:
    async def run() -> None:
        fake = Slow()
        shadow = Shadow(1.0, 2, Comparison(["dense", "sparse"], 8), fake.complete)
        for _ in range(10):
            offer(CHAT)(shadow)
            await asyncio.sleep(0)
        assert (fake.num_running, shadow.outcomes["dropped"]) == (2, 8)
        fake.gate.set()
        await ended()
        offer(CHAT)(shadow)  # there is room again
        await ended()
        assert fake.highest == 2
        assert shadow.outcomes == {"finished": 3, "failed": 0, "dropped": 8}

    asyncio.run(run())


def test_close_cancels_what_runs_and_ends_the_offers() -> None:
    async def run() -> None:
        fake = Slow()
        shadow = Shadow(1.0, 2, Comparison(["dense", "sparse"], 8), fake.complete)
        offer()(shadow)
        await asyncio.sleep(0)
        assert fake.num_running == 1
        await asyncio.wait_for(shadow.close(), timeout=10)
        assert fake.num_running == 0
        offer()(shadow)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert set(shadow.outcomes.values()) == {0}

    asyncio.run(run())


class Broken(FakeVariants):
    async def complete(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        raise ConnectionError("sparse is gone" + "x" * 1000)


class Odd(FakeVariants):
    dense = None  # an answer of another shape


@pytest.mark.parametrize("fake", [Broken, Odd])
def test_failures_stay_inside_and_are_logged_once(
    fake: type[FakeVariants], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, outcomes = run_shadow(fake(), *[offer()] * 3)
    assert (found, outcomes["failed"], outcomes["finished"]) == (None, 3, 0)
    [record] = caplog.records
    assert len(record.getMessage()) < 300
