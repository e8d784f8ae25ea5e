import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_serve.sparsity.bitmask import compress, decompress, pack_mask, unpack_mask
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, PatternError, hard_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]


PATTERNS = [TWO_FOUR, Pattern(4, 8), Pattern(16, 32), *(Pattern(n, 64) for n in (1, 32, 40, 63))]


def sparse_weight(
    rows: int, columns: int, dtype: torch.dtype, seed: int = 0, pattern: Pattern = TWO_FOUR
) -> torch.Tensor:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = (scores * 20).to(dtype)
    return weight * hard_mask(scores, pattern)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 99),
)
def test_round_trip(
    rows: int, groups: int, dtype: torch.dtype, pattern: Pattern, seed: int
) -> None:
    columns = groups * pattern.columns
    weight = sparse_weight(rows, columns, dtype, seed, pattern)
    values, bitmask = compress(weight, pattern=pattern)
    assert values.dtype == dtype
    assert values.shape == (rows, columns * pattern.n // pattern.m)
    assert bitmask.shape == (rows, -(-columns // 8))
    assert torch.equal(decompress(values, bitmask, columns, pattern=pattern), weight)


def test_layout_bit_by_bit() -> None:
    weight = torch.tensor([[0, 5, 0, 6, 7, 0, 0, 8, 0, 0, 9, 1]], dtype=torch.float32)
    values, bitmask = compress(weight)
    assert values.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert bitmask.tolist() == [[0b1001_1010, 0b0000_1100]]


def test_layout_of_a_word() -> None:
    """Column 8j + i is bit i of byte j, and zeros are kept in the lowest columns."""
    weight = torch.zeros(1, 128)
    weight[0, 9], weight[0, 70], weight[0, 127] = 5, 6, 7
    values, bitmask = compress(weight, pattern=Pattern(3, 64))
    assert values.tolist() == [[0, 0, 5, 0, 6, 7]]
    assert bitmask.tolist() == [[3, 2, *[0] * 6, 1 | 1 << 6, *[0] * 6, 1 << 7]]
    halves, same_bits = compress(weight, pattern=Pattern(1, 32).stored)
    assert (halves.shape, same_bits.shape) == ((1, 4), (1, 16))


def test_agrees_with_compressed_tensors() -> None:
    utils = pytest.importorskip("compressed_tensors.utils", reason="comes with vLLM")
    mask = hard_mask(torch.randn(7, 24))
    assert torch.equal(pack_mask(mask), utils.pack_bitmasks(mask))
    assert torch.equal(utils.unpack_bitmasks(pack_mask(mask), [7, 24]), mask)


def test_zero_groups_still_keep_two_and_minus_zero_becomes_zero() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, -0.0, 3.0, -0.0, 0.0]])
    values, bitmask = compress(weight)
    assert torch.equal(unpack_mask(bitmask, 8).view(2, 4).sum(1), torch.tensor([2, 2]))
    assert values.tolist() == [[0, 0, 0, 3]]
    assert not torch.signbit(values).any()


def test_a_full_group_is_refused_not_pruned() -> None:
    weight = torch.zeros(4, 8)
    weight[2, 4:7] = 1
    with pytest.raises(PatternError, match="model.q: 1 of 8 groups .* row 2, group 1"):
        compress(weight, "model.q")


def test_damaged_bitmask_is_refused() -> None:
    values, bitmask = compress(sparse_weight(3, 16, torch.float32))
    bitmask[1, 1] = 0b0111_0011
    with pytest.raises(PatternError, match="1 groups of the bitmask .* row 1, group 3"):
        decompress(values, bitmask, 16)


def test_a_word_with_another_count_is_refused() -> None:
    pattern = Pattern(40, 64)
    values, bitmask = compress(sparse_weight(3, 128, torch.float32, 0, pattern), "q", pattern)
    bitmask[1, 8:] = 255
    message = r"q: 1 words .* exactly 40 of 64 bits; .* row 1, word 1, with 64; .* to 40:64 first"
    with pytest.raises(PatternError, match=message):
        decompress(values, bitmask, 128, "q", pattern)


def test_columns_without_whole_words_are_refused() -> None:
    with pytest.raises(PatternError, match="q: in_features 96 .* of 64, .* 32:64; leave it dense"):
        compress(torch.zeros(2, 96), "q", Pattern(16, 32))
    with pytest.raises(PatternError, match="q: in_features 6 is not a multiple of 4"):
        compress(torch.zeros(2, 6), "q")


def test_zeros_of_each_group_and_not_of_the_word_are_checked() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :5] = 1
    compress(weight, pattern=Pattern(8, 64))
    with pytest.raises(PatternError, match="1 of 8 groups .* row 0, group 0"):
        compress(weight, pattern=Pattern(1, 8))


def test_bits_past_in_features_are_not_read() -> None:
    weight = sparse_weight(3, 20, torch.float32)
    values, bitmask = compress(weight)
    assert (bitmask[:, -1] < 16).all()
    bitmask[:, -1] |= 0xF0
    assert torch.equal(decompress(values, bitmask, 20), weight)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    values, bitmask = compress(sparse_weight(3, 64, torch.float32))
    for columns, pattern in ((24, TWO_FOUR), (64, Pattern(40, 64)), (0, TWO_FOUR), (-64, TWO_FOUR)):
        with pytest.raises(PatternError, match="do not belong to"):
            decompress(values, bitmask, columns, pattern=pattern)


def test_meta() -> None:
    values, bitmask = compress(torch.empty(6, 20, device="meta", dtype=torch.bfloat16))
    assert (values.shape, bitmask.shape) == ((6, 10), (6, 3))
    assert decompress(values, bitmask, 20).shape == (6, 20)
    values, bitmask = compress(torch.empty(6, 128, device="meta"), pattern=Pattern(10, 16))
    assert (values.shape, bitmask.shape) == ((6, 80), (6, 16))
    assert decompress(values, bitmask, 128, pattern=Pattern(40, 64)).shape == (6, 128)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(()), torch.zeros(8), torch.zeros(2, 2, 8), torch.zeros(0, 8), torch.zeros(2, 0)],
    ids=lambda weight: str(list(weight.shape)),
)
def test_what_is_no_weight_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(PatternError, match="which is not a weight"):
        compress(weight)


def test_what_is_no_bitmask_is_refused() -> None:
    right = torch.full((2, 1), 0x33, dtype=torch.uint8)
    assert unpack_mask(right, 8).sum() == 8
    for wrong, columns in (
        (right[0], 8),
        (right.float(), 8),
        (right, 16),
        (right, 0),
        (right, -8),
        (right.repeat(1, 2), 8),
    ):
        with pytest.raises(PatternError, match=f"a bitmask of {columns} columns"):
            unpack_mask(wrong, columns)
