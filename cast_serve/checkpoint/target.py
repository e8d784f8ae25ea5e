"""A directory and what is asked for -> one target's kept values, hardened, and maybe quantised.

Only kept values are quantised, so the mask stays as it was where a kept value becomes 0.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.linear import CompressedLinear, Quantized
from cast_serve.checkpoint.record import SCALES_TRAINED
from cast_serve.sparsity.quantize import (
    INT4_SCALES_CHOSEN,
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
        target = source.target(name)
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
    if not source.quantized or source.form.is_widened:
        return None
    found = {"quantize": source.quantized, "head": source.head_dtype, "scales": SCALES_TAKEN_OVER}
    return found | ({"scale_group": source.form.scale_group} if source.quantized == "int4" else {})
