"""A directory of another program's packed integers -> kept values and scales, as ours.

pack_quantized.py and marlin24.py read one linear each; here is what both have in common. Integers
stay as they are, -8 and -128 included, and so do their scales, each repeated for the scale groups
that it stands for. Where no kernel has their scale groups (any of 8 bits; of 4 bits, those that are
not a multiple of 32 columns) they are widened: multiplied by their scales in fp32 and rounded once
to the model's dtype, they become unquantised 2:4 weights.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cast_serve.checkpoint.declared import PACKED_FORMATS, weights_of
from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.formats.integers import Integers
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.checkpoint.stored import StoredModel
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, SCALE_GROUP, dequantize

# Of a linear whose packed weights are another program's.
FOREIGN_PARTS = {"weight_shape", "meta", "scale_packed"}


class Packed(Form):
    """Integers of 4 or 8 bits in words of 32.

    Raises:
        CheckpointError: if config.json does not say which integers, or says several.
    """

    kind = "quantised"
    is_foreign = True
    declared_format: ClassVar[str]  # config.json's

    def __init__(self, source: StoredModel) -> None:
        super().__init__(source, {*source.in_words} | find(source))
        num_bits, self.is_widened = _declared_integers(source)
        self.quantized = f"int{num_bits}"

    @staticmethod
    @abstractmethod
    def read_integers(name: str, parts: Mapping[str, Tensor]) -> Integers:
        """One linear out of its stored tensors.

        Args:
            name: the linear's.
            parts: its tensors by the last word of their names.

        Raises:
            CheckpointError: if one is missing, of another dtype or shape than it must be, or not
                read; naming it.
            PatternError: if it is not 2:4.
        """

    def read(self, name: str) -> CompressedLinear:
        integers = self.read_integers(name, self.source.parts(name))
        if self.is_widened:
            return widened(name, integers, self.source.model_dtype)
        return taken_over(name, integers, self.scale_group or SCALE_GROUP)


def find(source: StoredModel) -> set[str]:
    """The linears of a directory whose packed integers are another program's."""
    linears = source.linears.keys() - {source.head}
    return {name for name in linears if FOREIGN_PARTS & {*source.part_names.get(name, ())}}


def _declared_integers(source: StoredModel) -> tuple[int, bool]:
    """How many bits config.json says, and whether they can only be widened."""
    form = source.quantization.get("format")
    all_weights = weights_of(source.quantization)
    found = {(int(weights["num_bits"]), _is_widened(weights)) for weights in all_weights}
    if form not in PACKED_FORMATS or not found:
        raise CheckpointError(
            f"{source.path} holds packed weights, but its config.json says format {form!r} with "
            f"{len(found)} config_groups; {' or '.join(PACKED_FORMATS)} with one or more is "
            "needed: copy config.json again"
        )
    if len(found) > 1:
        kinds = [
            f"{weights.get('num_bits')} bits (strategy {weights.get('strategy')}, group_size "
            f"{weights.get('group_size')})"
            for weights in all_weights
        ]
        raise CheckpointError(
            f"{source.path} has linears in {' and in '.join(kinds)}; only one can be read: start "
            "from the checkpoint that it was made from"
        )
    return found.pop()


def _is_widened(weights: dict[str, Any]) -> bool:
    """Whether no kernel has the scale groups of packed integers."""
    if weights.get("strategy") != "group":
        return False
    size = weights.get("group_size") or 0
    return weights["num_bits"] == 8 or size < 1 or size % min(INT4_SCALE_GROUPS) != 0


def taken_over(name: str, integers: Integers, scale_group: int) -> CompressedLinear:
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


def widened(name: str, integers: Integers, dtype: torch.dtype) -> CompressedLinear:
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
