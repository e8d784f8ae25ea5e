import pytest
import torch

from cast_serve.kernels import reference
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import PatternError, hard_mask

SHAPES = [(1, 4), (8, 64), (9, 60), (17, 68), (40, 576)]


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (scores * hard_mask(scores.abs())).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_round_trip_is_bitwise(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, bitmask = compress(weight_of(shape, dtype))
    packed = reference.pack(values, bitmask)
    assert tuple(packed.shape) == reference.packed_shape(*shape, dtype)
    unpacked_values, unpacked_bitmask = reference.unpack(packed, *shape, dtype)
    assert torch.equal(unpacked_values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(unpacked_bitmask, bitmask)


@pytest.mark.parametrize("padding", [0x10, 0x30, 0x70, 0xC0, 0xF0], ids=hex)
def test_bits_past_in_features_are_not_read(padding: int) -> None:
    """A foreign file may set the upper nibble of a row's last byte, which stands for no group."""
    weight = weight_of((9, 60), torch.float32)
    values, bitmask = compress(weight)
    foreign = bitmask.clone()
    foreign[:, -1] |= padding
    assert torch.equal(reference.pack(values, foreign), reference.pack(values, bitmask))
    x = torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    out = reference.linear24(x, reference.pack(values, foreign), 9)
    torch.testing.assert_close(out, x @ weight.T)
    assert torch.equal(
        reference.unpack(reference.pack(values, foreign), 9, 60, torch.float32)[1], bitmask
    )


def test_packed_takes_the_bytes_it_claims() -> None:
    values, bitmask = compress(weight_of((64, 128), torch.bfloat16))
    assert reference.pack(values, bitmask).nbytes == 0.5625 * 64 * 128 * 2


def test_linear_is_the_dense_product() -> None:
    weight, bias, x = weight_of((9, 60), torch.float32), torch.randn(9), torch.randn(2, 3, 60)
    packed = reference.pack(*compress(weight))
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(reference.linear24(x, packed, 9, bias), expected)


def test_pack_refuses_what_is_not_two_of_four() -> None:
    values, bitmask = compress(weight_of((8, 64), torch.bfloat16))
    bitmask[0, 0] = 0
    with pytest.raises(PatternError, match="not exactly two bits"):
        reference.pack(values, bitmask)


def test_unpack_refuses_another_size() -> None:
    packed = reference.pack(*compress(weight_of((8, 64), torch.bfloat16)))
    with pytest.raises(PatternError, match=r"packed weight is \[1, 1, 576\]"):
        reference.unpack(packed, 16, 64, torch.bfloat16)
