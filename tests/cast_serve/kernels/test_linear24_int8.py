"""cast::linear24_int8 against reference.py, for every kernel that this CPU has."""

import os

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels import reference
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from cast_serve.sparsity.quantize import quantize_groups

SHAPES = [(1, 4), (7, 60), (8, 128), (33, 576), (129, 132), (40, 1536), (16, 8192), (1049, 260)]
NUM_TOKENS = [*range(1, 18), 31, 32, 33, 64, 130, 257]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The output's own rounding, as a share of its norm, and what fp32 sums in another order add.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}


def make(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random packed weight within +-63, and scales that are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    weight = torch.randint(-63, 64, shape, generator=generator, dtype=torch.int8)
    packed = kernels.pack(*compress(weight * hard_mask(scores.abs())))
    scale = torch.exp2(torch.randint(-9, -5, shape[:1], generator=generator).float())
    return packed, scale


def exact_x(num_tokens: int, in_features: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Activations that quantising does not change: each scale group has a power of two as scale."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, -(-in_features // 128), 128)
    # Half of the range, so that fp32 holds every partial sum of 8,192 columns.
    integers = torch.randint(-63, 64, shape, generator=generator).float()
    integers[..., 1] = 127.0  # the largest of its group, which is never shorter than 4 columns
    powers = torch.exp2(torch.randint(-4, -2, shape[:2], generator=generator).float())
    x = (integers * powers.unsqueeze(-1)).flatten(1)[:, :in_features].to(dtype)
    assert torch.equal(quantize_groups(x)[1], powers)  # else the comparison would not be exact
    return x


def assert_same_to_rounding(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums_are_equal_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, scale = make(shape)
    bias = torch.randint(-8, 9, shape[:1]).float()
    for num_tokens in NUM_TOKENS:
        x = exact_x(num_tokens, shape[1], dtype)
        for added in (None, bias.to(dtype)):
            out = kernels.linear24_int8(x, packed, scale, shape[0], added)
            expected = reference.linear24_int8(x, packed, scale, shape[0], added)
            assert torch.equal(out, expected), num_tokens


def test_so_many_tokens_that_they_take_several_passes() -> None:
    packed, scale = make((1049, 260))
    x = exact_x(700, 260, torch.bfloat16)
    out = kernels.linear24_int8(x, packed, scale, 1049)
    assert torch.equal(out, reference.linear24_int8(x, packed, scale, 1049))


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_the_largest_integers_do_not_overflow(num_tokens: int) -> None:
    values = torch.full((16, 288), 127, dtype=torch.int8)
    values[1::2] = -127
    packed = kernels.pack(values, torch.full((16, 72), 0x5A, dtype=torch.uint8))
    x = torch.full((num_tokens, 576), -127.0)
    x[1::3] = 127.0
    out = kernels.linear24_int8(x, packed, torch.ones(16), 16)
    signs = torch.tensor([1, -1]).repeat(8)
    assert torch.equal(out, x[:, :1] * 127 * 288 * signs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, _ = make(shape)
    scale = torch.rand(shape[0]) * 1e-2 + 1e-3
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = (torch.randn(num_tokens, shape[1]) * torch.rand(num_tokens, 1) * 4).to(dtype)
        x[num_tokens // 2, : shape[1] // 2] = 0
        out = kernels.linear24_int8(x, packed, scale, shape[0], bias)
        assert_same_to_rounding(out, reference.linear24_int8(x, packed, scale, shape[0], bias))


def test_rounding_is_the_specifications() -> None:
    """One weight of 1 a row reads the integers back, those on a half among them."""
    weight = torch.zeros(128, 128, dtype=torch.int8)
    weight[torch.arange(128), torch.arange(128)] = 1
    packed = kernels.pack(*compress(weight))
    x = torch.randn(40, 128) * torch.exp2(torch.randint(-60, 60, (40, 1)).float())
    x[:20] = torch.arange(-1280, 1280).view(20, 128) / 2 % 127  # halves
    x[5:10] *= -1
    x[:20, 0] = 127.0  # so the scale is 1
    x[1] = 0
    x[2] = 1e-44  # the scale rounds to 0 in fp32
    x[3] = torch.arange(128) * 1e-45  # a subnormal scale: x / scale passes 127
    x[4] = torch.finfo(torch.float32).max
    integers, x_scale = quantize_groups(x)
    assert x_scale[2] == 0
    assert x_scale[3] > 0
    assert integers.unique().numel() > 250
    expected = integers[:, 0].float() * x_scale
    for rows in (x, x[:1], x[1:5], x[20:29]):
        first = 0 if rows.shape[0] in (1, 40) else 1 if rows.shape[0] == 4 else 20
        out = kernels.linear24_int8(rows, packed, torch.ones(128), 128)
        assert torch.equal(out, expected[first : first + rows.shape[0]])


def test_the_forced_isa_runs() -> None:
    assert kernels.isa() == os.environ.get("CAST_TEST_EXPECTED_ISA", kernels.supported_isas()[0])


def test_any_leading_dimensions_and_strides() -> None:
    packed, scale = make((40, 132))
    wide = torch.randn(3, 5, 2 * 132).bfloat16()
    transposed = torch.randn(132, 9).bfloat16().T
    for x in (wide[..., :132], wide[:, ::2, 132:], transposed, torch.randn(132).bfloat16()):
        out = kernels.linear24_int8(x, packed, scale, 40)
        assert_same_to_rounding(out, reference.linear24_int8(x, packed, scale, 40))
    empty = torch.empty(0, 132).bfloat16()
    assert kernels.linear24_int8(empty, packed, scale, 40).shape == (0, 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 6, 20, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_make_their_tokens_whole_row_nan(
    dtype: torch.dtype, num_tokens: int, value: float
) -> None:
    packed, scale = make((24, 260))
    x = torch.randn(num_tokens, 260).to(dtype)
    clean = kernels.linear24_int8(x, packed, scale, 24)
    assert clean.isfinite().all()
    x[num_tokens // 2, 130] = value
    out = kernels.linear24_int8(x, packed, scale, 24)
    assert out[num_tokens // 2].isnan().all()
    others = torch.arange(num_tokens) != num_tokens // 2
    assert torch.equal(out[others], clean[others])


def test_the_same_with_one_thread_and_with_three() -> None:
    packed, scale = make((129, 576))
    for num_tokens in (2, 20):
        x = torch.randn(num_tokens, 576).bfloat16()
        many = kernels.linear24_int8(x, packed, scale, 129)
        before = torch.get_num_threads()
        try:
            for num_threads in (1, 3):
                torch.set_num_threads(num_threads)
                assert torch.equal(kernels.linear24_int8(x, packed, scale, 129), many)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("num_tokens", [1, 5, 12, 33, 130])
def test_nothing_unwritten_is_read_or_returned(num_tokens: int) -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    packed, scale = make((1049, 132))
    x = exact_x(num_tokens, 132, torch.float32)
    expected = reference.linear24_int8(x, packed, scale, 1049)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        out = kernels.linear24_int8(x, packed, scale, 1049)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, expected)


def test_an_unaligned_weight_is_refused() -> None:
    packed, scale = make((8, 128))
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)
    with pytest.raises(ValueError, match="linear24_int8: packed does not.*64-byte boundary.*clone"):
        kernels.linear24_int8(torch.zeros(1, 128).bfloat16(), shifted, scale, 8)


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "error", "message"),
    [
        (torch.zeros(1, 128, dtype=torch.float64), 40, None, TypeError, "linear24_int8: x is Doub"),
        (torch.zeros(1, 126).bfloat16(), 40, None, ValueError, "in_features 126 is no positive"),
        (torch.zeros(1, 132).bfloat16(), 40, None, ValueError, r"uint8 \[5, 2, 640\]"),
        (torch.zeros(1, 128).bfloat16(), 41, None, ValueError, r"uint8 \[6, 1, 640\]"),
        (torch.zeros(1, 128), 40, torch.zeros(39), ValueError, r"bias is \[39\]; \[40\] is"),
    ],
)
def test_errors(x: Tensor, out_features: int, bias: Tensor, error: type, message: str) -> None:
    packed, scale = make((40, 128))
    with pytest.raises(error, match=message):
        kernels.linear24_int8(x, packed, scale, out_features, bias)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(39), r"scale is Float \[39\]; a contiguous float32 \[40\]"),
        (torch.ones(40).bfloat16(), r"scale is BFloat16 \[40\]"),
        (torch.ones(40, 1), r"scale is Float \[40, 1\]"),
        (torch.ones(80)[::2], r"a contiguous float32 \[40\] is needed"),
    ],
)
def test_scale_errors(scale: Tensor, message: str) -> None:
    packed, _ = make((40, 128))
    with pytest.raises(ValueError, match=message):
        kernels.linear24_int8(torch.zeros(1, 128), packed, scale, 40)


def test_a_weight_packed_in_16_bits_is_refused() -> None:
    packed = kernels.pack(*compress(torch.zeros(40, 128).bfloat16()))
    with pytest.raises(ValueError, match=r"uint8 \[5, 1, 640\]"):
        kernels.linear24_int8(torch.zeros(1, 128).bfloat16(), packed, torch.ones(40), 40)


def test_opcheck() -> None:
    packed, scale = make((40, 132))
    for bias in (None, torch.randn(40).bfloat16()):
        torch.library.opcheck(
            torch.ops.cast.linear24_int8,
            (torch.randn(3, 132).bfloat16(), packed, scale, 40, bias),
        )


def test_compiles_without_a_graph_break() -> None:
    packed, scale = make((40, 132))
    compiled = torch.compile(
        lambda x: torch.ops.cast.linear24_int8(x, packed, scale, 40) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    x = exact_x(3, 132, torch.bfloat16)
    assert torch.equal(compiled(x), reference.linear24_int8(x, packed, scale, 40) * 2)
