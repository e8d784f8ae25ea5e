"""cast::linear64, for weights that keep n of 64, against its reference, for every CPU kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.errors import PatternError
from cast_serve.kernels import reference64
from cast_serve.kernels.cpu import tuning
from cast_serve.kernels.reference import packed_shape
from cast_serve.kernels.reference64 import (
    pack64,
    pack_dense_int4,
    packed_shape64,
    unpack64,
)
from cast_serve.kernels.reference_int4 import int4_packed_shape
from cast_serve.sparsity.bitmask import pack_mask
from cast_serve.sparsity.pattern import Pattern, hard_mask
from tests.cast_serve.kernels.test_linear24_int8 import (
    DTYPES,
    NUM_TOKENS,
    assert_same_to_rounding,
    exact_x,
    group_of,
    scale_shape,
)

SHAPES = [
    *((1, 64, 32), (7, 192, 1), (16, 128, 63), (23, 128, 4), (33, 576, 40)),
    *((545, 320, 28), (40, 2048, 56)),
]
# Only of 4 bits: the output head. Rows, or columns, that are not whole tiles.
DENSE_SHAPES = [(7, 192, 64), (545, 320, 64), (40, 896, 64)]
KINDS = ["float", "int8", "int4-128", "int4-64", "int4-32"]
KINDS_AND_DTYPES = [
    *((kind, dtype) for kind in ("float", "int8") for dtype in DTYPES),
    ("int4-128", torch.bfloat16),
    ("int4-64", torch.float32),
    ("int4-32", torch.float16),
]


@dataclass
class Linear:
    """A packed weight behind its op; bitmask and values as on disk."""

    values: Tensor
    bitmask: Tensor
    kept: int
    kind: str
    scale: Tensor | None

    def __post_init__(self) -> None:
        kernels.load()
        group = group_of(self.kind) if self.kind.startswith("int4") else None
        self.packed = pack64(self.values, self.bitmask, self.scale if group else None, group)
        row_scale = self.scale if self.kind == "int8" else None
        self.others = (row_scale, group or 0)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out_features = len(self.values)
        return torch.ops.cast.linear64(x, self.packed, self.kept, out_features, bias, *self.others)

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out_features = len(self.values)
        return reference64.linear64(x, self.packed, self.kept, out_features, bias, *self.others)


@pytest.fixture
def tune() -> Iterator[Callable[..., None]]:
    kernels.load()
    before = tuning.current()
    yield lambda **changed: tuning.use(replace(before, **changed))
    tuning.use(before)


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int4-128", "int4-64", "int4-32"])
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_dense_weight_of_4_bits(kind: str, shape: tuple[int, int, int], is_exact: bool) -> None:
    linear = make(kind, shape, is_exact=is_exact)
    bias = torch.randint(-8, 9, shape[:1]).bfloat16()
    for num_tokens in (1, 4, 16, 64):
        x = exact_x(num_tokens, shape[1], torch.bfloat16)
        if is_exact:
            assert torch.equal(linear(x, bias), linear.expected(x, bias)), num_tokens
        else:
            x *= torch.rand(num_tokens, 1).bfloat16()
            assert_same_to_rounding(linear(x, bias), linear.expected(x, bias), bias)


@pytest.mark.parametrize("num_rows", [40, 5000])  # in one slab, and in two
def test_a_dense_weight_is_packed_as_one_that_keeps_all(num_rows: int) -> None:
    linear = make("int4-32", (num_rows, 192, 64))
    assert linear.scale is not None
    assert torch.equal(pack_dense_int4(linear.values, linear.scale, 32), linear.packed)
    weight, _, scale = unpack64(linear.packed, num_rows, 192, 64, torch.int8, 32)
    assert torch.equal(weight, linear.values)
    assert torch.equal(scale, linear.scale.bfloat16())


def random_mask(out_features: int, in_features: int, kept: int) -> Tensor:
    return hard_mask(torch.rand(out_features, in_features), Pattern(kept, 64))


def make(
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    is_exact: bool = True,
) -> Linear:
    """A random weight; if `is_exact`, of small integers with powers of two as scales."""
    torch.manual_seed(0)
    out_features, in_features, kept = shape
    mask = random_mask(out_features, in_features, kept)
    num_kept = (out_features, in_features * kept // 64)
    scale = None
    if kind == "float":
        values = torch.randint(-4, 5, num_kept).to(dtype)
        values = values if is_exact else torch.randn(num_kept).to(dtype)
    else:
        least, most = (-63, 63) if kind == "int8" else (-8, 7)
        values = torch.randint(least, most + 1, num_kept, dtype=torch.int8)
        scales = scale_shape(kind, (out_features, in_features))
        scale = torch.exp2(torch.randint(-9, -5, scales).float())
        scale = scale if is_exact else torch.rand(scales) * 1e-2 + 1e-3
    return Linear(values, pack_mask(mask), kept, kind, scale)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums_are_equal_bit_for_bit(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    linear = make(kind, shape, dtype)
    bias = torch.randint(-8, 9, shape[:1]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = exact_x(num_tokens, shape[1], dtype)
        if kind == "float":
            x = torch.randint(-4, 5, (num_tokens, shape[1])).to(dtype)
        for added in (None, bias):
            assert torch.equal(linear(x, added), linear.expected(x, added)), num_tokens


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_activations(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    linear = make(kind, shape, dtype, is_exact=False)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = (torch.randn(num_tokens, shape[1]) * torch.rand(num_tokens, 1) * 4).to(dtype)
        x[num_tokens // 2, : shape[1] // 2] = 0
        assert_same_to_rounding(linear(x, bias), linear.expected(x, bias), bias)


@pytest.mark.parametrize(("kind", "kept"), [*((kind, 40) for kind in KINDS), ("int4-64", 64)])
def test_a_librarys_product_is_the_same(kind: str, kept: int, tune: Callable[..., None]) -> None:
    linear = make(kind, (601, 320, kept))
    tune(library=32, library_int8=32)
    for num_tokens in (32, 130):
        x = exact_x(num_tokens, 320, torch.bfloat16)
        assert_same_to_rounding(linear(x), linear.expected(x))


@pytest.mark.parametrize("few", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_by_the_kernel_for_many(kind: str, few: int, tune: Callable[..., None]) -> None:
    linear = make(kind, (33, 576, 28))
    tune(few=few, few_int8=few, few_int4=few)
    for num_tokens in (*range(1, 27), 700):  # 700 take several passes
        x = torch.randint(-4, 5, (num_tokens, 576)).bfloat16()
        if kind != "float":
            x = exact_x(num_tokens, 576, torch.bfloat16)
        assert torch.equal(linear(x), linear.expected(x)), num_tokens


@pytest.mark.parametrize("num_tokens", [*range(1, 10), 20])
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", -127, 127), ("int4-128", -8, 7)])
def test_the_largest_integers_do_not_overflow(
    kind: str, least: int, most: int, num_tokens: int
) -> None:
    values = torch.full((16, 640 * 63 // 64), most, dtype=torch.int8)
    values[1::2] = least
    mask = random_mask(16, 640, 63)
    scale = torch.ones(scale_shape(kind, (16, 640)))
    linear = Linear(values, pack_mask(mask), 63, kind, scale)
    x = torch.full((num_tokens, 640), -127.0)
    x[1::3] = 127.0
    assert torch.equal(linear(x), x[:, :1] * 630 * values[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("num_tokens", [2, 6, 33])
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_where_nan_and_inf_in_the_input_go(
    kind: str, dtype: torch.dtype, num_tokens: int, value: float
) -> None:
    """Integers: to the token's whole output. Else to the rows that keep the column."""
    linear = make(kind, (24, 320, 20), dtype, is_exact=False)
    x = torch.randn(num_tokens, 320).to(dtype)
    clean, token = linear(x), num_tokens // 2
    x[token, 130] = value
    out = linear(x)
    others = torch.arange(num_tokens) != token
    assert_same_to_rounding(out[others], clean[others])
    keeps = (linear.bitmask[:, 130 // 8] >> 130 % 8 & 1).bool()
    assert 0 < keeps.sum() < 24
    is_finite = ~keeps if kind == "float" else torch.zeros(24, dtype=torch.bool)
    assert torch.equal(out[token].isfinite(), is_finite)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_for_any_strides_threads_and_memory(kind: str) -> None:
    linear = make(kind, (129, 576, 40))
    wide = torch.randint(-4, 5, (3, 5, 2 * 576)).bfloat16()
    transposed = torch.randint(-4, 5, (576, 9)).bfloat16().T
    for x in (wide[..., :576], wide[:, ::2, 576:], transposed, wide[0, 0, :576]):
        assert_same_to_rounding(linear(x), linear.expected(x))
    assert linear(torch.empty(0, 576).bfloat16()).shape == (0, 129)
    before = torch.get_num_threads()
    expected = linear(wide[..., :576])
    try:
        torch.use_deterministic_algorithms(True)  # new memory is NaN then
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(linear(wide[..., :576]), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_unpacking_gives_back_what_was_packed(
    kind: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    linear = make(kind, shape, dtype, is_exact=False)
    group = linear.others[1] or None
    weight, mask, scale = unpack64(linear.packed, *shape, linear.values.dtype, group)
    assert torch.equal(pack_mask(mask), linear.bitmask)
    assert torch.equal(weight[mask], linear.values.flatten())
    assert not weight[~mask].any()
    if linear.scale is not None and group:
        assert torch.equal(scale, linear.scale.bfloat16())


def test_32_of_64_take_the_bytes_of_2_4() -> None:
    for dtype in (*DTYPES, torch.int8):
        wide, narrow = packed_shape64(64, 256, 32, dtype), packed_shape(64, 256, dtype)
        assert torch.Size(wide).numel() == torch.Size(narrow).numel()
    for group in (128, 64, 32):
        wide = packed_shape64(64, 256, 32, torch.int8, group)
        narrow = int4_packed_shape(64, 256, group)
        assert torch.Size(wide).numel() == torch.Size(narrow).numel()


def test_packing_works_without_data() -> None:
    values = torch.empty(40, 160, dtype=torch.int8, device="meta")
    bitmask = torch.empty(40, 40, dtype=torch.uint8, device="meta")
    assert pack64(values, bitmask).shape == packed_shape64(40, 320, 32, torch.int8)


def test_a_word_with_another_number_of_bits_is_refused() -> None:
    linear = make("int8", (40, 128, 32))
    bitmask = linear.bitmask.clone()
    bitmask[7, 8:16] = 255
    with pytest.raises(PatternError, match=r"exactly 32 of 64.* row 7, word 1, with 64"):
        pack64(linear.values, bitmask)


@pytest.mark.parametrize(
    ("kept", "in_features", "message"),
    [
        (0, 128, "0 of 64"),
        (64, 128, "64 of 64 columns are kept; 1 to 63 is needed, or 64 in 4 bits"),
        (32, 96, "in_features 96"),
        (8, 0, "in_features 0"),
    ],
)
def test_what_is_not_n_of_64_is_refused(kept: int, in_features: int, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        packed_shape64(8, in_features, kept, torch.int8)
    kernels.load()
    packed = torch.zeros(1, 1, 640, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        torch.ops.cast.linear64(torch.zeros(1, in_features), packed, kept, 8)


def test_4_bit_values_and_scales_out_of_range_are_refused() -> None:
    linear = make("int4-64", (8, 128, 32))
    with pytest.raises(ValueError, match="values are 8 to 8; 4 bits hold -8 to 7"):
        pack64(torch.full_like(linear.values, 8), linear.bitmask, linear.scale, 64)
    with pytest.raises(ValueError, match="not finite"):
        pack64(linear.values, linear.bitmask, torch.full_like(linear.scale, float("inf")), 64)
    with pytest.raises(ValueError, match=r"\[8, 4\] is needed"):
        pack64(linear.values, linear.bitmask, linear.scale, 32)
    with pytest.raises(ValueError, match="16 columns is none of"):
        pack64(linear.values, linear.bitmask, linear.scale, 16)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(1, 128, dtype=torch.float64)}, TypeError, "linear64: x is Doub"),
        ({"x": torch.zeros(1, 192)}, ValueError, r"uint8 \[3, 2, 1280\]"),
        ({"kept": 33}, ValueError, r"uint8 \[3, 1, 1312\]"),
        ({"bias": torch.zeros(39)}, ValueError, r"bias is \[39\]"),
        ({"scale": torch.ones(39)}, ValueError, r"scale is Float \[39\]"),
        ({"scale_group": 64}, ValueError, "pass one of them"),
        ({"scale": None, "scale_group": 16}, ValueError, "16 columns is none of"),
        (
            {"packed": torch.empty(3 * 1280 + 1, dtype=torch.uint8)[1:].view(3, 1, 1280)},
            ValueError,
            "64-byte boundary",
        ),
    ],
)
def test_errors(changed: dict[str, object], error: type, message: str) -> None:
    linear = make("int8", (40, 128, 32))
    arguments = {
        "x": torch.zeros(1, 128),
        "packed": linear.packed,
        "kept": 32,
        "out_features": 40,
        "bias": None,
        "scale": linear.scale,
        "scale_group": 0,
    }
    with pytest.raises(error, match=message):
        torch.ops.cast.linear64(**{**arguments, **changed})


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind: str) -> None:
    linear = make(kind, (40, 192, 32))
    x = torch.randint(-4, 5, (3, 192)).bfloat16()
    arguments = (x, linear.packed, 32, 40, torch.randn(40).bfloat16(), *linear.others)
    torch.library.opcheck(torch.ops.cast.linear64, arguments)
    compiled = torch.compile(lambda x: linear(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x) * 2)
