import asyncio
from typing import Any

import pytest

from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.compare.side_by_side import compare
from cast_serve.latency import RequestTiming
from tests.cast_serve.gateway.compare.fakes import BODY, COMPLETIONS, KL_OF_ANSWER, FakeVariants


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


def test_compare_asks_for_no_token_more_than_a_worker_holds() -> None:
    fake = FakeVariants()
    found = asyncio.run(compare(BODY, ["dense", "sparse"], fake.complete, max_tokens=4))
    assert len(fake.calls) == 2
    assert found["variants"]["sparse"]["text"] == " a b d"
    assert found["agreement"]["sparse"]["token_agreement"] is None
    reason = "prompt and answer have 5 tokens; up to 4 are compared"
    assert found["agreement"]["sparse"]["reason"] == reason
    assert (
        "reason"
        not in asyncio.run(compare(BODY, ["dense", "sparse"], fake.complete, max_tokens=5))[
            "agreement"
        ]["sparse"]
    )


@pytest.mark.parametrize("status", [400, 503])
def test_a_refusal_to_score_is_a_reason_and_a_failure_is_not(status: int) -> None:
    fake = FakeVariants()
    fake.refusal = APIError(status, "the context is 5 tokens", "invalid_request_error")
    work = compare(BODY, ["dense", "sparse"], fake.complete)
    if status == 503:
        with pytest.raises(APIError, match="the context is 5 tokens"):
            asyncio.run(work)
        return
    found = asyncio.run(work)
    assert found["variants"]["dense"]["text"] == " a b c"
    assert found["agreement"]["sparse"]["token_agreement"] is None
    reason = "a worker refused to score prompt and answer: the context is 5 tokens"
    assert found["agreement"]["sparse"]["reason"] == reason


def test_compare_passes_failures_on() -> None:
    async def broken(
        variant: str, body: dict[str, Any], route: str = COMPLETIONS, /
    ) -> tuple[dict[str, Any], RequestTiming]:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(compare(BODY, ["dense", "sparse"], broken))


def test_a_server_without_prompt_logprobs_is_compared_by_text_and_time() -> None:
    fake = FakeVariants()

    async def complete(
        variant: str, body: dict[str, Any], route: str = COMPLETIONS
    ) -> tuple[dict[str, Any], RequestTiming]:
        answer, timing = await fake.complete(variant, body, route)
        answer["choices"] = [{**each, "prompt_logprobs": None} for each in answer["choices"]]
        return answer, timing

    found = asyncio.run(compare(BODY, ["dense", "sparse"], complete))
    assert found["agreement"]["sparse"]["token_agreement"] is None
    assert found["variants"]["sparse"]["text"] == " a b d"
