"""The ops on a GPU: the Triton kernels, for any number of tokens."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cast_serve.errors import FailedError
from cast_serve.kernels.reference import packed_dense_shape, packed_shape
from cast_serve.kernels.reference_int4 import int4_packed_shape

INTERPRETED_PROCESSORS = 4
PACKED_ALIGNMENT = 16  # bytes: what the kernels read at once

_registered: list[torch.library.Library] = []  # kept, since a collected library is unregistered


def register() -> None:
    """Gives the ops their CUDA kernels, once."""
    if _registered:
        return
    library = torch.library.Library("cast", "FRAGMENT")
    _registered.append(library)
    library.impl("linear24", linear24, "CUDA")
    library.impl("linear24_int8", linear24_int8, "CUDA")
    library.impl("linear24_int4", linear24_int4, "CUDA")
    library.impl("linear_int8", linear_int8, "CUDA")


def linear24(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """reference.linear24 for x on a GPU, bf16 or fp16; also on a CPU in Triton's interpreter.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for another dtype.
        FailedError: if the GPU's compute capability is below 8.0.
    """
    from cast_serve.kernels.gpu import triton24  # here: the CPU extra need not have Triton

    rows = _checked_rows("linear24", x, packed, out_features, bias, _packed_shape(x.dtype))
    with torch.cuda.device_of(rows):
        out = triton24.linear24(rows, packed, out_features, bias, _num_processors(rows))
    return out.view(*x.shape[:-1], out_features)


def linear24_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for x on a GPU, bf16 or fp16; also in Triton's interpreter.

    Other than reference.linear24_int8 it does not quantise x.

    Args:
        x: [..., in_features].
        packed: uint8 [tile_rows, tile_columns, 640], see reference.pack.
        scale: fp32 [out_features].
        out_features: rows of the weight.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear24`.
    """
    return _linear_int8(x, packed, scale, out_features, bias, is_sparse=True)


def linear24_int4(
    x: Tensor, packed: Tensor, group: int, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As `linear24_int8` for a 4-bit weight; packed, group: see reference_int4.linear24_int4."""
    from cast_serve.kernels.gpu import triton_int4

    shape_of = functools.partial(int4_packed_shape, group=group)
    rows = _checked_rows("linear24_int4", x, packed, out_features, bias, shape_of)
    processors = _num_processors(rows)
    with torch.cuda.device_of(rows):
        out = triton_int4.linear24_int4(rows, packed, group, out_features, bias, processors)
    return out.view(*x.shape[:-1], out_features)


def linear_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As `linear24_int8`, with a dense weight; packed: see reference.pack_dense."""
    return _linear_int8(x, packed, scale, out_features, bias, is_sparse=False)


@functools.cache
def properties(index: int | None) -> Any:
    """A GPU's properties.

    Raises:
        FailedError: if its compute capability is below 8.0.
    """
    card = torch.cuda.get_device_properties(index)
    if card.major < 8:
        raise FailedError(
            f"{card.name} has compute capability {card.major}.{card.minor}; the 2:4 kernels need "
            "8.0 or later (A100 and later cards)"
        )
    return card


def _linear_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    is_sparse: bool,
) -> Tensor:
    from cast_serve.kernels.gpu import triton_int8

    op = "linear24_int8" if is_sparse else "linear_int8"
    shape_of = _packed_shape(torch.int8) if is_sparse else packed_dense_shape
    rows = _checked_rows(op, x, packed, out_features, bias, shape_of)
    is_float = scale.dtype == torch.float32 and scale.is_contiguous()
    if not is_float or scale.shape != (out_features,) or scale.device != x.device:
        raise ValueError(
            f"{op}: scale is {scale.dtype} {list(scale.shape)} on {scale.device}; a contiguous "
            f"float32 [{out_features}] on {x.device} is needed"
        )
    processors = _num_processors(rows)
    with torch.cuda.device_of(rows):
        out = triton_int8.linear_int8(
            rows, packed, scale, out_features, bias, is_sparse, processors
        )
    return out.view(*x.shape[:-1], out_features)


def _packed_shape(dtype: torch.dtype) -> Callable[[int, int], tuple[int, int, int]]:
    return functools.partial(packed_shape, dtype=dtype)


def _num_processors(x: Tensor) -> int:
    if not x.is_cuda:
        return INTERPRETED_PROCESSORS
    return int(properties(x.device.index).multi_processor_count)


def _checked_rows(
    op: str,
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    shape_of: Callable[[int, int], tuple[int, int, int]],
) -> Tensor:
    """x as [num_tokens, in_features], after the same checks as in csrc/ops.cpp."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op}: x is {x.dtype}; bfloat16 or float16 is needed on a GPU (--dtype bfloat16)"
        )
    if not x.dim():
        raise ValueError(f"{op}: x has no dimension; [..., in_features] is needed")
    in_features = x.shape[-1]
    if in_features == 0 or in_features % 4:
        raise ValueError(f"{op}: in_features {in_features} is not a positive multiple of 4")
    shape = shape_of(out_features, in_features)
    if packed.dtype != torch.uint8 or packed.shape != shape or not packed.is_contiguous():
        raise ValueError(
            f"{op}: packed is {packed.dtype} {list(packed.shape)}, but x {list(x.shape)} of "
            f"{x.dtype} and out_features {out_features} need a contiguous uint8 {list(shape)}"
        )
    if packed.data_ptr() % PACKED_ALIGNMENT:
        raise ValueError(
            f"{op}: packed does not begin at a {PACKED_ALIGNMENT}-byte boundary; "
            "pass packed.clone()"
        )
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and {name} on {tensor.device}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}; [{out_features}] is needed")
    return x.reshape(-1, in_features)
