"""The 4-bit Triton kernel against fp64, in Triton's interpreter: run by test_triton_int4.py.

It needs a process of its own, with TRITON_INTERPRET=1, as interpreted_triton24.py.
"""

import os

import pytest
import torch
from torch import Tensor

from cast_serve.kernels import pack_int4, reference_int4
from cast_serve.kernels.gpu import dispatch, triton_int4
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from tests.cast_serve.kernels.gpu.interpreted_triton24 import assert_is_product

assert os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 4), (7, 60), (8, 128), (33, 576), (129, 68), (265, 132)]
NUM_TOKENS = [1, 17, 130]
GROUPS = pytest.mark.parametrize("group", [128, 64, 32])


def make(shape: tuple[int, int], group: int) -> tuple[Tensor, Tensor]:
    """A random weight in fp64, as it is dequantised; and packed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    weight *= hard_mask(torch.rand(shape, generator=generator))
    scale = torch.rand(shape[0], -(-shape[1] // group), generator=generator) * 1e-1 + 1e-2
    columns = scale.bfloat16().double().repeat_interleave(group, dim=1)[:, : shape[1]]
    return weight * columns, pack_int4(*compress(weight), scale, group)


@pytest.mark.parametrize(
    ("group", "dtype"),
    [(128, torch.bfloat16), (128, torch.float16), (64, torch.bfloat16), (32, torch.float16)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype, group: int) -> None:
    """In fp16 the tolerance is a tenth of what quantising x would add."""
    weight, packed = make(shape, group)
    bias = torch.randn(shape[0]).to(dtype)
    for index, num_tokens in enumerate(NUM_TOKENS):
        x, added = torch.randn(num_tokens, shape[1]).to(dtype), bias if index % 2 else None
        out = dispatch.linear24_int4(x, packed, group, shape[0], added)
        assert_is_product(out, x, weight, added)


@GROUPS
@pytest.mark.parametrize("num_processors", [1, 1000])
def test_k_split_over_programs_gives_the_same(num_processors: int, group: int) -> None:
    weight, packed = make((40, 1536), group)
    x, bias = torch.randn(5, 1536).bfloat16(), torch.randn(40).bfloat16()
    out = triton_int4.linear24_int4(x, packed, group, 40, bias, num_processors)
    assert_is_product(out, x, weight, bias)


@GROUPS
def test_every_integer_comes_back_from_every_column(group: int) -> None:
    """One activation of 1 a token reads a column of the weight, exactly."""
    weight = (torch.arange(255 * 132).view(132, 255).T % 16 - 8).to(torch.int8)
    weight *= hard_mask(torch.rand(weight.shape))
    packed = pack_int4(*compress(weight), torch.ones(255, -(-132 // group)), group)
    out = dispatch.linear24_int4(torch.eye(132).bfloat16(), packed, group, 255)
    assert torch.equal(out, weight.T.bfloat16())


@GROUPS
def test_any_leading_dimensions_and_strides(group: int) -> None:
    weight, packed = make((40, 64), group)
    bias = torch.randn(80).bfloat16()[::2]
    wide, transposed = torch.randn(3, 5, 2 * 64).bfloat16(), torch.randn(64, 9).bfloat16().T
    odd = torch.randn(4, 67).bfloat16()[:, 1:65]
    for x in (wide[..., :64], wide[:, ::2, 64:], transposed, odd, torch.randn(64).bfloat16()):
        assert_is_product(dispatch.linear24_int4(x, packed, group, 40, bias), x, weight, bias)
    empty = torch.empty(0, 64).bfloat16()
    assert dispatch.linear24_int4(empty, packed, group, 40).shape == (0, 40)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
def test_nan_and_inf_stay_with_their_token() -> None:
    _, packed = make((24, 260), 64)
    x = torch.randn(4, 260).bfloat16()
    clean = dispatch.linear24_int4(x, packed, 64, 24)
    x[1, 130], x[2, 131] = float("nan"), float("inf")
    out = dispatch.linear24_int4(x, packed, 64, 24)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


def test_a_cpu_differs_by_what_it_rounds_x() -> None:
    """Activations that a CPU need not round give the same here and there."""
    _, packed = make((40, 132), 32)
    x = torch.randint(-127, 128, (3, 132)).half()
    x[:, ::64] = 127.0  # the largest of each scale group of x: its scale is 1
    out = dispatch.linear24_int4(x, packed, 32, 40)
    torch.testing.assert_close(out, reference_int4.linear24_int4(x, packed, 32, 40))


@pytest.mark.parametrize(
    ("x", "group", "error", "message"),
    [
        (torch.zeros(1, 128), 128, TypeError, "linear24_int4: x is torch.float32; bfloat16 or"),
        (torch.zeros(1, 128).half(), 96, ValueError, "group of 96 columns is none of 128, 64"),
        (torch.zeros(1, 128).half(), 64, ValueError, r"need a contiguous uint8 \[5, 1, 416\]"),
    ],
)
def test_errors(x: Tensor, group: int, error: type, message: str) -> None:
    _, packed = make((40, 128), 128)
    with pytest.raises(error, match=message):
        dispatch.linear24_int4(x, packed, group, 40)


def test_opcheck() -> None:
    """The Python op as torch.library sees it, under a CPU key of its own."""
    library = torch.library.Library("cast_test_int4", "FRAGMENT")
    library.define(
        "linear24_int4(Tensor x, Tensor packed, int group, int out_features, Tensor? bias) "
        "-> Tensor"
    )
    library.impl("linear24_int4", dispatch.linear24_int4, "CPU")
    fake = lambda x, packed, group, out_features, bias: x.new_empty(*x.shape[:-1], out_features)  # noqa: E731
    torch.library.register_fake("cast_test_int4::linear24_int4", fake, lib=library)
    _, packed = make((40, 64), 32)
    for bias in (None, torch.randn(40).bfloat16()):
        given = (torch.randn(3, 64).bfloat16(), packed, 32, 40, bias)
        torch.library.opcheck(torch.ops.cast_test_int4.linear24_int4, given)
