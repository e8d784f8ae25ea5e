"""An 8-bit linear as compressed-tensors stores it -> kept values, bitmask and scales as ours.

Read are symmetric int8 and float8 (e4m3) weights with one scale a row or one a weight:
    sparse-24-bitmask   ``compressed``, ``bitmask``, ``shape`` (linear.py), ``weight_scale``
    zeros stored        ``weight`` [out_features, in_features], ``weight_scale``; the mask is that
                        of the values; a group with fewer than two keeps its lowest columns too
int8 stays as it is bit for bit, -128 included, and so do its scales; one of the whole weight is
repeated for each row. float8 is widened, multiplied by its scale in fp32 and rounded once to the
model's dtype: it becomes an unquantised 2:4 weight. ``input_scale`` of static activations is left
out: activations of int8 weights are always quantised anew for each token, those of float8 not.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cast_serve.checkpoint.linear import PARTS, CompressedLinear, check_scale
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.float8 import widen_float8
from cast_serve.sparsity.nibbles import PACKED

# Tensors beside a weight that are read with it, or left out.
SCALE_PARTS = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "input_scale",
    "input_zero_point",
)


def read_linear(name: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> CompressedLinear:
    """One linear out of its stored tensors.

    Args:
        name: the linear's.
        parts: its tensors by the last word of their names.
        dtype: the model's, which float8 is widened to.

    Raises:
        CheckpointError: if a tensor is missing or damaged, or it is quantised asymmetrically or
            with scale groups; naming it.
        PatternError: if it is not 2:4.
    """
    if PACKED in parts:
        return CompressedLinear.from_parts(name, parts)
    values = parts.get("compressed", parts.get("weight"))
    if values is None:
        raise CheckpointError(f"{name} has neither compressed nor weight; it is incomplete")
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):  # compressed, not quantised
        return CompressedLinear.from_parts(name, parts)
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
