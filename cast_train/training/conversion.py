"""A run's gated checkpoint -> the compressed directory that it is trained for (`run --convert`).

Options, outputs and hub are checked before the training. What exists already is kept if it was made
from the same inputs and options, so a command that was stopped in either half can be run again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.convert import check_converted, check_head, check_outputs, convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.quantization import Quantization, check_recorded
from cast_serve.checkpoint.record import CheckpointError, read_record
from cast_serve.errors import UsageError
from cast_serve.sparsity.quantize import SCALE_GROUP
from cast_train.config import TrainConfig
from cast_train.pruning.quantize import write_quantized

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What is to be made of a gated checkpoint, and where.

    Attributes:
        out: the compressed directory.
        gated: the checkpoint that is trained for it.
        quantization: of the kept weights and the output layer; None: they stay in the model's
            dtype.
        push_to_hub: ORG/NAME to push the directory to, or None.
        is_private: whether only its owner sees it there.
    """

    out: Path
    gated: Path
    quantization: Quantization | None = None
    push_to_hub: str | None = None
    is_private: bool = False

    @property
    def trained(self) -> Path:
        """Where the run finds itself finished: `out`, if `gated` was removed since."""
        return self.out if self.out.exists() and not self.gated.exists() else self.gated

    def check(self, settings: TrainConfig, model: Path) -> None:
        """Refuses, before the training, what could not be converted or pushed after it.

        Args:
            settings: of the run.
            model: that is trained.

        Raises:
            UsageError: for settings without compressed weights, or wrong options.
            CheckpointError: if the result cannot be written, was removed in part, or would have
                another output layer than the model can.
        """
        settings.check_convertible()
        if self.quantization is not None:
            check_head(ModelDirectory(hub.fetch(model)), self.quantization)
        if self.is_private and self.push_to_hub is None:
            raise UsageError("--private needs --push-to-hub ORG/NAME; give both or none")
        if not self.out.exists():
            check_outputs([self.out])
        elif self.trained == self.out and self.push_to_hub is not None:
            raise CheckpointError(
                f"{self.out} exists but {self.gated} does not; push it with: hf upload "
                f"{self.push_to_hub} {self.out}"
            )
        if self.push_to_hub is not None:
            hub.check_push(self.push_to_hub, self.is_private)

    def make(self, text_files: Sequence[Path]) -> dict[str, Any]:
        """Converts what was trained, or checks what is there, and pushes it.

        Args:
            text_files: the training text, whose beginning chooses 4-bit integers that were not
                trained.

        Returns:
            `inspect` of the directory, and ``pushed_to``.

        Raises:
            CheckpointError: if the directory was made from another checkpoint, or with other
                options.
        """
        if self.trained == self.out:
            self._check_form()
            return inspect(self.out)
        asked = self.quantization
        if self.out.exists():
            check_converted(self.gated, self.out, asked)
            summary = inspect(self.out)
        elif asked and asked.values == "int4" and not read_record(self.gated).get("trained_as"):
            summary = write_quantized(self.gated, text_files, self.out, asked)
        else:
            summary = convert(self.gated, self.out, quantization=asked)
        if self.push_to_hub is None:
            return summary
        pushed_to = hub.push(self.out, self.push_to_hub, self.is_private)
        logger.info("%s: pushed to %s", self.out, pushed_to)
        return {**summary, "pushed_to": pushed_to}

    def _check_form(self) -> None:
        """Compares the directory's record if there is no checkpoint to compare with."""
        recorded = read_record(self.out).get("quantization") or {}
        remedy = "choose another directory or remove it"
        check_recorded(self.quantization, recorded, str(self.out), remedy)


def quantization_of(
    settings: TrainConfig,
    quantize: Literal["int8", "int4"] | None,
    scale_group: int | None,
    head: Literal["int8", "int4", "none"] | None,
) -> Quantization | None:
    """What `convert` is asked for: what the settings train for, or else the options.

    Args:
        settings: of the run.
        quantize, scale_group, head: the options of the command line; None: not given.

    Raises:
        UsageError: if settings and options differ.
        CheckpointError: if the options do not go together.
    """
    if (trained := settings.quantization) is not None:
        asked = (
            ("quantize", quantize, trained.values),
            ("scale_group", scale_group, trained.group),
        )
        for name, option, value in asked:
            if option is not None and value not in (None, option):
                raise UsageError(
                    f"--{name.replace('_', '-')} {option} differs from {name} {value}, which the "
                    "settings train for; leave one of them out"
                )
        quantize, scale_group = trained.values, trained.group or scale_group
    return Quantization.asked(quantize, scale_group or SCALE_GROUP, head)
