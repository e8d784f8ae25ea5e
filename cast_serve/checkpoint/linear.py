"""The tensors of one linear <-> its kept values, bitmask and scales; damage is named by row.

A compressed linear `<name>` is stored as ``<name>.compressed`` and ``<name>.bitmask`` (bitmask.py),
``<name>.shape`` int64 [2, 1] and, if its values are int8, ``<name>.weight_scale`` [out_features, 1]
in the model's dtype (quantize.py). Of 4 bits ``<name>.weight_packed`` int32 (nibbles.py) stands in
place of ``<name>.compressed``, and the scale is [out_features, number of scale groups].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cast_serve.checkpoint.formats.integers import SCALE_DTYPES, check_scales
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress, decompress, unpack_mask
from cast_serve.sparsity.nibbles import PACKED, pack_nibbles, unpack_nibbles
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, PatternError
from cast_serve.sparsity.quantize import (
    INT4_SCALE_GROUPS,
    MAX_INTEGER,
    dequantize,
    dequantize_int4,
    nearest_integers,
    quantize_rows,
    quantize_values_int4,
)

PARTS = ("compressed", "bitmask", "shape")


@dataclass(frozen=True)
class CompressedLinear:
    """A weight [out_features, in_features] that keeps N of 64, or 2 of 4.

    Attributes:
        name: the linear's, for error messages and tensor names.
        values: [out_features, in_features N / M], bf16, fp16, fp32 or int8.
        bitmask: uint8 [out_features, ceil(in_features / 8)].
        in_features: a multiple of the pattern's M.
        scale: in the model's dtype if the values are int8, else None: [out_features, 1], or of 4
            bits [out_features, ceil(in_features / scale_group)].
        scale_group: of 4 bits, the columns that share a scale; else None.
        pattern: as stored: 2:4, or N:64.
    """

    name: str
    values: Tensor
    bitmask: Tensor
    in_features: int
    scale: Tensor | None = None
    scale_group: int | None = None
    pattern: Pattern = TWO_FOUR

    @classmethod
    def from_weight(
        cls, name: str, weight: Tensor, pattern: Pattern = TWO_FOUR
    ) -> "CompressedLinear":
        """Compresses a weight [out_features, in_features] with its zeros.

        Raises:
            PatternError: if a group has more than N non-zeros, or in_features no whole words.
        """
        values, bitmask = compress(weight, name, pattern)
        return cls(name, values, bitmask, weight.shape[1], pattern=pattern.stored)

    @classmethod
    def from_parts(
        cls, name: str, parts: Mapping[str, Tensor], pattern: Pattern = TWO_FOUR
    ) -> "CompressedLinear":
        """Checks the stored tensors of a linear and puts them together.

        Args:
            name: the linear's.
            parts: compressed or weight_packed, bitmask, shape and, if quantised, weight_scale.
            pattern: what config.json says of it.

        Raises:
            CheckpointError: if one is missing, or of another dtype or shape than it must be, or a
                scale is not finite and positive; naming the tensor, and the row.
            PatternError: if the shapes do not belong to the pattern, or a word of the bitmask (2:4:
                a group) does not keep exactly N.
        """
        pattern = pattern.stored
        is_packed = PACKED in parts
        stored = PACKED if is_packed else "compressed"
        if missing := [part for part in (stored, *PARTS[1:]) if part not in parts]:
            raise CheckpointError(f"{name} lacks {', '.join(missing)}; the checkpoint is damaged")
        values, bitmask = parts[stored], parts["bitmask"]
        shape = parts["shape"].flatten().tolist()
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise CheckpointError(
                f"{name}.shape holds {shape!s:.100}, but out_features and in_features are needed; "
                "the checkpoint is damaged"
            )
        out_features, in_features = shape
        kept = in_features * pattern.n // pattern.m
        needed = (
            [out_features, -(-kept // 8) if is_packed else kept],
            [out_features, -(-in_features // 8)],
        )
        if in_features % pattern.m:
            raise PatternError(
                f"{name}: in_features {in_features} is not a multiple of {pattern.m}, which "
                f"{pattern}, the structure in config.json, needs; copy the directory again"
            )
        if (list(values.shape), list(bitmask.shape)) != needed:
            raise PatternError(
                f"{name}: {stored} {list(values.shape)} and bitmask {list(bitmask.shape)} do not "
                f"belong to shape [{out_features}, {in_features}] in {pattern}, the structure in "
                f"config.json; {needed[0]} and {needed[1]} do: copy the directory again"
            )
        unpack_mask(bitmask, in_features, name, pattern)
        scale = parts.get("weight_scale")
        if is_packed:
            if values.dtype != torch.int32:
                raise CheckpointError(
                    f"{name}.{PACKED} is {values.dtype}, but int32 is needed: words of eight 4-bit "
                    "values; start from the unquantised checkpoint"
                )
            group = scale_group_of(name, scale, in_features)
            scale = check_scale(name, scale, out_features, -(-in_features // group))
            values = unpack_nibbles(values, kept)
            return cls(name, values, bitmask, in_features, scale, group, pattern)
        if values.dtype == torch.int8:
            scale = check_scale(name, scale, out_features)
        elif values.dtype not in SCALE_DTYPES or scale is not None:
            raise CheckpointError(
                f"{name}.compressed is {values.dtype}{' with a scale' if scale is not None else ''}"
                ", but int8 with a scale, or bf16, fp16 or fp32 without one is needed; "
                "convert the directory first (cast-serve convert SRC OUT)"
            )
        return cls(name, values, bitmask, in_features, scale, pattern=pattern)

    @property
    def mask(self) -> Tensor:
        """bool [out_features, in_features], True = kept."""
        return unpack_mask(self.bitmask, self.in_features, self.name, self.pattern)

    def quantize(
        self,
        quantization: Quantization,
        importance: Tensor | None = None,
    ) -> "CompressedLinear":
        """The same weight with the integers and scales of least squared error.

        Args:
            quantization: to 8 or to 4 bits.
            importance: of each value's error, fp32, as `values`; None: equal.

        Raises:
            CheckpointError: if a value is Inf or NaN.
        """
        try:
            scale_group = quantization.group
            if scale_group is None:
                values, scale = quantize_rows(self.values, self.name, importance)
                return replace(self, values=values, scale=scale)
            important = None if importance is None else self._spread(importance)
            values, scale = quantize_values_int4(
                self._spread(self.values),
                scale_group,
                self.name,
                important,
                has_zeros=self._has_spread,
            )
            values = self._gathered(values)
            return replace(self, values=values, scale=scale, scale_group=scale_group)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def with_scale(self, scale: Tensor, scale_group: int | None) -> "CompressedLinear":
        """The same weight with the nearest integers for scales that are given.

        Args:
            scale: as the attribute.
            scale_group: of int4, the columns that share a scale; None: int8.

        Raises:
            CheckpointError: if a scale is damaged, or a value is Inf or NaN.
        """
        num_groups = -(-self.in_features // scale_group) if scale_group else 1
        scale = check_scale(self.name, scale, self.values.shape[0], num_groups)
        if not torch.isfinite(self.values).all():
            raise CheckpointError(f"{self.name} holds Inf or NaN; the file is damaged")
        if scale_group is None:
            values = nearest_integers(self.values, scale, None)
        else:
            spread = self._spread(self.values)
            values = nearest_integers(spread, scale, scale_group, has_zeros=self._has_spread)
            values = self._gathered(values)
        return replace(self, values=values, scale=scale, scale_group=scale_group)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features], dequantised to dtype (None: the model's)."""
        values = self.values
        if self.scale_group is not None and self.scale is not None:
            spread, has_zeros = self._spread(values), self._has_spread
            values = dequantize_int4(
                spread, self.scale, self.scale_group, dtype, has_zeros=has_zeros
            )
            if has_zeros:
                return values
        elif self.scale is not None:
            values = dequantize(values, self.scale, dtype)
        return decompress(values, self.bitmask, self.in_features, self.name, self.pattern)

    # A scale group of columns is a slice of 2:4's kept values, but not of N of 64's: those are
    # spread to all columns first.

    @property
    def _has_spread(self) -> bool:
        return self.pattern != TWO_FOUR

    def _spread(self, values: Tensor) -> Tensor:
        if not self._has_spread:
            return values
        return decompress(values, self.bitmask, self.in_features, self.name, self.pattern)

    def _gathered(self, values: Tensor) -> Tensor:
        return values[self.mask].view(self.values.shape) if self._has_spread else values

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by tensor name."""
        shape = torch.tensor([[self.values.shape[0]], [self.in_features]])
        tensors = {
            f"{self.name}.bitmask": self.bitmask,
            f"{self.name}.shape": shape,
        }
        if self.scale_group is None:
            tensors[f"{self.name}.compressed"] = self.values
        else:
            tensors[f"{self.name}.{PACKED}"] = pack_nibbles(self.values)
        if self.scale is not None:
            tensors[f"{self.name}.weight_scale"] = self.scale
        return tensors

    @property
    def nbytes(self) -> int:
        """Of values, bitmask and scales, as they are stored."""
        scale_bytes = 0 if self.scale is None else self.scale.nbytes
        return self.values_nbytes + self.bitmask.nbytes + scale_bytes

    @property
    def values_nbytes(self) -> int:
        """Of the values, as they are stored."""
        rows, kept = self.values.shape
        return self.values.nbytes if self.scale_group is None else rows * -(-kept // 8) * 4

    @property
    def num_weights(self) -> int:
        """Of the weight with its zeros."""
        return self.values.shape[0] * self.in_features

    @property
    def dense_nbytes(self) -> int:
        """Of the weight with its zeros in the model's dtype."""
        model_dtype = self.values.dtype if self.scale is None else self.scale.dtype
        return self.num_weights * model_dtype.itemsize


def scale_group_of(name: str, scale: Tensor | None, in_features: int) -> int:
    """The columns that share a scale, by how many scales a row has.

    Raises:
        CheckpointError: if no scale group of ours gives that many.
    """
    num_groups = scale.shape[1] if scale is not None and scale.dim() == 2 else 0
    for group in INT4_SCALE_GROUPS:
        if -(-in_features // group) == num_groups:
            return group
    found = "none" if scale is None else str(list(scale.shape))
    raise CheckpointError(
        f"{name}.weight_scale: {found}, but a 4-bit row of {in_features} columns has a scale for "
        f"each {', '.join(map(str, INT4_SCALE_GROUPS))} columns; it is incomplete, or of another "
        "scale group: copy the directory again, or start from the unquantised checkpoint"
    )


def check_scale(name: str, scale: Tensor | None, out_features: int, num_groups: int = 1) -> Tensor:
    """Refuses what is no scale of a quantised weight.

    Returns:
        the scale.

    Raises:
        CheckpointError: if it is missing, not [out_features, num_groups] of a floating dtype, or a
            row's is not finite and positive.
    """
    if scale is None:
        raise CheckpointError(
            f"{name} is in 8 bits, but has no {name}.weight_scale; it is incomplete: "
            "copy the directory again"
        )
    if list(scale.shape) != [out_features, num_groups] or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{name}.weight_scale is {scale.dtype} {list(scale.shape)}, but "
            f"[{out_features}, {num_groups}] of bf16, fp16 or fp32 is needed; "
            "convert the directory first (cast-serve convert SRC OUT)"
        )
    check_scales(f"{name}.weight_scale", scale)
    return scale


def check_integers(name: str, values: Tensor, largest: int = MAX_INTEGER) -> None:
    """Refuses what the quantisers never write, -128 of 8 bits and -8 of 4.

    Args:
        name: the tensor's.
        values: int8 [out_features, columns].
        largest: integer that is written.

    Raises:
        CheckpointError: naming the first row.
    """
    is_bad = (values < -largest).any(1)
    if is_bad.any():
        raise CheckpointError(
            f"{name}: row {int(is_bad.nonzero()[0])} holds {-largest - 1}, but values of this "
            f"record are within +-{largest}; {int(is_bad.sum())} rows are wrong and the file is "
            "damaged"
        )
