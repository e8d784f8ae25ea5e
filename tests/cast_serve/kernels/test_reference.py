import pytest
import torch

from cast_serve.kernels import reference
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import PatternError, hard_mask
from cast_serve.sparsity.quantize import quantize_groups

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
    with pytest.raises(PatternError, match="not have exactly 2 of 4"):
        reference.pack(values, bitmask)


def test_unpack_refuses_another_size() -> None:
    packed = reference.pack(*compress(weight_of((8, 64), torch.bfloat16)))
    with pytest.raises(PatternError, match=r"packed weight is \[1, 1, 576\]"):
        reference.unpack(packed, 16, 64, torch.bfloat16)


@pytest.mark.parametrize("shape", [*SHAPES, (9, 132), (17, 260)], ids=str)
def test_int8_pack_round_trip_is_bitwise(shape: tuple[int, int]) -> None:
    weight = (weight_of(shape, torch.float32) * 40).clamp(-127, 127).to(torch.int8)
    values, bitmask = compress(weight)
    packed = reference.pack(values, bitmask)
    assert tuple(packed.shape) == reference.packed_shape(*shape, torch.int8)
    assert packed.shape[1:] == (-(-shape[1] // 128), 640)
    unpacked_values, unpacked_bitmask = reference.unpack(packed, *shape, torch.int8)
    assert torch.equal(unpacked_values, values)
    assert torch.equal(unpacked_bitmask, bitmask)
    assert reference.pack(values.to("meta"), bitmask.to("meta")).shape == packed.shape


def test_int8_linear_is_the_dense_product_of_what_was_quantised() -> None:
    weight = (weight_of((9, 300), torch.float32) * 40).clamp(-127, 127).to(torch.int8)
    scale, bias = torch.rand(9) * 1e-2, torch.randn(9)
    x = torch.randn(2, 3, 300)
    integers, x_scale = quantize_groups(x)
    assert integers.shape == (2, 3, 3, 128)
    assert (integers.abs().amax(-1) == 127).all()
    quantised_x = (integers * x_scale.unsqueeze(-1)).flatten(-2)[..., :300]
    assert ((quantised_x - x).abs() <= x.abs().amax() / 127).all()
    expected = torch.nn.functional.linear(quantised_x, weight * scale.unsqueeze(-1), bias)
    packed = reference.pack(*compress(weight))
    torch.testing.assert_close(reference.linear24_int8(x, packed, scale, 9, bias), expected)


def test_groups_of_zeros_and_of_inf_or_nan_have_their_own_scales() -> None:
    x = torch.randn(4, 256)
    x[0, 128:] = 0
    x[1, 5] = torch.nan
    x[2, 200] = -torch.inf
    integers, scale = quantize_groups(x)
    assert (scale == 0).nonzero().tolist() == [[0, 1]]
    assert scale.isnan().nonzero().tolist() == [[1, 0], [2, 1]]
    for token, group in ((0, 1), (1, 0), (2, 1)):
        assert not integers[token, group].any()
