"""A quantised output layer <-> its tensors: dense, in 8 or 4 bits, its integers to the nearest.

Of 8 bits ``<name>.weight`` int8 and ``<name>.weight_scale`` [vocabulary, 1]; of 4 bits, as
compressed-tensors' ``pack-quantized``, ``<name>.weight_packed`` int32 (nibbles.py),
``<name>.weight_scale`` [vocabulary, hidden_size / scale group] and ``<name>.weight_shape``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cast_serve.checkpoint.linear import check_integers, check_scale
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.nibbles import NIBBLES, PACKED, pack_nibbles, unpack_nibbles
from cast_serve.sparsity.pattern import WORD
from cast_serve.sparsity.quantize import (
    INT4_SCALE_GROUPS,
    MAX_INT4,
    MAX_INTEGER,
    dequantize,
    dequantize_int4,
    quantize_rows,
    quantize_values_int4,
)

PARTS = ("weight", PACKED, "weight_scale", "weight_shape")


@dataclass(frozen=True)
class QuantizedHead:
    """An output layer's weight.

    Attributes:
        name: the module's.
        values: int8 [vocabulary, hidden_size], of 8 or 4 bits.
        scale: in the model's dtype, [vocabulary, 1], or of 4 bits [vocabulary, hidden_size /
            scale_group].
        scale_group: of 4 bits, the columns that share a scale; else None.
    """

    name: str
    values: Tensor
    scale: Tensor
    scale_group: int | None = None

    @classmethod
    def from_weight(
        cls, name: str, weight: Tensor, quantization: Quantization, origin: str
    ) -> "QuantizedHead":
        """The integers and scales of least squared error.

        Args:
            name: the module's.
            weight: [vocabulary, hidden_size], bf16, fp16 or fp32.
            quantization: its head is int8 or int4.
            origin: the tensor that the weight is from, for error messages.

        Raises:
            CheckpointError: if a weight is Inf or NaN.
        """
        try:
            if quantization.head != "int4":
                return cls(name, *quantize_rows(weight, origin))
            group = quantization.scale_group
            found = quantize_values_int4(weight, group, origin, has_zeros=True)
            return cls(name, *found, group)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    @classmethod
    def from_parts(cls, name: str, parts: Mapping[str, Tensor]) -> "QuantizedHead":
        """Checks the stored tensors and puts them together.

        Args:
            name: the module's.
            parts: its tensors by the last word of their names.

        Raises:
            CheckpointError: if one is missing, or of another dtype or shape than it must be, or a
                scale is not finite and positive; naming it.
        """
        scale = parts.get("weight_scale")
        if PACKED not in parts:
            values = parts["weight"]
            return cls(name, values, check_scale(name, scale, values.shape[0]))
        words = parts[PACKED]
        shape = parts["weight_shape"].flatten().tolist() if "weight_shape" in parts else []
        num_rows, num_columns = shape if len(shape) == 2 else (0, 0)
        is_whole = num_columns > 0 and num_columns % WORD == 0
        if not is_whole or (words.dtype, list(words.shape)) != (
            torch.int32,
            [num_rows, num_columns // NIBBLES],
        ):
            raise CheckpointError(
                f"{name}.{PACKED} is {words.dtype} {list(words.shape)} with weight_shape {shape}, "
                f"but torch.int32 [vocabulary, hidden size / {NIBBLES}], with a hidden size that "
                f"is a multiple of {WORD}, is needed: copy the directory again"
            )
        num_groups = scale.shape[1] if scale is not None and scale.dim() == 2 else 0
        group = next((g for g in INT4_SCALE_GROUPS if g * num_groups == num_columns), None)
        if group is None:
            raise CheckpointError(
                f"{name}.weight_scale: {'none' if scale is None else list(scale.shape)}, but a "
                f"4-bit output layer with a hidden size of {num_columns} has one for each "
                f"{', '.join(map(str, INT4_SCALE_GROUPS))} columns: copy the directory again"
            )
        scale = check_scale(name, scale, num_rows, num_groups)
        return cls(name, unpack_nibbles(words, num_columns), scale, group)

    def check_integers(self) -> None:
        """Refuses integers that `from_weight` never makes.

        Raises:
            CheckpointError: naming the first row.
        """
        part, largest = ("weight", MAX_INTEGER) if self.scale_group is None else (PACKED, MAX_INT4)
        check_integers(f"{self.name}.{part}", self.values, largest)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [vocabulary, hidden_size], dequantised to dtype (None: the scales')."""
        if self.scale_group is None:
            return dequantize(self.values, self.scale, dtype)
        return dequantize_int4(self.values, self.scale, self.scale_group, dtype, has_zeros=True)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by tensor name."""
        scale = {f"{self.name}.weight_scale": self.scale}
        if self.scale_group is None:
            return {f"{self.name}.weight": self.values, **scale}
        words = {f"{self.name}.{PACKED}": pack_nibbles(self.values)}
        return {**words, **scale, f"{self.name}.weight_shape": torch.tensor(self.values.shape)}


def check_columns(name: str, hidden_size: int, scale_group: int) -> None:
    """Refuses an output layer that cannot be stored and served in 4 bits.

    Raises:
        CheckpointError: naming the remedy.
    """
    if hidden_size % WORD:
        raise CheckpointError(
            f"{name}: the hidden size {hidden_size} is not a multiple of {WORD}, which an output "
            "layer of 4 bits needs; give --head int8"
        )
    if hidden_size % scale_group:
        raise CheckpointError(
            f"{name}: the hidden size {hidden_size} is not a multiple of --scale-group "
            f"{scale_group}, which an output layer of 4 bits needs; give --scale-group {WORD}, or "
            "--head int8"
        )
