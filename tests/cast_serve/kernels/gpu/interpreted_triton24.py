"""The Triton kernel against its specification, in Triton's interpreter: run by test_triton24.py.

Triton decides when it is imported whether it interprets, so this needs a process of its own, with
TRITON_INTERPRET=1.
"""

import functools
import os

import pytest
import torch

from cast_serve.kernels.gpu import dispatch, triton24
from tests.cast_serve.kernels import test_linear24
from tests.cast_serve.kernels.test_linear24 import SHAPES, make

assert os.environ.get("TRITON_INTERPRET") == "1"
NUM_TOKENS = [1, 17, 33, 130]
# As in test_linear24.py; but the interpreter cuts fp32 to bf16 where a GPU rounds: twice the error.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 6e-4}


assert_is_product = functools.partial(test_linear24.assert_is_product, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, packed = make(shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        assert_is_product(dispatch.linear24(x, packed, shape[0], bias), x, weight, bias)
    assert_is_product(dispatch.linear24(x, packed, shape[0]), x, weight)


@pytest.mark.parametrize("num_processors", [1, 1000])
def test_k_split_over_programs_gives_the_same(num_processors: int) -> None:
    weight, packed = make((40, 1536), torch.bfloat16)
    x, bias = torch.randn(5, 1536).bfloat16(), torch.randn(40).bfloat16()
    out = triton24.linear24(x, packed, 40, bias, num_processors)
    assert_is_product(out, x, weight, bias)


def test_any_leading_dimensions_and_strides() -> None:
    weight, packed = make((40, 64), torch.bfloat16)
    wide = torch.randn(3, 5, 2 * 64).bfloat16()
    transposed = torch.randn(64, 9).bfloat16().T
    odd = torch.randn(4, 67).bfloat16()[:, 1:65]
    for x in (wide[..., :64], wide[:, ::2, 64:], transposed, odd, torch.randn(64).bfloat16()):
        assert_is_product(dispatch.linear24(x, packed, 40), x, weight)
    assert dispatch.linear24(torch.empty(0, 64).bfloat16(), packed, 40).shape == (0, 40)


def test_opcheck() -> None:
    """The Python op as torch.library sees it, under a CPU key of its own."""
    library = torch.library.Library("cast_test", "FRAGMENT")
    library.define("linear24(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor")
    library.impl("linear24", dispatch.linear24, "CPU")
    fake = lambda x, packed, out_features, bias: x.new_empty(*x.shape[:-1], out_features)  # noqa: E731
    torch.library.register_fake("cast_test::linear24", fake, lib=library)
    _, packed = make((40, 64), torch.bfloat16)
    for bias in (None, torch.randn(40).bfloat16()):
        arguments = (torch.randn(3, 64).bfloat16(), packed, 40, bias)
        torch.library.opcheck(torch.ops.cast_test.linear24, arguments)
