"""Sparse kernels: a packed weight and activations -> the linear's output, on the device of x.

`pack_sparse` turns a compressed weight (values, bitmask) of any kind into the kernels' layout once,
at load, and `multiply` multiplies it. They choose among `linear24`, `linear24_int8` and
`linear24_int4` for 2:4 weights, and `linear64` for weights that keep n of 64 columns, which CPUs
alone have. An output head is dense: `pack_dense`, or in 4 bits `pack_dense_int4`, packs it, and
`multiply_dense` chooses between `linear_int8` and `linear64` with all 64 columns kept. `isa` says
which CPU kernel runs (``CAST_CPU_ISA`` forces one). gpu/dispatch.py is the GPU's side.
"""

import torch
from torch import Tensor

from cast_serve.kernels.ops import load
from cast_serve.kernels.reference import (
    pack,
    pack_dense,
    packed_dense_shape,
    packed_shape,
    unpack,
)
from cast_serve.kernels.reference64 import pack64, pack_dense_int4, packed_shape64
from cast_serve.kernels.reference_int4 import int4_packed_shape, pack_int4, unpack_int4

__all__ = [
    "int4_packed_shape",
    "isa",
    "linear24",
    "linear24_int4",
    "linear24_int8",
    "linear_int8",
    "load",
    "multiply",
    "multiply_dense",
    "pack",
    "pack_dense",
    "pack_dense_int4",
    "pack_int4",
    "pack_sparse",
    "packed_dense_shape",
    "packed_shape",
    "packed_shape64",
    "supported_isas",
    "unpack",
    "unpack_int4",
]


def pack_sparse(
    values: Tensor,
    bitmask: Tensor,
    scale: Tensor | None = None,
    scale_group: int | None = None,
    kept: int | None = None,
) -> Tensor:
    """A compressed weight of any kind -> what `multiply` multiplies.

    Args:
        values: kept weights, [out_features, in_features / 2] or [.., in_features * kept / 64],
            bf16, fp16, fp32 or int8.
        bitmask: uint8 [out_features, ceil(in_features / 8)].
        scale: of 4 bits, [out_features, num_groups]; packed too.
        scale_group: of 4 bits, the columns that share a scale; else None.
        kept: of 64 columns; None: the weight is 2:4.

    Raises:
        PatternError, ValueError: as `pack`, `pack_int4` and `pack64` do.
    """
    if kept is not None:
        return pack64(values, bitmask, scale if scale_group else None, scale_group)
    if scale_group is None or scale is None:
        return pack(values, bitmask)
    return pack_int4(values, bitmask, scale, scale_group)


def multiply(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    scale_group: int | None = None,
    kept: int | None = None,
) -> Tensor:
    """x @ weight.T + bias for what `pack_sparse` made; the kernels are loaded already.

    Args:
        scale: fp32 [out_features] of int8 values; else None.
        scale_group: of 4 bits, as `pack_sparse` had it; else None.
        kept: as `pack_sparse` had it.
    """
    if kept is not None:
        return torch.ops.cast.linear64(x, packed, kept, out_features, bias, scale, scale_group or 0)
    if scale_group is not None:
        return torch.ops.cast.linear24_int4(x, packed, scale_group, out_features, bias)
    if scale is not None:
        return torch.ops.cast.linear24_int8(x, packed, scale, out_features, bias)
    return torch.ops.cast.linear24(x, packed, out_features, bias)


def multiply_dense(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    scale_group: int | None = None,
) -> Tensor:
    """x @ weight.T + bias for a dense weight of integers; the kernels are loaded already.

    Args:
        packed: of `pack_dense`, or of 4 bits `pack_dense_int4`.
        scale: fp32 [out_features] of int8 values; else None.
        scale_group: of 4 bits, as `pack_dense_int4` had it; else None.
    """
    if scale_group is None:
        return torch.ops.cast.linear_int8(x, packed, scale, out_features, bias)
    return multiply(x, packed, out_features, bias, scale_group=scale_group, kept=64)


def linear24(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for a packed 2:4 weight; see reference.linear24 for the contract.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for an unknown dtype.
    """
    load()
    return torch.ops.cast.linear24(x, packed, out_features, bias)


def linear24_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for a packed int8 weight; see reference.linear24_int8.

    On a GPU x is not quantised on the way; it is bf16 or fp16 there.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for an unknown dtype.
    """
    load()
    return torch.ops.cast.linear24_int8(x, packed, scale, out_features, bias)


def linear24_int4(
    x: Tensor, packed: Tensor, group: int, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for a packed 4-bit weight; see reference_int4.linear24_int4.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for an unknown dtype.
    """
    load()
    return torch.ops.cast.linear24_int4(x, packed, group, out_features, bias)


def linear_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for a packed dense int8 weight; see reference.linear_int8.

    On a GPU x is not quantised on the way; it is bf16 or fp16 there.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for an unknown dtype.
    """
    load()
    return torch.ops.cast.linear_int8(x, packed, scale, out_features, bias)


def isa() -> str:
    """The CPU kernel in use: amx, avx512_bf16, avx512_vnni, avx512, avx2 or portable.

    Raises:
        RuntimeError: if ``CAST_CPU_ISA`` names a kernel that this CPU does not have.
    """
    return supported_isas()[0]


def supported_isas() -> list[str]:
    """The CPU kernel in use first, then the others that this CPU could run."""
    load()
    return list(torch.ops.cast.cpu_isas())
