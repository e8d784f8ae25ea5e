"""cast::linear24_int8 and linear24_int4 against their references, for every kernel of this CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels import reference, reference_int4
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from cast_serve.sparsity.quantize import quantize_groups

SHAPES = [(1, 4), (7, 60), (8, 128), (33, 576), (129, 132), (40, 1536), (16, 8192), (1049, 260)]
NUM_TOKENS = [*range(1, 18), 31, 32, 33, 64, 130, 257]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["int8", "int4-128", "int4-64", "int4-32"]  # bits, and columns that share a scale
# Each kind and each dtype, and where they meet in the code: 8-bit weights, and one scale a tile.
KINDS_AND_DTYPES = [
    *(("int8", dtype) for dtype in DTYPES),
    *(("int4-128", dtype) for dtype in DTYPES),
    ("int4-64", torch.bfloat16),
    ("int4-32", torch.float16),
]
# The output's own rounding, as a share of its norm, and what fp32 sums in another order add.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}


@dataclass
class Linear:
    """A packed weight behind its op."""

    packed: Tensor
    others: tuple[Tensor | int, ...]  # between packed and out_features
    out_features: int
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]

    def arguments(self, x: Tensor, bias: Tensor | None = None) -> tuple[object, ...]:
        return (x, self.packed, *self.others, self.out_features, bias)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.op(*self.arguments(x, bias))

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.reference(*self.arguments(x, bias))


def group_of(kind: str) -> int:
    """0 of int8."""
    return int(kind.partition("-")[2] or 0)


def linear_of(kind: str, values: Tensor, bitmask: Tensor, scale: Tensor) -> Linear:
    """scale: of int8 fp32 [out_features], else [out_features, number of scale groups]."""
    kernels.load()
    group, ops = group_of(kind), torch.ops.cast
    if not group:
        packed, others = kernels.pack(values, bitmask), (scale,)
        return Linear(packed, others, len(values), ops.linear24_int8, reference.linear24_int8)
    packed = kernels.pack_int4(values, bitmask, scale, group)
    of_int4 = reference_int4.linear24_int4
    return Linear(packed, (group,), len(values), ops.linear24_int4, of_int4)


def scale_shape(kind: str, shape: tuple[int, int]) -> tuple[int, ...]:
    group = group_of(kind)
    return (shape[0], -(-shape[1] // group)) if group else shape[:1]


def make(kind: str, shape: tuple[int, int], seed: int = 0, is_exact: bool = True) -> Linear:
    """A random weight within +-63, of 4 bits -8 to 7; if `is_exact`, scales are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    least, most = (-8, 7) if group_of(kind) else (-63, 63)
    weight = torch.randint(least, most + 1, shape, generator=generator, dtype=torch.int8)
    values, bitmask = compress(weight * hard_mask(scores.abs()))
    scales = scale_shape(kind, shape)
    scale = torch.exp2(torch.randint(-9, -5, scales, generator=generator).float())
    if not is_exact:
        scale = torch.rand(scales, generator=generator) * 1e-2 + 1e-3
    return linear_of(kind, values, bitmask, scale)


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


def assert_same_to_rounding(out: Tensor, expected: Tensor, bias: Tensor | None = None) -> None:
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    size = expected.double().norm()
    if bias is not None:  # which may cancel the product: what is rounded is as large as the bias
        size = torch.hypot(size, bias.double().expand_as(expected).norm())
    assert (out.double() - expected.double()).norm() / size < TOLERANCE[out.dtype]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums_are_equal_bit_for_bit(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    linear = make(kind, shape)
    bias = torch.randint(-8, 9, shape[:1]).float()
    for num_tokens in NUM_TOKENS:
        x = exact_x(num_tokens, shape[1], dtype)
        for added in (None, bias.to(dtype)):
            assert torch.equal(linear(x, added), linear.expected(x, added)), num_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_tokens_that_they_take_several_passes(kind: str) -> None:
    linear = make(kind, (1049, 260))
    x = exact_x(700, 260, torch.bfloat16)
    assert torch.equal(linear(x), linear.expected(x))


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", -127, 127), ("int4-128", -8, 7)])
def test_the_largest_integers_do_not_overflow(
    kind: str, least: int, most: int, num_tokens: int
) -> None:
    values = torch.full((16, 288), most, dtype=torch.int8)
    values[1::2] = least
    bitmask = torch.full((16, 72), 0x5A, dtype=torch.uint8)
    linear = linear_of(kind, values, bitmask, torch.ones(scale_shape(kind, (16, 576))))
    x = torch.full((num_tokens, 576), -127.0)
    x[1::3] = 127.0
    assert torch.equal(linear(x), x[:, :1] * 288 * values[:, 0])


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_activations(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    linear = make(kind, shape, is_exact=False)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = (torch.randn(num_tokens, shape[1]) * torch.rand(num_tokens, 1) * 4).to(dtype)
        x[num_tokens // 2, : shape[1] // 2] = 0
        assert_same_to_rounding(linear(x, bias), linear.expected(x, bias), bias)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_the_specifications(kind: str) -> None:
    """One weight of 1 a row reads the integers back, those on a half among them."""
    weight = torch.zeros(128, 128, dtype=torch.int8)
    weight[torch.arange(128), torch.arange(128)] = 1
    linear = linear_of(kind, *compress(weight), torch.ones(scale_shape(kind, (128, 128))))
    x = torch.randn(40, 128) * torch.exp2(torch.randint(-60, 60, (40, 1)).float())
    x[:20] = torch.arange(-1280, 1280).view(20, 128) / 2 % 127  # halves
    x[5:10] *= -1
    x[:20, 0] = 127.0  # so the scale is 1
    x[1] = 0
    x[2] = 1e-44  # the scale rounds to 0 in fp32
    x[4] = torch.finfo(torch.float32).max
    if kind == "int8":  # a subnormal scale: x / scale passes 127
        x[3] = torch.arange(128) * 1e-45
        assert quantize_groups(x)[1][3] > 0
    integers, x_scale = quantize_groups(x)
    assert x_scale[2] == 0
    assert integers.unique().numel() > 250
    expected = integers[:, 0].float() * x_scale
    for rows in (x, x[:1], x[1:5], x[20:29]):
        first = 0 if rows.shape[0] in (1, 40) else 1 if rows.shape[0] == 4 else 20
        assert torch.equal(linear(rows), expected[first : first + rows.shape[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_dimensions_and_strides(kind: str) -> None:
    linear = make(kind, (40, 132))
    wide = torch.randn(3, 5, 2 * 132).bfloat16()
    transposed = torch.randn(132, 9).bfloat16().T
    for x in (wide[..., :132], wide[:, ::2, 132:], transposed, torch.randn(132).bfloat16()):
        assert_same_to_rounding(linear(x), linear.expected(x))
    assert linear(torch.empty(0, 132).bfloat16()).shape == (0, 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 6, 20, 33])
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_nan_and_inf_make_their_tokens_whole_row_nan(
    kind: str, dtype: torch.dtype, num_tokens: int, value: float
) -> None:
    linear = make(kind, (24, 260))
    x = torch.randn(num_tokens, 260).to(dtype)
    clean = linear(x)
    assert clean.isfinite().all()
    x[num_tokens // 2, 130] = value
    out = linear(x)
    assert out[num_tokens // 2].isnan().all()
    others = torch.arange(num_tokens) != num_tokens // 2
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_one_thread_and_with_three(kind: str) -> None:
    linear = make(kind, (129, 576))
    for num_tokens in (2, 20):
        x = torch.randn(num_tokens, 576).bfloat16()
        many = linear(x)
        before = torch.get_num_threads()
        try:
            for num_threads in (1, 3):
                torch.set_num_threads(num_threads)
                assert torch.equal(linear(x), many)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 5, 12, 33, 130])
def test_nothing_unwritten_is_read_or_returned(num_tokens: int, kind: str) -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    linear = make(kind, (1049, 132))
    x = exact_x(num_tokens, 132, torch.float32)
    expected = linear.expected(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        out = linear(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unaligned_weight_is_refused(kind: str) -> None:
    linear = make(kind, (8, 128))
    shifted = torch.empty(linear.packed.numel() + 1, dtype=torch.uint8)[1:]
    linear.packed = shifted.view(linear.packed.shape)
    with pytest.raises(ValueError, match=r"int[48]: packed does not.*64-byte boundary.*clone"):
        linear(torch.zeros(1, 128).bfloat16())


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "error", "message"),
    [
        (torch.zeros(1, 128, dtype=torch.float64), 40, None, TypeError, "OP: x is Doub"),
        (torch.zeros(1, 126).bfloat16(), 40, None, ValueError, "OP: in_features 126 is not a p"),
        (torch.zeros(1, 132).bfloat16(), 40, None, ValueError, r"uint8 \[5, 2, BYTES\]"),
        (torch.zeros(1, 128).bfloat16(), 41, None, ValueError, r"uint8 \[6, 1, BYTES\]"),
        (torch.zeros(1, 128), 40, torch.zeros(39), ValueError, r"bias is \[39\]; \[40\] is"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "num_bytes"), [("int8", 640), ("int4-128", 400), ("int4-64", 416)]
)
def test_errors(
    kind: str,
    num_bytes: int,
    x: Tensor,
    out_features: int,
    bias: Tensor,
    error: type,
    message: str,
) -> None:
    linear = make(kind, (40, 128))
    linear.out_features = out_features
    name = "linear24_" + kind.partition("-")[0]
    with pytest.raises(error, match=message.replace("OP", name).replace("BYTES", str(num_bytes))):
        linear(x, bias)


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
    linear = make("int8", (40, 128))
    with pytest.raises(ValueError, match=message):
        kernels.linear24_int8(torch.zeros(1, 128), linear.packed, scale, 40)


@pytest.mark.parametrize("group", [-128, 0, 16, 256])
def test_a_scale_group_of_another_size_is_refused(group: int) -> None:
    linear = make("int4-128", (40, 128))
    for x in (torch.zeros(1, 128), torch.zeros(1, 128, device="meta")):
        with pytest.raises(ValueError, match=f"of {group} columns is none of 128, 64 and 32"):
            kernels.linear24_int4(x, linear.packed, group, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_packed_in_other_bits_is_refused(kind: str) -> None:
    linear = make(kind, (40, 128))
    linear.packed = kernels.pack(*compress(torch.zeros(40, 128).bfloat16()))
    with pytest.raises(ValueError, match=r"uint8 \[5, 1, \d+\]"):
        linear(torch.zeros(1, 128).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    linear = make(kind, (40, 132))
    for bias in (None, torch.randn(40).bfloat16()):
        torch.library.opcheck(linear.op, linear.arguments(torch.randn(3, 132).bfloat16(), bias))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind: str) -> None:
    linear = make(kind, (40, 132))
    op, others = linear.op, linear.arguments(torch.empty(0))[1:]
    compiled = torch.compile(lambda x: op(x, *others) * 2, fullgraph=True, backend="aot_eager")
    x = exact_x(3, 132, torch.bfloat16)
    assert torch.equal(compiled(x), linear.expected(x) * 2)


def test_the_python_names_are_the_ops() -> None:
    x = exact_x(2, 132, torch.bfloat16)
    int8, int4 = make("int8", (40, 132)), make("int4-32", (40, 132))
    out = kernels.linear24_int8(x, int8.packed, torch.ones(40), 40)
    assert torch.equal(out, reference.linear24_int8(x, int8.packed, torch.ones(40), 40))
    assert torch.equal(kernels.linear24_int4(x, int4.packed, 32, 40), int4.expected(x))
