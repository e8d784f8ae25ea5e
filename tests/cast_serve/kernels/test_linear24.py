"""cast::linear24 against reference.py, for every kernel that this CPU has."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels import reference
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask

SHAPES = [(1, 4), (7, 60), (8, 64), (33, 576), (129, 68), (40, 1536), (16, 8192), (1049, 132)]
NUM_TOKENS = [*range(1, 18), 31, 32, 33, 41, 64, 130, 257]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The output's own rounding, as a share of its norm, and what fp32 sums in another order add, as a
# share of the norm that random signs would give: one sum alone may be close to 0.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def make(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    weight = (scores * hard_mask(scores.abs())).to(dtype)
    return weight, kernels.pack(*compress(weight))


def assert_is_product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tolerance: dict[torch.dtype, float] = TOLERANCE,
) -> None:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert out.shape == expected.shape
    assert out.dtype == x.dtype
    squares = x.double() ** 2 @ weight.double().T ** 2 + (0 if bias is None else bias.double() ** 2)
    size = torch.hypot(expected.norm(), squares.sum().sqrt())
    assert (out.double() - expected).norm() / size < tolerance[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, packed = make(shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        assert_is_product(kernels.linear24(x, packed, shape[0], bias), x, weight, bias)
        assert_is_product(kernels.linear24(x, packed, shape[0]), x, weight)


def test_so_many_tokens_that_they_take_several_passes() -> None:
    weight, packed = make((1049, 132), torch.bfloat16)
    x = torch.randn(700, 132).bfloat16()
    assert_is_product(kernels.linear24(x, packed, 1049), x, weight)


@pytest.mark.skipif(
    "CAST_TEST_EXPECTED_ISA" not in os.environ,
    reason="no kernel is forced here; test_other_isas.py runs this with each other one",
)
def test_the_forced_isa_runs() -> None:
    assert kernels.isa() == os.environ["CAST_TEST_EXPECTED_ISA"]


def test_an_absent_isa_raises() -> None:
    code = "from cast_serve import kernels; kernels.isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CAST_CPU_ISA": "neon"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "CAST_CPU_ISA=neon is not a kernel of this CPU; it has: " in done.stderr


def test_any_leading_dimensions_and_strides() -> None:
    weight, packed = make((40, 64), torch.bfloat16)
    wide = torch.randn(3, 5, 2 * 64).bfloat16()
    transposed = torch.randn(64, 9).bfloat16().T
    for x in (wide[..., :64], wide[:, ::2, 64:], transposed, torch.randn(64).bfloat16()):
        assert_is_product(kernels.linear24(x, packed, 40), x, weight)
    assert kernels.linear24(torch.empty(0, 64).bfloat16(), packed, 40).shape == (0, 40)


@pytest.mark.parametrize("num_tokens", [1, 3, 6, 20, 33])
def test_nan_and_inf_reach_exactly_the_rows_that_keep_their_column(num_tokens: int) -> None:
    weight, packed = make((24, 64), torch.bfloat16)
    for value, hits in ((float("nan"), torch.isnan), (float("inf"), torch.isinf)):
        x = torch.randn(num_tokens, 64).bfloat16()
        x[num_tokens // 2, 10] = value
        is_hit = hits(kernels.linear24(x, packed, 24))
        assert torch.equal(is_hit[num_tokens // 2], weight[:, 10] != 0)
        assert is_hit.sum() == (weight[:, 10] != 0).sum()


def test_large_values_keep_their_range() -> None:
    weight, packed = make((16, 64), torch.bfloat16)
    x = torch.full((2, 64), 1e30, dtype=torch.bfloat16)
    assert_is_product(kernels.linear24(x, packed, 16), x, weight)


def test_the_same_with_one_thread_and_with_three() -> None:
    _, packed = make((129, 576), torch.bfloat16)
    x = torch.randn(20, 576).bfloat16()
    many = kernels.linear24(x, packed, 129)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(kernels.linear24(x, packed, 129), many)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_tokens", [1, 5, 12, 33, 130])
def test_nothing_unwritten_is_read_or_returned(num_tokens: int) -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    weight, packed = make((1049, 132), torch.bfloat16)
    x = torch.randn(num_tokens, 132).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert_is_product(kernels.linear24(x, packed, 1049), x, weight)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unaligned_weight_is_refused() -> None:
    _, packed = make((8, 64), torch.bfloat16)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)
    with pytest.raises(ValueError, match="64-byte boundary.*clone"):
        kernels.linear24(torch.zeros(1, 64).bfloat16(), shifted, 8)


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "error", "message"),
    [
        (torch.zeros(1, 64, dtype=torch.float64), 40, None, TypeError, "x is Double"),
        (torch.zeros(1, 62).bfloat16(), 40, None, ValueError, "in_features 62 is not a positive"),
        (torch.zeros(1, 128).bfloat16(), 40, None, ValueError, r"need a contiguous uint8 \[5, 2,"),
        (torch.zeros(1, 64).bfloat16(), 41, None, ValueError, r"need a contiguous uint8 \[6, 1,"),
        (torch.zeros(1, 64), 40, None, ValueError, r"need a contiguous uint8 \[5, 1, 1088\]"),
        (torch.zeros(1, 64).bfloat16(), 40, torch.zeros(39), ValueError, r"bias is \[39\]"),
    ],
)
def test_errors(x: Tensor, out_features: int, bias: Tensor, error: type, message: str) -> None:
    _, packed = make((40, 64), torch.bfloat16)
    with pytest.raises(error, match=message):
        kernels.linear24(x, packed, out_features, bias)


def test_opcheck() -> None:
    _, packed = make((40, 64), torch.bfloat16)
    for bias in (None, torch.randn(40).bfloat16()):
        torch.library.opcheck(
            torch.ops.cast.linear24, (torch.randn(3, 64).bfloat16(), packed, 40, bias)
        )


def test_compiles_without_a_graph_break() -> None:
    kernels.load()
    weight, packed = make((40, 64), torch.bfloat16)
    compiled = torch.compile(
        lambda x: torch.ops.cast.linear24(x, packed, 40) * 2, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(compiled(x), reference.linear24(x, packed, 40) * 2)
