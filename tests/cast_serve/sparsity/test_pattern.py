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
    masked,
)


@pytest.mark.parametrize(
    "text",
    ["4:2", "2:2", "0:4", "0:0", "32:32", "65:64", "2:5", "3:12", "32:128", "2", "a:b", "", "-1:4"],
)
def test_pattern_refuses(text: str) -> None:
    with pytest.raises(PatternError, match="is not N:M"):
        Pattern.parse(text)


def test_pattern_round_trip() -> None:
    assert Pattern.parse(" 4:8 ") == Pattern(4, 8)
    assert str(Pattern(1, 4)) == "1:4"


@pytest.mark.parametrize(
    ("text", "stored", "columns"),
    [
        ("2:4", "2:4", 4),
        ("1:4", "16:64", 64),
        ("16:32", "32:64", 64),
        ("40:64", "40:64", 64),
        ("64:64", "64:64", 64),
    ],
)
def test_all_but_2_of_4_are_stored_as_words_of_64(text: str, stored: str, columns: int) -> None:
    pattern = Pattern.parse(text)
    assert (str(pattern.stored), pattern.columns) == (stored, columns)


def test_groups_of_earlier_releases_have_no_stored_form() -> None:
    with pytest.raises(PatternError, match="5:12 .* 12 does not divide 64; .* --sparsity"):
        _ = Pattern(5, 12).stored


PATTERNS = [(1, 4), (2, 4), (4, 8), (3, 16), (16, 32), (1, 64), (40, 64), (5, 12)]


@given(data=st.data(), pattern=st.sampled_from([Pattern(*each) for each in PATTERNS]))
def test_hard_mask_keeps_the_n_largest_and_lower_columns_on_ties(
    data: st.DataObject, pattern: Pattern
) -> None:
    columns = 2 * pattern.m
    few = st.sampled_from([-2.0, -0.0, 0.0, 1.0, float("inf")])
    scores = data.draw(st.lists(few, min_size=columns, max_size=columns))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    mask = hard_mask(torch.tensor([scores], dtype=dtype), pattern)
    for first in range(0, columns, pattern.m):
        group = scores[first : first + pattern.m]
        order = sorted(range(pattern.m), key=lambda column: (-group[column], column))
        kept = mask[0, first : first + pattern.m].nonzero().flatten().tolist()
        assert kept == sorted(order[: pattern.n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_hard_mask_of_many_groups(dtype: torch.dtype) -> None:
    """More groups than are sorted at once, of any number of dimensions."""
    scores = torch.rand(3, 2000, 128, generator=torch.Generator().manual_seed(0))
    scores = (scores * 9).to(dtype).requires_grad_(dtype.is_floating_point)
    mask = hard_mask(scores, Pattern(24, 64))
    grouped = groups(scores.detach().double(), 64)
    kept = torch.argsort(grouped, dim=-1, descending=True, stable=True)[..., :24]
    expected = torch.zeros(3, 2000, 2, 64, dtype=torch.bool).scatter_(-1, kept, True)
    assert torch.equal(mask, expected.flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_is_what_where_gives_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 10, generator=generator).to(dtype).t()  # not contiguous
    values[:3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    mask = torch.rand(values.shape, generator=generator) < 0.5
    mask[:3, 0] = False
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    assert torch.equal(masked(values, mask).view(bits), expected.view(bits))


def test_hard_mask_refuses_nan() -> None:
    with pytest.raises(PatternError, match="NaN"):
        hard_mask(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))


def test_groups_refuse_other_multiples() -> None:
    with pytest.raises(PatternError, match="in_features 10 is not a multiple of 4"):
        groups(torch.zeros(2, 10), 4)


def test_check_weight_names_the_first_bad_group() -> None:
    weight = torch.zeros(3, 12)
    weight[1, 8:11] = 1.0
    with pytest.raises(PatternError, match=r"layer: 1 of 9 groups .* row 1, group 2"):
        check_weight(weight, TWO_FOUR, "layer")
    weight[1, 9] = -0.0
    check_weight(weight, TWO_FOUR, "layer")
