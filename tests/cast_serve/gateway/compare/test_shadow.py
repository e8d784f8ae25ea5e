import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

from cast_serve.gateway.compare.agreement import Agreement, agreement_of
from cast_serve.gateway.compare.live import Comparison
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.compare.side_by_side import compare
from cast_serve.latency import RequestTiming

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"model": "any", "prompt": "Hi", "max_tokens": 3}
PRIMARY = RequestTiming(0.0, (0.4, 0.5, 0.6), 0.6, 3)


def position(**probabilities: float) -> dict[str, dict[str, Any]]:
    """One entry of vLLM's prompt_logprobs: the k-th named token has rank k."""
    return {
        token: {"logprob": math.log(p), "rank": rank, "decoded_token": token}
        for rank, (token, p) in enumerate(probabilities.items(), start=1)
    }


class FakeVariants:
    """Variants that answer " a b c" after 0.2 s to the first and 0.3 s to the last token.

    A prompt of two tokens and the answer's three have the logprobs of `dense` or `sparse`.
    """

    dense: tuple[Any, ...] | None = (None, position(x=0.9), *[position(x=0.5, y=0.3)] * 3)
    sparse = (None, position(y=0.9), *[position(x=0.4, y=0.2)] * 2, position(y=0.6, x=0.3))

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], str]] = []
        self.texts = {"dense": " a b c", "sparse": " a b d"}

    async def complete(
        self, variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        self.calls.append((variant, body, route))
        choice: dict[str, Any] = {"text": self.texts[variant], "finish_reason": "length"}
        if body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = list(getattr(self, variant))
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = [7, 8, 9]
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        events = (0.2, 0.25, 0.3) if body.get("stream") else ()
        return {"choices": [choice], "usage": usage}, RequestTiming(0.0, events, 0.3, 3)


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


# agreement_of


def test_identical_variants_agree_and_do_not_diverge() -> None:
    logprobs = [None, position(a=0.6, b=0.3), position(b=0.7, c=0.1)]
    assert agreement_of(logprobs, logprobs, 1) == Agreement(2, 2, 0.0, None, None)


def test_kl_by_hand_with_the_rest_in_one_bucket() -> None:
    baseline = [None, position(a=0.5, b=0.3, c=0.1)]
    candidate = [None, position(b=0.6, a=0.2, d=0.1)]
    found = agreement_of(baseline, candidate, 1)
    assert found is not None
    assert (found.num_tokens, found.num_agreeing) == (1, 0)
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.2)
    assert found.kl_nats == pytest.approx(by_hand)


def test_kl_goes_from_the_baseline_to_the_candidate() -> None:
    one, other = [position(a=0.9, b=0.1)], [position(a=0.5, b=0.5)]
    there, back = agreement_of(one, other, 0), agreement_of(other, one, 0)
    assert there is not None
    assert back is not None
    assert there.kl_nats == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-5)
    assert back.kl_nats == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-5)


def test_kl_with_a_bucket_never_exceeds_the_whole() -> None:
    p, q = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    whole = sum(p[token] * math.log(p[token] / q[token]) for token in p)
    bounds = []
    for kept in ("a", "ab", "abc", "abcd"):
        cut = ({token: of[token] for token in kept} for of in (p, q))
        found = agreement_of(*([position(**of)] for of in cut), 0)
        assert found is not None
        bounds.append(found.kl_nats)
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1] == pytest.approx(whole, abs=1e-5)


def test_tokens_that_only_one_list_holds_are_in_the_bucket() -> None:
    found = agreement_of([position(a=0.75)], [position(b=0.5)], 0)
    assert found == Agreement(1, 0, 0.0, None, None)  # nothing in common: the bound is 0


def test_probabilities_that_round_above_one_are_no_error() -> None:
    found = agreement_of([position(a=1.0)], [position(a=1.0000001)], 0)
    assert found == Agreement(1, 1, 0.0, None, None)  # and not below 0


def test_the_prompt_does_not_count() -> None:
    found = agreement_of(FakeVariants.dense, FakeVariants.sparse, 2)
    assert found is not None
    assert (found.num_tokens, found.num_agreeing) == (3, 2)


def test_likeliest_is_by_rank_not_by_place() -> None:
    actual_token_first = {"y": {"logprob": -3.0, "rank": 9}, **position(x=0.5)}
    found = agreement_of([actual_token_first], [position(x=0.5)], 0)
    assert found is not None
    assert found.num_agreeing == 1


@pytest.mark.parametrize(("other_length", "first"), [(4, 2), (5, 5)])
def test_what_cannot_be_aligned_is_none(other_length: int, first: int) -> None:
    assert agreement_of(FakeVariants.dense, FakeVariants.sparse[:other_length], first) is None


# Shadow

KL_OF_ANSWER = (
    2 * (0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.4))
    + 0.5 * math.log(0.5 / 0.3)
    + 0.3 * math.log(0.3 / 0.6)
    + 0.2 * math.log(0.2 / 0.1)
)


@pytest.mark.parametrize(("variant", "ratio"), [("dense", 0.6 / 0.3), ("sparse", 0.3 / 0.6)])
def test_a_request_is_repeated_on_the_other_and_both_are_scored(variant: str, ratio: float) -> None:
    fake = FakeVariants()
    found, shadow = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, BODY, variant, " a b c", PRIMARY)
    )
    other = {"dense": "sparse", "sparse": "dense"}[variant]
    assert fake.calls[0] == (other, {**BODY, "model": other}, COMPLETIONS)
    for name, (asked, body, _) in zip(("dense", "sparse"), fake.calls[1:], strict=True):
        assert asked == body["model"] == name
        assert body["prompt"] == "Hi a b c"
        assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0, 20)
    assert found["token_agreement"]["mean"] == pytest.approx(2 / 3)
    assert found["token_agreement"]["n_tokens"] == 3
    assert found["kl_nats"]["mean"] == pytest.approx(KL_OF_ANSWER / 3)
    assert found["e2e_ratio"]["ratio"] == pytest.approx(ratio)
    assert found["ttft_ratio"] is None  # the repetition was not streamed
    assert (shadow.num_finished, shadow.num_failed, shadow.num_dropped) == (1, 0, 0)


def test_a_streamed_request_is_repeated_streamed() -> None:
    fake = FakeVariants()
    body = {**BODY, "stream": True}
    found, _ = run_shadow(
        fake, lambda shadow: shadow.offer(COMPLETIONS, body, "dense", " a b c", PRIMARY)
    )
    assert fake.calls[0][1]["stream_options"] == {"include_usage": True}
    assert "stream_options" not in body
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


def test_off_does_nothing() -> None:
    fake = FakeVariants()

    def offer(shadow: Shadow) -> None:
        assert not shadow.is_on
        for _ in range(100):
            shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)

    found, shadow = run_shadow(fake, offer, fraction=0.0)
    assert (found, fake.calls, shadow.num_dropped) == (None, [], 0)


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
        assert (num_running, num_calls, shadow.num_dropped) == (2, 2, 8)
        gate.set()
        await ended()
        shadow.offer(CHAT, BODY, "dense", "a", PRIMARY)  # there is room again
        await ended()
        assert (highest, num_calls, shadow.num_dropped, shadow.num_finished) == (2, 3, 8, 3)

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
    assert (found, shadow.num_failed, shadow.num_finished) == (None, 3, 0)
    [record] = caplog.records
    assert "ConnectionError: sparse is gone" in record.getMessage()
    assert len(record.getMessage()) < 300


def test_an_answer_of_another_shape_is_a_failure() -> None:
    class Odd(FakeVariants):
        dense = None  # type: ignore[assignment]

    _, shadow = run_shadow(
        Odd(), lambda shadow: shadow.offer(COMPLETIONS, BODY, "dense", "a", PRIMARY)
    )
    assert shadow.num_failed == 1


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
        assert (shadow.num_failed, shadow.num_dropped) == (0, 0)

    asyncio.run(run())


# compare


def test_compare_by_hand() -> None:
    fake = FakeVariants()
    body = {"prompt": "Hi", "max_tokens": 3, "temperature": 0}
    found = asyncio.run(compare(body, ["dense", "sparse"], fake.complete))
    assert [variant for variant, _, _ in fake.calls[:2]] == found["order"]
    assert sorted(found["order"]) == ["dense", "sparse"]
    assert all(asked["stream"] for _, asked, _ in fake.calls[:2])
    assert [asked["prompt"] for _, asked, _ in fake.calls[2:]] == ["Hi a b c"] * 2
    assert found["prompt_tokens"] == 2
    assert found["variants"]["sparse"] == {
        "text": " a b d",
        "output_tokens": 3,
        "ttft_s": 0.2,
        "tpot_s": pytest.approx(0.05),
        "e2e_s": 0.3,
        "finish_reason": "length",
    }
    assert found["agreement"] == {
        "baseline": "dense",
        "sparse": {
            "token_agreement": pytest.approx(2 / 3),
            "kl_nats_per_token": pytest.approx(KL_OF_ANSWER / 3),
            "num_tokens": 3,
            "common_prefix_characters": len(" a b "),
        },
    }
    assert "stream" not in body


def test_compare_asks_in_both_orders() -> None:
    fake = FakeVariants()
    variants = ["dense", "sparse"]
    orders = {
        tuple(asyncio.run(compare(BODY, variants, fake.complete))["order"]) for _ in range(100)
    }
    assert orders == {("dense", "sparse"), ("sparse", "dense")}


def test_compare_of_an_empty_answer_has_no_agreement() -> None:
    fake = FakeVariants()
    fake.texts["dense"] = ""
    fake.dense, fake.sparse = fake.dense[:2], fake.sparse[:2]  # type: ignore[assignment]
    found = asyncio.run(compare(BODY, ["dense", "sparse"], fake.complete))
    assert found["agreement"]["sparse"] == {
        "token_agreement": None,
        "kl_nats_per_token": None,
        "num_tokens": 0,
        "common_prefix_characters": 0,
    }


def test_compare_passes_failures_on() -> None:
    async def broken(
        variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(compare(BODY, ["dense", "sparse"], broken))
