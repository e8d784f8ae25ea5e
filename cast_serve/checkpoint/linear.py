"""The tensors of one linear <-> its kept values, bitmask and scales; damage is named by row.

A compressed linear `<name>` is stored as ``<name>.compressed`` and ``<name>.bitmask`` (bitmask.py),
``<name>.shape`` int64 [2, 1] and, if its values are int8, ``<name>.weight_scale`` [out_features, 1]
in the model's dtype (quantize.py). An int8 output layer is dense: ``<name>.weight`` and
``<name>.weight_scale``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress, decompress, unpack_mask
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import dequantize, quantize_rows

PARTS = ("compressed", "bitmask", "shape")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class CompressedLinear:
    """A 2:4 weight [out_features, in_features].

    Attributes:
        name: the linear's, for error messages and tensor names.
        values: [out_features, in_features / 2], bf16, fp16, fp32 or int8.
        bitmask: uint8 [out_features, ceil(in_features / 8)].
        in_features: a multiple of 4.
        scale: [out_features, 1] in the model's dtype if the values are int8, else None.
    """

    name: str
    values: Tensor
    bitmask: Tensor
    in_features: int
    scale: Tensor | None = None

    @classmethod
    def from_weight(cls, name: str, weight: Tensor) -> "CompressedLinear":
        """Compresses a 2:4 weight [out_features, in_features] with its zeros.

        Raises:
            PatternError: if a group has more than two non-zeros.
        """
        values, bitmask = compress(weight, name)
        return cls(name, values, bitmask, weight.shape[1])

    @classmethod
    def from_parts(cls, name: str, parts: Mapping[str, Tensor]) -> "CompressedLinear":
        """Checks the stored tensors of a linear and puts them together.

        Args:
            name: the linear's.
            parts: compressed, bitmask, shape and, for int8, weight_scale.

        Raises:
            CheckpointError: if one is missing, or of another dtype or shape than it must be, or a
                scale is not finite and positive; naming the tensor, and the row.
            PatternError: if the bitmask does not keep exactly two of each four.
        """
        if missing := [part for part in PARTS if part not in parts]:
            raise CheckpointError(f"{name} lacks {', '.join(missing)}; the checkpoint is damaged")
        values, bitmask = parts["compressed"], parts["bitmask"]
        shape = parts["shape"].flatten().tolist()
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise CheckpointError(
                f"{name}.shape holds {shape!s:.100}, but out_features and in_features are needed; "
                "the checkpoint is damaged"
            )
        out_features, in_features = shape
        needed = [out_features, in_features // 2], [out_features, -(-in_features // 8)]
        if in_features % 4 or (list(values.shape), list(bitmask.shape)) != needed:
            raise PatternError(
                f"{name}: values {list(values.shape)} and bitmask {list(bitmask.shape)} do not "
                f"belong to shape [{out_features}, {in_features}]; {needed[0]} and {needed[1]} do"
            )
        unpack_mask(bitmask, in_features, name)
        scale = parts.get("weight_scale")
        if values.dtype == torch.int8:
            scale = check_scale(name, scale, out_features)
        elif values.dtype not in FLOATS or scale is not None:
            raise CheckpointError(
                f"{name}.compressed is {values.dtype}{' with a scale' if scale is not None else ''}"
                ", but int8 with a scale, or bf16, fp16 or fp32 without one is needed; "
                "convert the directory first (cast-serve convert SRC OUT)"
            )
        return cls(name, values, bitmask, in_features, scale)

    def quantize(self) -> "CompressedLinear":
        """The same weight with int8 values and the scales of least squared error.

        Raises:
            CheckpointError: if a value is Inf or NaN.
        """
        try:
            values, scale = quantize_rows(self.values, self.name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return replace(self, values=values, scale=scale)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features], dequantised to dtype (None: the model's)."""
        values = self.values if self.scale is None else dequantize(self.values, self.scale, dtype)
        return decompress(values, self.bitmask, self.in_features, self.name)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by tensor name."""
        shape = torch.tensor([[self.values.shape[0]], [self.in_features]])
        tensors = {
            f"{self.name}.compressed": self.values,
            f"{self.name}.bitmask": self.bitmask,
            f"{self.name}.shape": shape,
        }
        if self.scale is not None:
            tensors[f"{self.name}.weight_scale"] = self.scale
        return tensors

    @property
    def nbytes(self) -> int:
        """Of values, bitmask and scales."""
        scale_bytes = 0 if self.scale is None else self.scale.nbytes
        return self.values.nbytes + self.bitmask.nbytes + scale_bytes

    @property
    def num_weights(self) -> int:
        """Of the weight with its zeros."""
        return self.values.shape[0] * self.in_features

    @property
    def dense_nbytes(self) -> int:
        """Of the weight with its zeros in the model's dtype."""
        model_dtype = self.values.dtype if self.scale is None else self.scale.dtype
        return self.num_weights * model_dtype.itemsize


def check_scale(name: str, scale: Tensor | None, out_features: int) -> Tensor:
    """Refuses what is no scale of an 8-bit weight.

    Returns:
        the scale.

    Raises:
        CheckpointError: if it is missing, not [out_features, 1] of a floating dtype, or a row's is
            not finite and positive.
    """
    if scale is None:
        raise CheckpointError(
            f"{name} is in 8 bits, but has no {name}.weight_scale; it is incomplete: "
            "copy the directory again"
        )
    if list(scale.shape) != [out_features, 1] or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{name}.weight_scale is {scale.dtype} {list(scale.shape)}, but [{out_features}, 1] of "
            "bf16, fp16 or fp32 is needed; convert the directory first (cast-serve convert SRC OUT)"
        )
    is_bad = ~(torch.isfinite(scale) & (scale > 0)).flatten()
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise CheckpointError(
            f"{name}.weight_scale: row {row} is {float(scale[row])}, but a scale is finite and "
            f"above 0; {int(is_bad.sum())} rows are wrong and the file is damaged: "
            "copy the directory again"
        )
    return scale


def check_integers(name: str, values: Tensor) -> None:
    """Refuses -128, which `quantize_rows` never writes.

    Args:
        name: the tensor's.
        values: int8 [out_features, columns].

    Raises:
        CheckpointError: naming the first row.
    """
    is_bad = (values == -128).any(1)
    if is_bad.any():
        raise CheckpointError(
            f"{name}: row {int(is_bad.nonzero()[0])} holds -128, but values of this record are "
            f"within +-127; {int(is_bad.sum())} rows are wrong and the file is damaged"
        )
