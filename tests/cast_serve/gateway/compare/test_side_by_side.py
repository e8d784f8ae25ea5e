import asyncio
from typing import Any

import pytest

from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.compare.side_by_side import compare
from tests.cast_serve.gateway.compare.fakes import BODY, KL_OF_ANSWER, FakeVariants

VARIANTS = ["dense", "sparse"]


def compared(fake: FakeVariants, body: dict[str, Any] = BODY, **more: Any) -> dict[str, Any]:
    return asyncio.run(compare(body, VARIANTS, fake.complete, **more))


def test_compare_by_hand() -> None:
    fake = FakeVariants()
    body = {"prompt": "Hi", "max_tokens": 3, "temperature": 0}
    found = compared(fake, body)
    assert [variant for variant, _, _ in fake.calls[:2]] == found["order"]
    assert sorted(found["order"]) == VARIANTS
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
    orders = {tuple(compared(FakeVariants())["order"]) for _ in range(100)}
    assert orders == {("dense", "sparse"), ("sparse", "dense")}


def test_an_empty_answer_has_no_agreement() -> None:
    fake = FakeVariants()
    fake.texts["dense"] = ""
    fake.dense, fake.sparse = fake.dense[:2], fake.sparse[:2]  # type: ignore[index, assignment]
    assert compared(fake)["agreement"]["sparse"] == {
        "token_agreement": None,
        "kl_nats_per_token": None,
        "num_tokens": 0,
        "common_prefix_characters": 0,
    }


def test_a_server_without_prompt_logprobs_is_compared_by_text_and_time() -> None:
    fake = FakeVariants()
    fake.dense = fake.sparse = ()  # type: ignore[assignment]
    found = compared(fake)
    assert found["agreement"]["sparse"]["token_agreement"] is None
    assert found["variants"]["sparse"]["text"] == " a b d"


def test_no_token_more_is_asked_for_than_a_worker_holds() -> None:
    fake = FakeVariants()
    found = compared(fake, max_tokens=4)
    assert len(fake.calls) == 2
    assert found["variants"]["sparse"]["text"] == " a b d"
    assert found["agreement"]["sparse"]["token_agreement"] is None
    assert "have 5 tokens; up to 4" in found["agreement"]["sparse"]["reason"]
    assert "reason" not in compared(fake, max_tokens=5)["agreement"]["sparse"]


@pytest.mark.parametrize("status", [400, 503])
def test_a_refusal_to_score_is_a_reason_and_a_failure_is_not(status: int) -> None:
    fake = FakeVariants()
    fake.refusal = APIError(status, "the context is 5 tokens", "invalid_request_error")
    if status == 503:
        with pytest.raises(APIError, match="the context is 5 tokens"):
            compared(fake)
        return
    found = compared(fake)
    assert found["variants"]["dense"]["text"] == " a b c"
    assert found["agreement"]["sparse"]["token_agreement"] is None
    assert "the context is 5 tokens" in found["agreement"]["sparse"]["reason"]
