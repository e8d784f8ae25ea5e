"""The int8 Triton kernel against fp64, in Triton's interpreter: run by test_triton_int8.py.

It needs a process of its own, with TRITON_INTERPRET=1, as interpreted_triton24.py.
"""

import os

import pytest
import torch
from torch import Tensor

from cast_serve.kernels import pack, pack_dense, reference
from cast_serve.kernels.gpu import dispatch, triton_int8
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from tests.cast_serve.kernels.gpu.interpreted_triton24 import assert_is_product

assert os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 4), (7, 60), (8, 128), (33, 576), (129, 68), (40, 1536), (16, 2304), (521, 132)]
NUM_TOKENS = [1, 17, 33, 130]
DTYPES = [torch.bfloat16, torch.float16]
LINEARS = {True: dispatch.linear24_int8, False: dispatch.linear_int8}
OPS = pytest.mark.parametrize("is_sparse", [True, False], ids=["2:4", "dense"])


def make(shape: tuple[int, int], is_sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight in fp64, as it is dequantised; packed; and its scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 1e-2 + 1e-3
    if is_sparse:
        weight *= hard_mask(torch.rand(shape, generator=generator))
    packed = pack(*compress(weight)) if is_sparse else pack_dense(weight)
    return weight.double() * scale.double()[:, None], packed, scale


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype, is_sparse: bool) -> None:
    """In fp16 the tolerance is a tenth of what quantising x would add."""
    weight, packed, scale = make(shape, is_sparse)
    bias = torch.randn(shape[0]).to(dtype)
    for index, num_tokens in enumerate(NUM_TOKENS):
        x, added = torch.randn(num_tokens, shape[1]).to(dtype), bias if index % 2 else None
        out = LINEARS[is_sparse](x, packed, scale, shape[0], added)
        assert_is_product(out, x, weight, added)


@OPS
@pytest.mark.parametrize("num_processors", [1, 1000])
def test_k_split_over_programs_gives_the_same(num_processors: int, is_sparse: bool) -> None:
    weight, packed, scale = make((40, 1536), is_sparse)
    x, bias = torch.randn(5, 1536).bfloat16(), torch.randn(40).bfloat16()
    out = triton_int8.linear_int8(x, packed, scale, 40, bias, is_sparse, num_processors)
    assert_is_product(out, x, weight, bias)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_integer_comes_back_from_every_column(dtype: torch.dtype, is_sparse: bool) -> None:
    """One activation of 1 a token reads a column of the weight, exactly."""
    weight = (torch.arange(255 * 132).view(132, 255).T % 255 - 127).to(torch.int8)
    if is_sparse:
        weight *= hard_mask(torch.rand(weight.shape))
    packed = pack(*compress(weight)) if is_sparse else pack_dense(weight)
    out = LINEARS[is_sparse](torch.eye(132, dtype=dtype), packed, torch.ones(255), 255)
    assert torch.equal(out, weight.T.to(dtype))


def test_the_scale_meets_the_sum_and_not_x() -> None:
    """The sum is beyond fp16's range, its product with the scale is not."""
    packed, scale = pack_dense(torch.full((8, 1024), 127, dtype=torch.int8)), torch.full((8,), 2e-7)
    x = torch.full((2, 1024), 60000.0).half()
    for num_processors in (1, 1000):
        out = triton_int8.linear_int8(x, packed, scale, 8, None, False, num_processors)
        torch.testing.assert_close(out, torch.full((2, 8), 127 * 1024 * 6e4 * 2e-7).half())


@OPS
def test_any_leading_dimensions_and_strides(is_sparse: bool) -> None:
    weight, packed, scale = make((40, 64), is_sparse)
    linear, bias = LINEARS[is_sparse], torch.randn(80).bfloat16()[::2]
    wide, transposed = torch.randn(3, 5, 2 * 64).bfloat16(), torch.randn(64, 9).bfloat16().T
    odd = torch.randn(4, 67).bfloat16()[:, 1:65]
    for x in (wide[..., :64], wide[:, ::2, 64:], transposed, odd, torch.randn(64).bfloat16()):
        assert_is_product(linear(x, packed, scale, 40, bias), x, weight, bias)
    assert linear(torch.empty(0, 64).bfloat16(), packed, scale, 40).shape == (0, 40)


@OPS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
def test_nan_and_inf_stay_with_their_token(is_sparse: bool) -> None:
    weight, packed, scale = make((24, 260), is_sparse)
    x = torch.randn(4, 260).bfloat16()
    clean = LINEARS[is_sparse](x, packed, scale, 24)
    x[1, 130], x[2, 131] = float("nan"), float("inf")
    out = LINEARS[is_sparse](x, packed, scale, 24)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[2].isnan(), weight[:, 131] == 0)
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


def test_a_cpu_differs_by_what_it_rounds_x() -> None:
    """Activations that a CPU need not round give the same here and there."""
    weight, packed, scale = make((40, 132), True)
    x = torch.randint(-127, 128, (3, 132)).half()
    x[:, ::64] = 127.0  # the largest of each scale group: its scale is 1
    out = dispatch.linear24_int8(x, packed, scale, 40)
    torch.testing.assert_close(out, reference.linear24_int8(x, packed, scale, 40))
    x = torch.randn(3, 132).half()
    expected = x.double() @ weight.T
    of_a_cpu, of_a_gpu = (
        (linear(x, packed, scale, 40).double() - expected).norm()
        for linear in (reference.linear24_int8, dispatch.linear24_int8)
    )
    assert of_a_cpu > 10 * of_a_gpu


def test_opcheck() -> None:
    """The Python ops as torch.library sees them, under a CPU key of their own."""
    library = torch.library.Library("cast_test_int8", "FRAGMENT")
    fake = lambda x, packed, scale, out_features, bias: x.new_empty(*x.shape[:-1], out_features)  # noqa: E731
    for is_sparse, linear in LINEARS.items():
        name = linear.__name__
        library.define(
            f"{name}(Tensor x, Tensor packed, Tensor scale, int out_features, Tensor? bias) "
            "-> Tensor"
        )
        library.impl(name, linear, "CPU")
        torch.library.register_fake(f"cast_test_int8::{name}", fake, lib=library)
        _, packed, scale = make((40, 64), is_sparse)
        op = getattr(torch.ops.cast_test_int8, name)
        for bias in (None, torch.randn(40).bfloat16()):
            torch.library.opcheck(op, (torch.randn(3, 64).bfloat16(), packed, scale, 40, bias))
