"""2:4 kernels: a packed weight and activations -> the linear's output, on the device of x.

`pack` turns a compressed weight (values, bitmask) into the kernels' layout once, at load;
`linear24` and `linear24_int8` multiply, `pack_int4` and `linear24_int4` those of 4 bits; `isa` says
which CPU kernel runs (``CAST_CPU_ISA`` forces one).
gpu/dispatch.py is the GPU's side.
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
from cast_serve.kernels.reference_int4 import int4_packed_shape, pack_int4, unpack_int4

__all__ = [
    "int4_packed_shape",
    "isa",
    "linear24",
    "linear24_int4",
    "linear24_int8",
    "linear_int8",
    "load",
    "pack",
    "pack_dense",
    "pack_int4",
    "packed_dense_shape",
    "packed_shape",
    "supported_isas",
    "unpack",
    "unpack_int4",
]


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
