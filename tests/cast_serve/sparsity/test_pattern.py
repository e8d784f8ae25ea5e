import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_serve.sparsity.pattern import (
    TWO_FOUR,
    Pattern,
    PatternError,
    check_weight,
    groups,
    hard_mask,
)


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2", "a:b", "", "-1:4"])
def test_pattern_refuses(text: str) -> None:
    with pytest.raises(PatternError, match="is not N:M"):
        Pattern.parse(text)


def test_pattern_round_trip() -> None:
    assert Pattern.parse(" 4:8 ") == Pattern(4, 8)
    assert str(Pattern(1, 4)) == "1:4"


@given(
    scores=st.lists(st.integers(-2, 2), min_size=16, max_size=16),
    pattern=st.sampled_from([Pattern(1, 4), Pattern(2, 4), Pattern(4, 8), Pattern(3, 16)]),
)
def test_hard_mask_keeps_the_n_largest_and_lower_columns_on_ties(
    scores: list[int], pattern: Pattern
) -> None:
    mask = hard_mask(torch.tensor([scores], dtype=torch.float32), pattern)
    for first in range(0, 16, pattern.m):
        group = scores[first : first + pattern.m]
        order = sorted(range(pattern.m), key=lambda column: (-group[column], column))
        kept = mask[0, first : first + pattern.m].nonzero().flatten().tolist()
        assert kept == sorted(order[: pattern.n])


def test_hard_mask_refuses_nan() -> None:
    with pytest.raises(PatternError, match="NaN"):
        hard_mask(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))


def test_groups_refuse_other_multiples() -> None:
    with pytest.raises(PatternError, match="in_features 10 is no multiple of 4"):
        groups(torch.zeros(2, 10), 4)


def test_check_weight_names_the_first_bad_group() -> None:
    weight = torch.zeros(3, 12)
    weight[1, 8:11] = 1.0
    with pytest.raises(PatternError, match=r"layer: 1 of 9 groups .* row 1, group 2"):
        check_weight(weight, TWO_FOUR, "layer")
    weight[1, 9] = -0.0
    check_weight(weight, TWO_FOUR, "layer")
