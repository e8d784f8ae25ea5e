"""A quantised linear as compressed-tensors stores it -> kept values, bitmask and scales as ours.

Read are symmetric int8 and float8 (e4m3) weights with one scale a row or one a weight, and packed
integers of 4 or 8 bits, which may have scale groups:
    sparse-24-bitmask   ``compressed``, ``bitmask``, ``shape`` (linear.py), ``weight_scale``
    zeros stored        ``weight`` [out_features, in_features], ``weight_scale``; the mask is that
                        of the values; a group with fewer than two keeps its lowest columns too
    packed              ``weight_packed`` of pack-quantized or marlin-24 (formats/)
Integers stay as they are, -128 and -8 included, and so do their scales, each repeated for the rows
or scale groups that it stands for. float8, and integers whose scale groups no kernel has (any of 8
bits; of 4 bits, of no multiple of 32 columns) are widened: multiplied by their scales in fp32 and
rounded once to the model's dtype, they become unquantised 2:4 weights. ``input_scale`` of static
activations is left out: activations of integers are always quantised anew for each token, those of
widened weights not.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cast_serve.checkpoint.formats import marlin24, pack_quantized
from cast_serve.checkpoint.formats.integers import FOREIGN_PARTS, Integers
from cast_serve.checkpoint.linear import PARTS, CompressedLinear, check_scale
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.float8 import widen_float8
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.quantize import SCALE_GROUP, dequantize

# Tensors beside a weight that are read with it, or left out.
SCALE_PARTS = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "scale_packed",
    "meta",
    "input_scale",
    "input_zero_point",
)


def read_linear(
    name: str,
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    scale_group: int = SCALE_GROUP,
    is_widened: bool = False,
) -> CompressedLinear:
    """One linear out of its stored tensors.

    Args:
        name: the linear's.
        parts: its tensors by the last word of their names.
        dtype: the model's, which float8 is widened to.
        scale_group: the columns that are to share a scale, of another program's packed integers of
            4 bits.
        is_widened: whether another program's packed integers are widened, too.

    Raises:
        CheckpointError: if a tensor is missing or damaged, or it is quantised asymmetrically, with
            an activation order or with scale groups that are not read; naming it.
        PatternError: if it is not 2:4.
    """
    if FOREIGN_PARTS & parts.keys():
        form = pack_quantized if "weight_shape" in parts else marlin24
        integers = form.read(name, parts)
        if is_widened:
            return _widened(name, integers, dtype)
        return _taken_over(name, integers, scale_group)
    if PACKED in parts:
        return CompressedLinear.from_parts(name, parts)
    values = parts.get("compressed", parts.get("weight"))
    if values is None:
        raise CheckpointError(f"{name} has neither compressed nor weight; it is incomplete")
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):  # compressed, not quantised
        return CompressedLinear.from_parts(name, parts)
    if values.dim() != 2 or values.numel() == 0:
        raise CheckpointError(
            f"{name} is {list(values.shape)}, which is no weight [out_features, in_features]; "
            "the checkpoint is damaged"
        )
    zero_point = parts.get("weight_zero_point")
    if zero_point is not None and zero_point.float().any():
        raise CheckpointError(
            f"{name}.weight_zero_point is not 0: asymmetric weights are not read; "
            "start from the unquantised checkpoint"
        )
    scale = _scale_of_rows(name, parts.get("weight_scale"), values.shape[0])
    if values.dtype == torch.float8_e4m3fn:
        try:
            values, scale = widen_float8(values, scale, dtype, name), None
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    if "compressed" in parts:
        stored = {part: parts[part] for part in PARTS if part in parts} | {"compressed": values}
        if scale is not None:
            stored["weight_scale"] = scale
        return CompressedLinear.from_parts(name, stored)
    return replace(CompressedLinear.from_weight(name, values), scale=scale)


def _scale_of_rows(name: str, scale: Tensor | None, out_features: int) -> Tensor:
    """A scale [out_features, 1] of what is stored for each row or for the whole weight."""
    if scale is not None:
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).repeat(out_features, 1)
        elif scale.dim() == 1 and scale.numel() == out_features:
            scale = scale.unsqueeze(1)
        elif scale.dim() > 1 and scale.shape[1] != 1:
            raise CheckpointError(
                f"{name}.weight_scale is {list(scale.shape)}: scale groups or blocks are not read, "
                "only one scale a row or a weight; start from the unquantised checkpoint"
            )
    return check_scale(name, scale, out_features)


def _taken_over(name: str, integers: Integers, scale_group: int) -> CompressedLinear:
    """Another program's integers, as they are."""
    values, bitmask, scale, num_bits = integers
    in_features = values.shape[1] * 2
    num_scales = scale.shape[1]
    if num_bits == 8 and num_scales == 1:
        return CompressedLinear(name, values, bitmask, in_features, scale)
    num_groups = -(-in_features // scale_group)
    if num_scales == 1:
        scale = scale.repeat(1, num_groups)
    elif num_bits == 8 or in_features // num_scales % scale_group:
        raise CheckpointError(
            f"{name} has {num_bits} bits and a scale for each {in_features // num_scales} columns, "
            "but config.json says another strategy or group_size: copy the directory again"
        )
    else:
        scale = scale.repeat_interleave(num_groups // num_scales, dim=1)
    return CompressedLinear(name, values, bitmask, in_features, scale, scale_group)


def _widened(name: str, integers: Integers, dtype: torch.dtype) -> CompressedLinear:
    """Another program's integers times their scales."""
    values, bitmask, scale, _ = integers
    groups = values.unflatten(1, (scale.shape[1], -1))
    wide = dequantize(groups, scale.unsqueeze(-1), dtype).flatten(1)
    is_bad = ~torch.isfinite(wide).all(1)
    if is_bad.any():
        raise CheckpointError(
            f"{name}: row {int(is_bad.nonzero()[0])} of its integers times their scales holds more "
            f"than {torch.finfo(dtype).max:.4g}, the most of {dtype}; {int(is_bad.sum())} rows are "
            "wrong: copy the directory again, or use bf16"
        )
    return CompressedLinear(name, wide, bitmask, values.shape[1] * 2)
