"""cast::linear_int8, the dense one of the head, against reference.py, for every kernel here."""

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels import reference
from cast_serve.sparsity.pattern import PatternError
from tests.cast_serve.kernels.test_linear24_int8 import assert_same_to_rounding

SHAPES = [(1, 4), (7, 60), (8, 128), (33, 576), (600, 132), (40, 1536), (16, 8192)]
NUM_TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight within +-127, packed, and positive scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 1e-2 + 1e-3
    return weight, kernels.pack_dense(weight), scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(shape: tuple[int, int]) -> None:
    weight, packed, _ = make(shape)
    assert tuple(packed.shape) == kernels.packed_dense_shape(*shape)
    assert torch.equal(reference.unpack_dense(packed, *shape), weight)
    with pytest.raises(PatternError, match=r"a dense int8 \[\d+, \d+\] needs \["):
        reference.unpack_dense(packed, shape[0] + 8, shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    _, packed, scale = make(shape)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = (torch.randn(num_tokens, shape[1]) * torch.rand(num_tokens, 1) * 4).to(dtype)
        out = kernels.linear_int8(x, packed, scale, shape[0], bias)
        expected = reference.linear_int8(x, packed, scale, shape[0], bias)
        assert_same_to_rounding(out, expected, bias)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_integers_are_exact(num_tokens: int) -> None:
    weight = torch.full((16, 576), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.full((num_tokens, 576), -127.0)
    x[1::3] = 127.0
    out = kernels.linear_int8(x, kernels.pack_dense(weight), torch.ones(16), 16)
    assert torch.equal(out, x[:, :1] * 127 * 576 * torch.tensor([1, -1]).repeat(8))


@pytest.mark.parametrize("num_tokens", [1, 3, 12])
def test_nan_makes_its_tokens_whole_row_nan(num_tokens: int) -> None:
    _, packed, scale = make((24, 260))
    x = torch.randn(num_tokens, 260)
    clean = kernels.linear_int8(x, packed, scale, 24)
    x[num_tokens // 2, 130] = float("inf")
    out = kernels.linear_int8(x, packed, scale, 24)
    assert out[num_tokens // 2].isnan().all()
    others = torch.arange(num_tokens) != num_tokens // 2
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_nothing_unwritten_is_read_or_returned(num_tokens: int) -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    _, packed, scale = make((1049, 132))
    x = torch.randn(num_tokens, 132)
    expected = kernels.linear_int8(x, packed, scale, 1049)
    torch.use_deterministic_algorithms(True)
    try:
        out = kernels.linear_int8(x, packed, scale, 1049)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("x", "scale", "error", "message"),
    [
        (torch.zeros(1, 128, dtype=torch.float64), torch.ones(40), TypeError, "linear_int8: x is"),
        (torch.zeros(1, 260), torch.ones(40), ValueError, r"uint8 \[5, 3, 1024\]"),
        (torch.zeros(1, 128), torch.ones(39), ValueError, r"linear_int8: scale is Float \[39\]"),
    ],
)
def test_errors(x: Tensor, scale: Tensor, error: type, message: str) -> None:
    _, packed, _ = make((40, 128))
    with pytest.raises(error, match=message):
        kernels.linear_int8(x, packed, scale, 40)


def test_opcheck_and_compile() -> None:
    _, packed, scale = make((40, 132))
    x = torch.randn(3, 132).bfloat16()
    torch.library.opcheck(torch.ops.cast.linear_int8, (x, packed, scale, 40, None))
    compiled = torch.compile(
        lambda x: torch.ops.cast.linear_int8(x, packed, scale, 40) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), kernels.linear_int8(x, packed, scale, 40) * 2)
