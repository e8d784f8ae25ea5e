"""A directory of bitmasks, `convert`'s or another program's -> kept values and bitmask.

It is ``sparse-24-bitmask``, or ``sparse-64-bitmask`` of N:64, which `convert` alone writes.

A linear has ``compressed`` or ``weight_packed``, ``bitmask``, ``shape`` and, if it is quantised,
``weight_scale`` (linear.py). Another program may store 8-bit linears beside them with their zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cast_serve.checkpoint.declared import OLD_KEY
from cast_serve.checkpoint.formats import eight_bits
from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.linear import PARTS, CompressedLinear
from cast_serve.checkpoint.stored import EIGHT_BITS, StoredModel, shape_of
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern


class Bitmask(Form):
    """Kept values beside the mask of what they are; `convert` writes this form."""

    kind = "compressed"

    def __init__(self, source: StoredModel) -> None:
        self.with_zeros = eight_bits.EightBits.find(source)
        super().__init__(source, {*self.find(source), *self.with_zeros})
        dtypes = source.weight_dtypes
        in_8_bits = [name for name in self.linears if dtypes.get(name) in EIGHT_BITS]
        if any(PACKED in source.part_names[name] for name in self.linears):
            self.quantized = "int4"
        elif in_8_bits:
            self.quantized = EIGHT_BITS[dtypes[in_8_bits[0]]]
        self.is_widened = self.quantized == "float8"
        self.is_foreign = OLD_KEY in source.config or any(
            f"{name}.weight" in source.files
            or f"{name}.input_scale" in source.files
            or dtypes[name].startswith("F8")
            or shape_of(source.files, f"{name}.weight_scale")[1:] != [1]
            for name in in_8_bits
        )

    @staticmethod
    def find(source: StoredModel) -> list[str]:
        """The linears of a directory that are stored so."""
        inner = (name for name in source.weight_dtypes if f"{name}.compressed" in source.files)
        return [*inner, *source.in_words]

    def read(self, name: str) -> CompressedLinear:
        read_one = eight_bits.read if name in self.with_zeros else read
        pattern = self.source.pattern_of(name)
        return read_one(name, self.source.parts(name), self.source.model_dtype, pattern)


def read(
    name: str, parts: Mapping[str, Tensor], dtype: torch.dtype, pattern: Pattern = TWO_FOUR
) -> CompressedLinear:
    """One linear out of its stored tensors; arguments and errors are those of `eight_bits.read`."""
    values = parts.get("compressed")
    if PACKED in parts or values is None or values.dtype not in eight_bits.DTYPES:
        return CompressedLinear.from_parts(name, parts, pattern)
    values, scale = eight_bits.rows(name, values, parts, dtype)
    stored = {part: parts[part] for part in PARTS if part in parts} | {"compressed": values}
    if scale is not None:
        stored["weight_scale"] = scale
    return CompressedLinear.from_parts(name, stored, pattern)
