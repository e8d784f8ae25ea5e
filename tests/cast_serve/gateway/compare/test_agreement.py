import math
from typing import Any

import pytest

from cast_serve.gateway.compare.agreement import Agreement, agreement_of, max_scored_tokens
from tests.cast_serve.gateway.compare.fakes import FakeVariants, position


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


ACTUAL_TOKEN_FIRST = {"y": {"logprob": -3.0, "rank": 9}, **position(x=0.5)}


@pytest.mark.parametrize(
    ("baseline", "candidate", "num_agreeing"),
    [
        (position(a=0.75), position(b=0.5), 0),  # nothing in common: the bound is 0
        (position(a=1.0), position(a=1.0000001), 1),  # rounded above 1, and not below 0
        (ACTUAL_TOKEN_FIRST, ACTUAL_TOKEN_FIRST, 1),
        (ACTUAL_TOKEN_FIRST, position(x=0.5), 1),  # the likeliest is by rank, not by place
    ],
)
def test_one_position(baseline: Any, candidate: Any, num_agreeing: int) -> None:
    found = agreement_of([baseline], [candidate], 0)
    assert found == Agreement(1, num_agreeing, pytest.approx(0, abs=1e-6), None, None)


def test_the_prompt_does_not_count() -> None:
    found = agreement_of(FakeVariants.dense, FakeVariants.sparse, 2)
    assert found is not None
    assert (found.num_tokens, found.num_agreeing) == (3, 2)


def test_one_token_more_than_is_scored_must_fit() -> None:
    assert max_scored_tokens([None, None]) == 1024
    assert max_scored_tokens([None, 4096]) == 1024
    assert max_scored_tokens([4096, 256]) == 255


@pytest.mark.parametrize(("other_length", "first"), [(4, 2), (5, 5)])
def test_what_cannot_be_aligned_is_none(other_length: int, first: int) -> None:
    assert agreement_of(FakeVariants.dense, FakeVariants.sparse[:other_length], first) is None
