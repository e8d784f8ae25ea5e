import pytest
import torch
from torch import Tensor

from cast_serve.kernels import reference_int4 as reference
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import PatternError, hard_mask
from cast_serve.sparsity.quantize import rounded

SHAPES = [(1, 4), (8, 128), (9, 60), (17, 132), (40, 576)]
GROUPS = [128, 64, 32]


def weight_of(shape: tuple[int, int], group: int) -> tuple[Tensor, Tensor]:
    """A 2:4 weight of -8 to 7, and a scale for each group that bf16 holds."""
    generator = torch.Generator().manual_seed(0)
    mask = hard_mask(torch.rand(shape, generator=generator))
    weight = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8) * mask
    scale = torch.rand(shape[0], -(-shape[1] // group), generator=generator) + 0.5
    return weight, scale.bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_round_trip_is_bitwise(shape: tuple[int, int], group: int, dtype: torch.dtype) -> None:
    weight, scale = weight_of(shape, group)
    values, bitmask = compress(weight)
    packed = reference.pack_int4(values, bitmask, scale.to(dtype), group)
    assert tuple(packed.shape) == reference.int4_packed_shape(*shape, group)
    unpacked = reference.unpack_int4(packed, *shape, group)
    for part, expected in zip(unpacked, (values, bitmask, scale), strict=True):
        assert part.dtype == expected.dtype
        assert torch.equal(part, expected)
    on_meta = reference.pack_int4(values.to("meta"), bitmask.to("meta"), scale.to("meta"), group)
    assert on_meta.shape == packed.shape


@pytest.mark.parametrize(("group", "bits"), [(128, 3.125), (64, 3.25), (32, 3.5)])
def test_packed_takes_the_bits_it_claims(group: int, bits: float) -> None:
    weight, scale = weight_of((64, 512), group)
    packed = reference.pack_int4(*compress(weight), scale, group)
    assert packed.nbytes * 8 == bits * 64 * 512


def test_the_layout_is_as_it_is_described() -> None:
    values = torch.zeros(8, 64, dtype=torch.int8)
    k = 16 * 3 + 8 * 1 + 4 * 0 + 2  # a = 3, b = 1, c = 0, d = 2
    values[5, k] = -3
    scale = torch.zeros(8, 4)
    scale[5, 2] = 1.0
    packed = reference.pack_int4(values, torch.full((8, 16), 0x35, dtype=torch.uint8), scale, 32)
    tile = packed[0, 0]
    assert tile[:256].nonzero().tolist() == [[5 * 32 + 16 * 0 + 4 * 3 + 2]]
    assert tile[5 * 32 + 14] == (-3 & 15) << 4
    assert (tile[256:384] == 0b0100_1000).all()
    assert tile[384:].view(torch.bfloat16).nonzero().tolist() == [[5 * 4 + 2]]


@pytest.mark.parametrize("group", GROUPS)
def test_linear_is_the_dense_product_of_what_was_quantised(group: int) -> None:
    weight, scale = weight_of((9, 300), group)
    bias, x = torch.randn(9), torch.randn(2, 3, 300)
    packed = reference.pack_int4(*compress(weight), scale, group)
    exact = weight * scale.float().repeat_interleave(group, dim=1)[:, :300]
    expected = torch.nn.functional.linear(rounded(x), exact, bias)
    out = reference.linear24_int4(x, packed, group, 9, bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group": 48}, ValueError, "scale group of 48 columns is none of 128, 64 and 32"),
        ({"group": 64}, ValueError, r"scale is \[8, 1\]; \[8, 2\] is needed for a weight \[8, 128"),
        ({"values": torch.full((8, 64), 8)}, ValueError, "values are 8 to 8; 4 bits hold -8 to 7"),
        ({"scale": torch.full((8, 1), torch.nan)}, ValueError, "row 0 has a scale of nan; finite"),
        ({"scale": torch.full((8, 1), 3.4e38)}, ValueError, "a scale of 3.3[0-9]*e[+]38; finite"),
        (
            {"bitmask": torch.zeros(8, 16, dtype=torch.uint8)},
            PatternError,
            "not have exactly 2 of 4",
        ),
    ],
)
def test_pack_refuses_what_it_cannot_hold(
    arguments: dict[str, Tensor], error: type, message: str
) -> None:
    weight, scale = weight_of((8, 128), 128)
    values, bitmask = compress(weight)
    given = {"values": values, "bitmask": bitmask, "scale": scale} | arguments
    with pytest.raises(error, match=message):
        reference.pack_int4(**given)


def test_unpack_refuses_another_size() -> None:
    weight, scale = weight_of((8, 128), 128)
    packed = reference.pack_int4(*compress(weight), scale)
    with pytest.raises(
        PatternError, match=r"packed weight is \[1, 1, 400\]; a 4-bit \[8, 128\] in"
    ):
        reference.unpack_int4(packed, 8, 128, 64)
