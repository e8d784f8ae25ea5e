"""The 4-bit linear on a real GPU against fp64, in CUDA graphs and under torch.compile."""

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from tests.cast_serve.kernels.test_linear24 import assert_is_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = [(1, 4), (7, 60), (33, 576), (129, 68), (16, 8192), (1049, 132), (4096, 4096)]
NUM_TOKENS = [1, 2, 7, 16, 17, 33, 64, 65, 130, 257, 1024]
GROUPS = pytest.mark.parametrize("group", [128, 64, 32])


def make(shape: tuple[int, int], group: int) -> tuple[Tensor, Tensor]:
    """A random weight in fp64, as it is dequantised; and packed."""
    weight = torch.randint(-8, 8, shape, dtype=torch.int8) * hard_mask(torch.rand(shape))
    scale = (torch.rand(shape[0], -(-shape[1] // group)) * 1e-1 + 1e-2).bfloat16()
    columns = scale.double().repeat_interleave(group, dim=1)[:, : shape[1]]
    packed = kernels.pack_int4(*compress(weight), scale, group)
    return (weight * columns).cuda(), packed.cuda()


@GROUPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype, group: int) -> None:
    weight, packed = make(shape, group)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1], device="cuda").to(dtype)
        for added in (None, bias):
            out = kernels.linear24_int4(x, packed, group, shape[0], added)
            assert_is_product(out, x, weight, added)


@GROUPS
def test_a_graph_replays_with_new_activations(group: int) -> None:
    weight, packed = make((4096, 4096), group)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    kernels.linear24_int4(x, packed, group, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.linear24_int4(x, packed, group, 4096)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_is_product(out, x, weight)


@GROUPS
def test_compiles_without_a_graph_break_and_passes_opcheck(group: int) -> None:
    weight, packed = make((40, 64), group)
    x, op = torch.randn(3, 64, device="cuda").bfloat16(), torch.ops.cast.linear24_int4
    compiled = torch.compile(lambda x: op(x, packed, group, 40) * 2, fullgraph=True)
    assert_is_product(compiled(x) / 2, x, weight)
    torch.library.opcheck(op, (x, packed, group, 40, None))
