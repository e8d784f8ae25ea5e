"""The int8 linears on a real GPU against fp64, in CUDA graphs, under torch.compile, in a layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cast_serve import kernels
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import hard_mask
from tests.cast_serve.kernels.test_linear24 import assert_is_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = [(1, 4), (7, 60), (33, 576), (129, 68), (16, 8192), (1049, 132), (4096, 4096)]
NUM_TOKENS = [1, 2, 7, 16, 17, 33, 64, 65, 130, 257, 1024]
DTYPES = [torch.bfloat16, torch.float16]
OPS = pytest.mark.parametrize("is_sparse", [True, False], ids=["2:4", "dense"])


def op(is_sparse: bool) -> Callable[..., Tensor]:
    kernels.load()
    return torch.ops.cast.linear24_int8 if is_sparse else torch.ops.cast.linear_int8


def make(shape: tuple[int, int], is_sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight in fp64, as it is dequantised; packed; and its scales."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(shape[0]) * 1e-2 + 1e-3
    if is_sparse:
        weight *= hard_mask(torch.rand(shape))
    packed = kernels.pack(*compress(weight)) if is_sparse else kernels.pack_dense(weight)
    return (weight.double() * scale.double()[:, None]).cuda(), packed.cuda(), scale.cuda()


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype, is_sparse: bool) -> None:
    weight, packed, scale = make(shape, is_sparse)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1], device="cuda").to(dtype)
        for added in (None, bias):
            out = op(is_sparse)(x, packed, scale, shape[0], added)
            assert_is_product(out, x, weight, added)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_integer_comes_back_from_every_column(dtype: torch.dtype, is_sparse: bool) -> None:
    """One activation of 1 a token reads a column of the weight, exactly."""
    weight = (torch.arange(255 * 132).view(132, 255).T % 255 - 127).to(torch.int8)
    if is_sparse:
        weight *= hard_mask(torch.rand(weight.shape))
    packed = kernels.pack(*compress(weight)) if is_sparse else kernels.pack_dense(weight)
    x, scale = torch.eye(132, dtype=dtype, device="cuda"), torch.ones(255, device="cuda")
    for rows in (x, x[:5]):
        out = op(is_sparse)(rows, packed.cuda(), scale, 255)
        assert torch.equal(out, weight.T[: len(rows)].to(dtype).cuda())


@OPS
def test_a_graph_replays_with_new_activations(is_sparse: bool) -> None:
    weight, packed, scale = make((4096, 4096), is_sparse)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    op(is_sparse)(x, packed, scale, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(is_sparse)(x, packed, scale, 4096)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_is_product(out, x, weight)


@OPS
def test_compiles_without_a_graph_break_and_passes_opcheck(is_sparse: bool) -> None:
    weight, packed, scale = make((40, 64), is_sparse)
    linear = op(is_sparse)
    compiled = torch.compile(lambda x: linear(x, packed, scale, 40) * 2, fullgraph=True)
    x = torch.randn(3, 64, device="cuda").bfloat16()
    assert_is_product(compiled(x) / 2, x, weight)
    torch.library.opcheck(linear, (x, packed, scale, 40, None))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what vLLM's own imports warn of
def test_a_loaded_layer_runs() -> None:
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    from cast_serve.engine.linear import SparseLinearMethod, Stored

    weight = torch.randint(-127, 128, (40, 128), dtype=torch.int8) * hard_mask(torch.rand(40, 128))
    layer, scale = nn.Module(), torch.rand(40, 1) * 1e-2 + 1e-3
    values, bitmask = compress(weight)
    loaded = {"compressed": values, "bitmask": bitmask, "shape": torch.tensor([40, 128])}
    for name, tensor in {**loaded, "weight_scale": scale}.items():
        layer.register_parameter(name, nn.Parameter(tensor.cuda(), requires_grad=False))
    layer.cast_out_features, layer.cast_in_features = 40, 128
    layer.params_dtype = torch.bfloat16
    method = SparseLinearMethod("o_proj", Stored(torch.int8))
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 128, device="cuda").bfloat16()
    assert_is_product(method.apply(layer, x), x, (weight.double() * scale.double()).cuda())
