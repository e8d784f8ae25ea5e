"""A directory of int-quantized or float-quantized with its zeros -> kept values and scales.

A linear has ``weight`` [out_features, in_features], int8 or float8 (e4m3), and ``weight_scale``,
one a row or one in all. The mask is that of the values; a group with fewer than two keeps its
lowest columns too. Integers stay as they are, -128 included, and so do their scales, each repeated
for the rows that it stands for. float8 is widened: multiplied by its scales in fp32 and rounded
once to the model's dtype, it becomes an unquantised weight. ``input_scale`` of static
activations is left out: activations of integers are quantised for each token, those of widened
weights not at all.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.linear import CompressedLinear, check_scale
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.checkpoint.stored import EIGHT_BITS, StoredModel
from cast_serve.sparsity.float8 import widen_float8
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern

DTYPES = (torch.int8, torch.float8_e4m3fn)


class EightBits(Form):
    """Weights in 8 bits, with their zeros."""

    kind = "quantised"
    is_foreign = True

    def __init__(self, source: StoredModel) -> None:
        super().__init__(source, self.find(source))
        self.quantized = EIGHT_BITS[source.weight_dtypes[self.linears[0]]]
        self.is_widened = self.quantized == "float8"

    @staticmethod
    def find(source: StoredModel) -> list[str]:
        """The linears of a directory that are stored so."""
        return [
            name
            for name, dtype in source.weight_dtypes.items()
            if dtype in EIGHT_BITS and f"{name}.compressed" not in source.files
        ]

    def read(self, name: str) -> CompressedLinear:
        pattern = self.source.pattern_of(name)
        return read(name, self.source.parts(name), self.source.model_dtype, pattern)


def read(
    name: str, parts: Mapping[str, Tensor], dtype: torch.dtype, pattern: Pattern = TWO_FOUR
) -> CompressedLinear:
    """One linear out of its stored tensors.

    Args:
        name: the linear's.
        parts: its tensors by the last word of their names.
        dtype: the model's, which float8 is widened to.
        pattern: the linear's.

    Raises:
        CheckpointError: if a tensor is missing or damaged, or it is quantised asymmetrically or
            with scale groups that are not read; naming it.
        PatternError: if it has another pattern.
    """
    if "weight" not in parts or parts["weight"].dtype not in DTYPES:
        found = parts["weight"].dtype if "weight" in parts else "missing"
        raise CheckpointError(
            f"{name}.weight is {found}, but the directory is quantised in 8 bits; "
            "the checkpoint is incomplete: copy the directory again"
        )
    values, scale = rows(name, parts["weight"], parts, dtype)
    return replace(CompressedLinear.from_weight(name, values, pattern), scale=scale)


def rows(
    name: str, values: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """int8 values and a scale [out_features, 1] for each row; float8 widened, without a scale.

    Raises:
        CheckpointError: as `read` does.
    """
    if values.dim() != 2 or values.numel() == 0:
        raise CheckpointError(
            f"{name} is {list(values.shape)}, which is not a weight [out_features, in_features]; "
            "the checkpoint is damaged"
        )
    zero_point = parts.get("weight_zero_point")
    if zero_point is not None and zero_point.float().any():
        raise CheckpointError(
            f"{name}.weight_zero_point is not 0: asymmetric weights are not read; "
            "start from the unquantised checkpoint"
        )
    scale = _scale_of_rows(name, parts.get("weight_scale"), values.shape[0])
    if values.dtype != torch.float8_e4m3fn:
        return values, scale
    try:
        return widen_float8(values, scale, dtype, name), None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


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
