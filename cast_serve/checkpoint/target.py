"""A directory and what is asked for -> one target's kept values, hardened, and maybe quantised.

Hardening keeps the N largest gates of each group and writes zeros for the rest. Only kept values
are quantised, so the mask stays as it was where a kept value becomes 0.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.formats.foreign import read_linear
from cast_serve.checkpoint.formats.integers import SCALE_DTYPES
from cast_serve.checkpoint.linear import CompressedLinear, Quantized
from cast_serve.checkpoint.record import SCALES_TRAINED, CheckpointError
from cast_serve.sparsity.pattern import PatternError, check_weight, hard_mask
from cast_serve.sparsity.quantize import (
    INT4_SCALES_CHOSEN,
    SCALE_GROUP,
    SCALES_CHOSEN,
    SCALES_TAKEN_OVER,
)

Int8 = Literal["int8"]


class Calibrated(NamedTuple):
    """Targets that were quantised elsewhere, with a calibration text.

    Attributes:
        linears: by name.
        record: what cast.json says of the text.
    """

    linears: Mapping[str, CompressedLinear]
    record: Mapping[str, Any]


class Plan(NamedTuple):
    """What becomes of the targets' values and of the head; the arguments of `convert`."""

    quantize: Quantized | None
    head: Int8 | None
    scale_group: int
    calibrated: Calibrated | None

    def quantized(self, source: ModelDirectory, name: str) -> CompressedLinear:
        """A target as it is stored."""
        if self.calibrated is not None:
            return self.calibrated.linears[name]
        target = read_target(source, name)
        if self.quantize is None:
            return target
        if self.is_trained(source):
            return target.with_scale(source.get(f"{name}.weight_scale"), self._scale_group)
        return target.quantize(self.quantize, self.scale_group)

    def is_trained(self, source: ModelDirectory) -> bool:
        """Whether the targets are stored with the scales that the source was trained with."""
        if self.calibrated is not None or source.kind != "gated":
            return False
        trained_as = source.record.get("trained_as")
        wanted = {"quantize": self.quantize, "scale_group": self._scale_group}
        return trained_as is not None and wanted.items() <= trained_as.items()

    @property
    def _scale_group(self) -> int | None:
        return self.scale_group if self.quantize == "int4" else None

    def record(self, source: ModelDirectory) -> dict[str, Any] | None:
        """What cast.json says under quantization; None if no weight is quantised."""
        if self.quantize is None:
            return _taken_over(source)
        found: dict[str, Any] = {"quantize": self.quantize, "head": self.head}
        found["scales"] = SCALES_CHOSEN
        if self.quantize == "int4":
            found |= {"scale_group": self.scale_group, "scales": INT4_SCALES_CHOSEN}
        if self.calibrated is not None:
            found["calibration"] = dict(self.calibrated.record)
        elif self.is_trained(source):
            found["scales"] = SCALES_TRAINED
        return found


def _taken_over(source: ModelDirectory) -> dict[str, Any] | None:
    """Of integers and scales that another program chose, which stay as they are."""
    if not source.quantized or source.is_widened:
        return None
    found = {"quantize": source.quantized, "head": source.head_dtype, "scales": SCALES_TAKEN_OVER}
    return found | ({"scale_group": source.scale_group} if source.quantized == "int4" else {})


def read_target(source: ModelDirectory, name: str) -> CompressedLinear:
    """A target's kept values, hardened, as the source has them.

    Raises:
        CheckpointError: if it is damaged.
        PatternError: if it is not 2:4.
    """
    if source.kind in ("compressed", "quantised"):
        return read_linear(
            name,
            source.parts(name),
            source.model_dtype,
            scale_group=source.scale_group or SCALE_GROUP,
            is_widened=source.is_widened,
        )
    return CompressedLinear.from_weight(name, _hardened(source, name))


def _hardened(source: ModelDirectory, name: str) -> Tensor:
    """A target's weight [out_features, in_features] with exact zeros where it was dropped.

    Raises:
        CheckpointError: if its gates or scales do not fit.
        PatternError: if it is not 2:4.
    """
    weight, is_transposed = source.get(f"{name}.weight"), source.linears[name]
    if is_transposed:
        weight = weight.T.contiguous()
    if source.kind != "gated":
        check_weight(weight, source.pattern, name)
        return weight
    if source.record.get("method") == "adams":  # it has no gates: |W| ranks the weights
        gate = weight.float().abs()
    else:
        gate = source.get(f"{name}.gate")
        gate = gate.T if is_transposed else gate
        if gate.shape != weight.shape or gate.dtype not in (torch.bool, *SCALE_DTYPES):
            raise CheckpointError(
                f"{name}.gate is {gate.dtype} {list(gate.shape)}, but a logit for each weight of "
                f"{list(weight.shape)} in bf16, fp16 or fp32, or a bool mask, is needed; the "
                "checkpoint is damaged"
            )
    try:
        mask = hard_mask(gate, source.pattern)
    except PatternError as error:
        raise PatternError(f"{name}.gate: {error}") from None
    if gate.dtype == torch.bool and not torch.equal(mask, gate):
        raise PatternError(
            f"{name}.gate is a mask that does not keep {source.pattern.n} of every "
            f"{source.pattern.m} weights; the checkpoint is damaged"
        )
    weight = torch.where(mask, weight, torch.zeros_like(weight))
    if f"{name}.scale" not in source.files:
        return weight
    scale = source.get(f"{name}.scale").float()  # [out_features, column parts]
    is_fitting = scale.dim() == 2 and scale.shape[0] == weight.shape[0] and scale.numel()
    if not is_fitting or weight.shape[1] % scale.shape[1]:
        raise CheckpointError(
            f"{name}.scale is {list(scale.shape)}, which does not divide {list(weight.shape)}; "
            "the checkpoint is damaged"
        )
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return (weight.float() * scale).to(weight.dtype)
