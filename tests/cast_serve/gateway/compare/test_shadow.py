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


def run_shadow(
    fake: FakeVariants, offer: Callable[[Shadow], None], **settings: Any
) -> tuple[Any, Shadow]:
    """The comparison's agreement after what `offer` offered has ended."""

    async def run() -> tuple[Any, Shadow]:
        comparison = Comparison(["dense", "sparse"], window=16)
        shadow = Shadow(
            **{"fraction": 1.0, "max_concurrent": 4, **settings},
            comparison=comparison,
            complete=fake.complete,
        )
        offer(shadow)
        await ended()
        return comparison.snapshot()["agreement"], shadow

    return asyncio.run(run())


async def ended() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=10)


@pytest.mark.parametrize(("variant", "ratio"), [("dense", 0.6 / 0.3), ("sparse", 0.3 / 0.6)])
def test_a_request_is_repeated_on_the_other_and_both_are_scored(variant: str, ratio: float) -> None:
    fake = FakeVariants()
    found, shadow = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, BODY, variant, " a b c", PRIMARY)
    )
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
    assert shadow.outcomes == {"finished": 1, "failed": 0, "dropped": 0}


def test_a_streamed_request_is_repeated_streamed() -> None:
    fake = FakeVariants()
    body = {**BODY, "stream": True}
    found, _ = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, body, "dense", " a b c", PRIMARY)
    )
    assert fake.calls[0][1]["stream"] is True
    assert not any("stream" in body for _, body, _ in fake.calls[1:])
    assert found["ttft_ratio"]["ratio"] == pytest.approx(0.4 / 0.2)


def test_answers_of_other_lengths_have_no_ratio_of_e2e() -> None:
    longer = RequestTiming(0.0, (), 0.9, 4)
    found, _ = run_shadow(
        FakeVariants(), lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", " a b c", longer)
    )
    assert found["e2e_ratio"] is None
    assert found["token_agreement"]["n_tokens"] == 3


def test_a_prompt_of_token_ids_is_followed_by_the_answers() -> None:
    fake = FakeVariants()
    body = {**BODY, "prompt": [5, 6], "add_special_tokens": False}
    found, _ = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, body, "dense", " a b c", PRIMARY)
    )
    _, tokenised, *forced = (body for _, body, _ in fake.calls)
    assert (tokenised["prompt"], tokenised["add_special_tokens"]) == (" a b c", False)
    assert [body["prompt"] for body in forced] == [[5, 6, 7, 8, 9]] * 2
    assert [body["add_special_tokens"] for body in forced] == [False] * 2
    assert found["token_agreement"]["n_tokens"] == 3


@pytest.mark.parametrize(
    ("route", "body", "text"),
    [
        (CHAT, {"model": "any", "messages": [{"role": "user", "content": "Hi"}]}, "a"),
        (COMPLETIONS, {**BODY, "prompt": ["Hi", "Ho"]}, "a"),
        (COMPLETIONS, {**BODY, "prompt": [[5], [6]]}, "a"),
        (COMPLETIONS, {**BODY, "n": 2}, "a"),
        (COMPLETIONS, {**BODY, "echo": True}, "Hi a"),
        (COMPLETIONS, BODY, ""),
    ],
)
def test_what_cannot_be_scored_gives_latency_alone(
    route: str, body: dict[str, Any], text: str
) -> None:
    fake = FakeVariants()
    found, _ = run_shadow(fake, lambda shadow: shadow.offer(route, body, "dense", text, PRIMARY))
    assert [(variant, route) for variant, _, route in fake.calls] == [("sparse", route)]
    assert found["token_agreement"] is None
    assert found["e2e_ratio"]["ratio"] == pytest.approx(2)


def test_a_long_text_is_not_scored() -> None:
    fake = FakeVariants()
    long = RequestTiming(0.0, (), 9.0, 1023)  # and two of the prompt
    run_shadow(fake, lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", "a", long))
    assert len(fake.calls) == 1


def test_a_text_that_fills_a_workers_context_is_not_scored() -> None:
    fake = FakeVariants()
    found, shadow = run_shadow(
        fake,
        lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", " a b c", PRIMARY),
        max_tokens=lambda: 4,
    )
    assert len(fake.calls) == 1
    assert (found["token_agreement"], shadow.outcomes["finished"]) == (None, 1)


def test_a_refusal_to_score_gives_latency_alone(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeVariants()
    fake.refusal = APIError(400, "the context is 5 tokens", "invalid_request_error")
    found, shadow = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", " a b c", PRIMARY)
    )
    assert found["token_agreement"] is None
    assert found["e2e_ratio"]["ratio"] == pytest.approx(2)
    assert shadow.outcomes == {"finished": 1, "failed": 0, "dropped": 0}
    assert "latency alone: a worker refused to score prompt and answer: the con" in caplog.text


def test_off_does_nothing() -> None:
    fake = FakeVariants()

    def offer(shadow: Shadow) -> None:
        assert not shadow.is_on
        for _ in range(100):
            shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)

    found, shadow = run_shadow(fake, offer, fraction=0.0)
    assert (found, fake.calls, shadow.outcomes["dropped"]) == (None, [], 0)


def test_a_third_variant_is_left_alone() -> None:
    fake = FakeVariants()
    run_shadow(fake, lambda shadow: shadow.offer(COMPLETIONS, BODY, "third", "a", PRIMARY))
    assert fake.calls == []


def test_the_fraction_is_kept_and_the_seed_chooses() -> None:
    def chosen(seed: int) -> list[int]:
        fake = FakeVariants()

        def offer(shadow: Shadow) -> None:
            for number in range(1000):
                body = {**BODY, "max_tokens": number}
                shadow.offer(CHAT, body, "dense", "a", PRIMARY)

        run_shadow(fake, offer, fraction=0.2, max_concurrent=1000, seed=seed)
        return [body["max_tokens"] for _, body, _ in fake.calls]

    assert 150 < len(chosen(0)) < 250
    assert chosen(0) == chosen(0) != chosen(1)


def test_the_budget_is_kept_and_what_is_above_it_counted() -> None:
    async def run() -> None:
        gate = asyncio.Event()
        num_running = highest = num_calls = 0

        async def complete(
            variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
        ) -> tuple[dict[str, Any], RequestTiming]:
            nonlocal num_running, highest, num_calls
            num_calls += 1
            num_running += 1
            highest = max(highest, num_running)
            await gate.wait()
            num_running -= 1
            return {"choices": [], "usage": {"prompt_tokens": 2}}, PRIMARY

        shadow = Shadow(1.0, 2, Comparison(["dense", "sparse"], 8), complete)
        for _ in range(10):
            shadow.offer(CHAT, BODY, "dense", "a", PRIMARY)
            await asyncio.sleep(0)
        assert (num_running, num_calls, shadow.outcomes["dropped"]) == (2, 2, 8)
        gate.set()
        await ended()
        shadow.offer(CHAT, BODY, "dense", "a", PRIMARY)  # there is room again
        await ended()
        assert (highest, num_calls) == (2, 3)
        assert shadow.outcomes == {"finished": 3, "failed": 0, "dropped": 8}

    asyncio.run(run())


def test_failures_stay_inside_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeVariants):
        async def complete(
            self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
        ) -> tuple[dict[str, Any], RequestTiming]:
            raise ConnectionError("sparse is gone" + "x" * 1000)

    def offer(shadow: Shadow) -> None:
        for _ in range(3):
            shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)

    with caplog.at_level(logging.WARNING):
        found, shadow = run_shadow(Broken(), offer)
    assert (found, shadow.outcomes["failed"], shadow.outcomes["finished"]) == (None, 3, 0)
    [record] = caplog.records
    assert "ConnectionError: sparse is gone" in record.getMessage()
    assert len(record.getMessage()) < 300


def test_an_answer_of_another_shape_is_a_failure() -> None:
    class Odd(FakeVariants):
        dense = None  # type: ignore[assignment]

    _, shadow = run_shadow(
        Odd(), lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)
    )
    assert shadow.outcomes["failed"] == 1


def test_close_cancels_what_runs_and_ends_the_offers() -> None:
    async def run() -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def complete(
            variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
        ) -> tuple[dict[str, Any], RequestTiming]:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

        shadow = Shadow(1.0, 2, Comparison(["dense", "sparse"], 8), complete)
        shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)
        await started.wait()
        await asyncio.wait_for(shadow.close(), timeout=10)
        assert cancelled.is_set()
        shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (shadow.outcomes["failed"], shadow.outcomes["dropped"]) == (0, 0)

    asyncio.run(run())
