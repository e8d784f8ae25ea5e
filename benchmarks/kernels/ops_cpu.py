"""A layer's shape -> the CPU ops that are timed, each with copies of one random weight; checked.

The dense ops hold the sparse weight with zeros in it, so all must agree with its product in fp32;
the int8 ops beside a 4-bit weight hold what is left of it in 8 bits and one scale a row. They
are what vLLM takes: oneDNN's ops; on CPUs with AMX SGLang's for int8 weights (W8A8) and for small
bf16 ones; on AMD where zentorch is installed, zentorch's. All int8 ops quantise the activations in
the timed call, of each token anew.
"""

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.shapes import random_weight, scale_group_of
from cast_serve import kernels
from cast_serve.sparsity.bitmask import unpack_bits
from cast_serve.sparsity.quantize import quantize_rows

MAX_ERROR = 0.02  # relative, of an op's output; quantised activations have 0.008 to 0.01

Linear = Callable[[Tensor], Tensor]


def layers_of(
    in_features: int, out_features: int, weights: str, cache_bytes: int, kept: int | None = None
) -> dict[str, list[Linear]]:
    """Makes the layers of each op.

    Args:
        in_features: of the weight.
        out_features: of the weight.
        weights: of shapes.WEIGHTS.
        cache_bytes: the layers of an op together are larger than this.
        kept: of 64 columns; None: 2:4.

    Returns:
        sparse, vllm_dense, plain_dense; where it is installed, zentorch; for int8 and int4 also
        vllm_int8 and zentorch_int8; with `kept` also sparse24, a 2:4 weight of its own -> the op's
        layers, at least two.

    Raises:
        RuntimeError: if an op's output is wrong.
    """
    import vllm.platforms  # noqa: F401, loads vLLM's CPU extension
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    kernels.load()
    has_zentorch = importlib.util.find_spec("zentorch") is not None
    if has_zentorch:
        import zentorch  # noqa: F401, registers its ops
    exact, packed, sparse = _sparse(in_features, out_features, weights, kept)
    if weights != "bf16":
        integers, row_scale = quantize_rows(exact)
        scale = row_scale.squeeze(1)
    dense = exact.bfloat16()

    def vllm_dense() -> Linear:
        if check_cpu_sgl_kernel(out_features, in_features, torch.bfloat16):
            tiles = torch.ops._C.convert_weight_packed(dense.clone())
            return lambda x: vllm_ops.weight_packed_linear_cpu(x, tiles, out_features, None)
        handler = vllm_ops.create_onednn_mm(dense.clone().t(), 32)
        return lambda x: vllm_ops.onednn_mm(handler, x, None)

    def plain_dense() -> Linear:
        copy = dense.clone()
        return lambda x: torch.nn.functional.linear(x, copy)

    def zentorch_dense() -> Linear:
        prepacked = torch.ops.zentorch.zentorch_weight_prepack_for_linear(dense.clone())
        multiply = torch.ops.zentorch.zentorch_linear_unary
        return lambda x: multiply(x, prepacked, None, is_weight_prepacked=True)

    def vllm_int8() -> Linear:
        # As CPUInt8ScaledMMLinearKernel of vLLM does, without the lookups of its layer class.
        if check_cpu_sgl_kernel(out_features, in_features, torch.int8):
            tiles, tile_scale = torch.ops._C.convert_weight_packed(integers.clone()), scale.clone()
            multiply = torch.ops._C.int8_scaled_mm_with_quant
            return lambda x: multiply(x, tiles, tile_scale, None, x.dtype, True)
        column = scale.unsqueeze(1)
        sums = (integers * column).sum(1).unsqueeze(0)
        handler = vllm_ops.create_onednn_scaled_mm(
            integers.clone().t(), column, torch.bfloat16, True, False, 32
        )

        # The handler reads the scales where they lie and does not keep them.
        def linear(x: Tensor, _scales: Tensor = column) -> Tensor:
            quantised, x_scale, zero_point = vllm_ops.onednn_scaled_int8_quant(x)
            out = torch.empty(len(x), out_features, dtype=x.dtype)
            return vllm_ops.onednn_scaled_mm(
                handler, quantised, out, x_scale, zero_point, sums, None
            )

        return linear

    def zentorch_int8() -> Linear:
        copy, bf16_scale = integers.clone(), scale.bfloat16()
        multiply = torch.ops.zentorch.zentorch_dynamic_qlinear
        return lambda x: multiply(x, copy, bf16_scale, None)

    made = {
        "sparse": (sparse, packed),
        "vllm_dense": (vllm_dense, dense),
        "plain_dense": (plain_dense, dense),
    }
    if has_zentorch:
        made["zentorch"] = (zentorch_dense, dense)
    if weights != "bf16":
        made["vllm_int8"] = (vllm_int8, integers)
        if has_zentorch:
            made["zentorch_int8"] = (zentorch_int8, integers)
    if kept is not None:
        exact24, packed24, sparse24 = _sparse(in_features, out_features, weights, None)
        made["sparse24"] = (sparse24, packed24)
    layers = {
        name: [make() for _ in range(max(2, math.ceil(cache_bytes / weight.nbytes)))]
        for name, (make, weight) in made.items()
    }
    if kept is not None:
        check({"sparse24": layers["sparse24"]}, exact24)
    check({name: of_op for name, of_op in layers.items() if name != "sparse24"}, exact)
    return layers


def _sparse(
    in_features: int, out_features: int, weights: str, kept: int | None
) -> tuple[Tensor, Tensor, Callable[[], Linear]]:
    """A random weight: fp32 with its zeros, packed, and what makes a layer with a copy of it."""
    values, bitmask, scale = random_weight(in_features, out_features, weights, kept)
    group = scale_group_of(weights) or None
    row_scale = None if group else scale
    exact = values.new_zeros(out_features, in_features, dtype=torch.float32)
    exact[unpack_bits(bitmask, in_features)] = values.float().flatten()
    if group and scale is not None:
        exact *= scale.float().repeat_interleave(group, dim=1)[:, :in_features]
    elif scale is not None:
        exact *= scale.unsqueeze(1)
    packed = kernels.pack_sparse(values, bitmask, scale, group, kept)

    def make() -> Linear:
        copy = packed.clone()
        return lambda x: kernels.multiply(
            x, copy, out_features, scale=row_scale, scale_group=group, kept=kept
        )

    return exact, packed, make


def check(layers: dict[str, list[Linear]], exact: Tensor) -> None:
    """Compares each op's first layer with the product in fp32, for few and for many tokens.

    Args:
        layers: op -> its layers.
        exact: the weight that they hold, fp32 [out_features, in_features].

    Raises:
        RuntimeError: naming the op whose relative error is above MAX_ERROR.
    """
    for num_tokens in (1, 20):
        x = torch.randn(num_tokens, exact.shape[1]).bfloat16()
        expected = x.float() @ exact.T
        for name, (layer, *_) in layers.items():
            error = float((layer(x).float() - expected).norm() / expected.norm())
            if not error <= MAX_ERROR:
                raise RuntimeError(
                    f"{name} is wrong at {list(exact.shape)} and {num_tokens} token(s): its error "
                    f"is {error:.3f} of the output, where {MAX_ERROR} is allowed; run its tests"
                )
