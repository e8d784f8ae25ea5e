"""A linear of ``pack-quantized`` with its zeros stored -> its kept values, bitmask and scales.

For a weight [N, K] of b bits, 4 or 8 (integers.py says how they are packed):
    weight_packed  int32 [N, ceil(K * b / 32)]
    weight_scale   [N, number of scale groups], or one number
    weight_shape   N, K
The mask is that of the integers; a group with fewer than two keeps its lowest columns too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cast_serve.checkpoint.declared import PACK_QUANTIZED
from cast_serve.checkpoint.formats.integers import (
    REMEDY,
    SCALE_DTYPES,
    Integers,
    check_scales,
    unpack,
)
from cast_serve.checkpoint.formats.packed import Packed
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress

PARTS = ("weight_packed", "weight_scale", "weight_shape")


def read(name: str, parts: Mapping[str, Tensor]) -> Integers:
    """One linear out of its stored tensors.

    Args:
        name: the linear's.
        parts: its tensors by the last word of their names.

    Raises:
        CheckpointError: if one is missing, or of another dtype or shape than it must be, a scale
            is not finite and positive, or it has zero points or an activation order; naming it.
        PatternError: if it is not 2:4.
    """
    if missing := [part for part in PARTS if part not in parts]:
        raise CheckpointError(
            f"{name} lacks {', '.join(missing)} of pack-quantized; the checkpoint is incomplete: "
            "copy the directory again"
        )
    packed, scale, shape = (parts[part] for part in PARTS)
    if shape.shape != (2,) or shape.min() < 1:
        raise CheckpointError(
            f"{name}.weight_shape is {shape.tolist()}, but two sizes above 0 are needed: "
            "copy the directory again"
        )
    num_rows, num_columns = shape.tolist()
    needed = {bits: [num_rows, -(-num_columns * bits // 32)] for bits in (4, 8)}
    fitting = [bits for bits in needed if list(packed.shape) == needed[bits]]
    if len(fitting) != 1 or packed.dtype != torch.int32:
        raise CheckpointError(
            f"{name}.weight_packed is {packed.dtype} {list(packed.shape)}, but with weight_shape "
            f"{[num_rows, num_columns]} torch.int32 {needed[4]} in 4 bits or {needed[8]} in 8 is "
            "needed: copy the directory again"
        )
    scale = _scale(name, scale, num_rows, num_columns)
    _refuse_others(name, parts, torch.arange(num_columns) // (num_columns // scale.shape[1]))
    integers = unpack(packed, fitting[0])[:, :num_columns]
    return Integers(*compress(integers, name), scale, fitting[0])


def _scale(name: str, scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """[num_rows, number of scale groups]; one for the whole weight is repeated."""
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).repeat(num_rows, 1)
    num_groups = scale.shape[1] if scale.dim() == 2 and scale.shape[0] == num_rows else 0
    if num_groups == 0 or num_columns % (4 * num_groups) or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{name}.weight_scale is {scale.dtype} {list(scale.shape)}, but bf16, fp16 or fp32 "
            f"[{num_rows}, scale groups of a multiple of 4 columns that divides {num_columns}] is "
            f"needed: copy the directory again, or {REMEDY}"
        )
    check_scales(f"{name}.weight_scale", scale)
    return scale


def _refuse_others(name: str, parts: Mapping[str, Tensor], in_order: Tensor) -> None:
    """Refuses zero points, and scale groups of columns that are not those in order."""
    zero_point, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    if zero_point is not None and zero_point.any():
        raise CheckpointError(
            f"{name}.weight_zero_point is not 0: asymmetric weights are not read; {REMEDY}"
        )
    if order is None or (order == -1).any():  # -1: there is none
        return
    if not torch.equal(order.long(), in_order):
        raise CheckpointError(
            f"{name}.weight_g_idx: the columns are not in order of their scale groups; activation "
            f"order is not read; {REMEDY}"
        )


class PackQuantized(Packed):
    """Words of integers with their zeros."""

    declared_format = PACK_QUANTIZED
    read_integers = staticmethod(read)
