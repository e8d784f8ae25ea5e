"""The 2:4 linear on a real GPU against fp64, in CUDA graphs and under torch.compile."""

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import gpu as kernels_gpu
from cast_serve import kernels
from tests.cast_serve.kernels import test_linear24
from tests.cast_serve.kernels.test_linear24 import assert_is_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = [(1, 4), (7, 60), (33, 576), (129, 68), (16, 8192), (1049, 132), (4096, 4096)]
NUM_TOKENS = [1, 2, 7, 16, 17, 33, 64, 65, 130, 257, 1024]
DTYPES = [torch.bfloat16, torch.float16]


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, packed = test_linear24.make(shape, dtype)
    return weight.cuda(), packed.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, packed = make(shape, dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1], device="cuda").to(dtype)
        assert_is_product(kernels.linear24(x, packed, shape[0], bias), x, weight, bias)
        assert_is_product(kernels.linear24(x, packed, shape[0]), x, weight)


@pytest.mark.parametrize("form", ["cusparselt", "cutlass", "dense"])
def test_the_products_that_are_timed_beside_it(form: str) -> None:
    if form != "dense" and not kernels_gpu.has_form(form):
        pytest.skip(f"this torch build or GPU does not support {form}")
    weight, _ = make((256, 512), torch.bfloat16)
    second = kernels_gpu.to_form(weight, form)
    bias = torch.randn(256, device="cuda").bfloat16()
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, 512, device="cuda").bfloat16()
        for given in (None, bias):
            assert_is_product(kernels_gpu.product(x, second, form, given), x, weight, given)


def test_a_graph_replays_with_new_activations() -> None:
    weight, packed = make((4096, 4096), torch.bfloat16)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    kernels.linear24(x, packed, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.linear24(x, packed, 4096)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_is_product(out, x, weight)


def test_compiles_without_a_graph_break_and_passes_opcheck() -> None:
    weight, packed = make((40, 64), torch.bfloat16)
    compiled = torch.compile(lambda x: torch.ops.cast.linear24(x, packed, 40) * 2, fullgraph=True)
    x = torch.randn(3, 64, device="cuda").bfloat16()
    assert_is_product(compiled(x) / 2, x, weight)
    torch.library.opcheck(torch.ops.cast.linear24, (x, packed, 40, None))
