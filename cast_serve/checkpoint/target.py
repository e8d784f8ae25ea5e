"""A directory and what is asked for -> one target's kept values, hardened, and maybe quantised.

Only kept values are quantised, so the mask stays as it was where a kept value becomes 0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import SCALES_TRAINED
from cast_serve.sparsity.quantize import (
    INT4_SCALES_CHOSEN,
    SCALES_CHOSEN,
    SCALES_TAKEN_OVER,
)


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

    quantization: Quantization | None
    calibrated: Calibrated | None

    def quantized(self, source: ModelDirectory, name: str) -> CompressedLinear:
        """A target as it is stored."""
        if self.calibrated is not None:
            return self.calibrated.linears[name]
        target = source.target(name)
        if self.quantization is None:
            return target
        if self.is_trained(source):
            return target.with_scale(source.get(f"{name}.weight_scale"), self.quantization.group)
        return target.quantize(self.quantization)

    def is_trained(self, source: ModelDirectory) -> bool:
        """Whether the targets are stored with the scales that the source was trained with."""
        trained_as = source.record.get("trained_as")
        if self.calibrated is not None or source.kind != "gated" or trained_as is None:
            return False
        asked = self.quantization
        wanted = (asked.values, asked.group) if asked else (None, None)
        return wanted == (trained_as["quantize"], trained_as["scale_group"])

    def record(self, source: ModelDirectory) -> dict[str, Any] | None:
        """What cast.json says under quantization; None if no weight is quantised."""
        if self.quantization is None:
            return _taken_over(source)
        found = self.quantization.record()
        found["scales"] = INT4_SCALES_CHOSEN if self.quantization.group else SCALES_CHOSEN
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
