"""Agreement and KL by hand, of made-up answers of a gateway."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from loadtest.quality.agreement import measure, summarise

EACH: list[dict[str, Any]] = [
    {"token_agreement": 0.5, "kl_nats_per_token": 0.4, "num_tokens": 10},
    {"token_agreement": None, "kl_nats_per_token": None, "num_tokens": 0},
    {"token_agreement": 1.0, "kl_nats_per_token": 0.1, "num_tokens": 30},
]


def answer(number: int) -> dict[str, Any]:
    sparse = {**EACH[number], "common_prefix_characters": 3}
    return {"prompt_tokens": 4, "agreement": {"baseline": "dense", "sparse": sparse}}


def test_every_prompt_is_compared() -> None:
    bodies, ticks = [], []

    async def compare(body: dict[str, Any]) -> Mapping[str, Any]:
        bodies.append(body)
        return answer(len(bodies) - 1)

    arguments = (["a", "b", "c"], "dense", "sparse", 600, lambda: ticks.append(1))
    assert asyncio.run(measure(compare, *arguments)) == EACH
    assert [body["prompt"] for body in bodies] == ["a", "b", "c"]
    assert bodies[0] == {"prompt": "a", "max_tokens": 512, "ignore_eos": True}
    assert len(ticks) == 3


def test_means_by_hand() -> None:
    found = summarise(EACH)
    # 5 and 30 of 40 tokens agree; alone, the prompts give 0.5 and 1.
    assert found["token_agreement"] == {"mean": 35 / 40, "low": 0.5, "high": 1.0}
    kl = found["kl_nats_per_token"]
    assert kl["mean"] == pytest.approx((4 + 3) / 40)
    assert (kl["low"], kl["high"]) == (pytest.approx(0.1), pytest.approx(0.4))
    assert (found["num_prompts"], found["num_scored"], found["num_tokens"]) == (3, 2, 40)


def test_nothing_comparable_has_no_mean() -> None:
    found = summarise(EACH[1:2])
    assert (found["token_agreement"], found["kl_nats_per_token"]) == (None, None)
    assert (found["num_prompts"], found["num_scored"]) == (1, 0)


def test_other_variants_are_refused() -> None:
    async def compare(body: dict[str, Any]) -> Mapping[str, Any]:
        return answer(0)

    with pytest.raises(ValueError, match="compares sparse with dense, not dense with sparse"):
        asyncio.run(measure(compare, ["a"], "sparse", "dense", 8))
