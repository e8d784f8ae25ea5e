"""A run's gated checkpoint -> the compressed directory that it is trained for (`run --convert`).

Options, outputs and hub are checked before the training. What is there already is kept where it was
made of the same, so that a command which was stopped in either half is repeated as it stands.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.convert import check_converted, check_outputs, convert
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
        quantize: of the kept weights; None: they stay in the model's dtype.
        scale_group: of int4, the columns that share a scale.
        head: of the output layer; None: int8 with `quantize` where vLLM has one.
        push_to_hub: ORG/NAME to push the directory to, or None.
        is_private: whether only its owner sees it there.
    """

    out: Path
    gated: Path
    quantize: Literal["int8", "int4"] | None = None
    scale_group: int = SCALE_GROUP
    head: Literal["int8", "none"] | None = None
    push_to_hub: str | None = None
    is_private: bool = False

    @classmethod
    def of(
        cls,
        settings: TrainConfig,
        *,
        quantize: Literal["int8", "int4"] | None,
        scale_group: int | None,
        **others: Any,
    ) -> "Conversion":
        """One that quantises as the settings train for, or as asked for where they do not.

        Raises:
            UsageError: if both say how, and not the same.
        """
        if (wanted := settings.quantization) is not None:
            trained: dict[str, str] = {"quantize": wanted.values}
            if wanted.group is not None:
                trained["scale_group"] = str(wanted.group)
            asked = {"quantize": quantize, "scale_group": scale_group and str(scale_group)}
            for name, value in trained.items():
                if asked[name] not in (None, value):
                    raise UsageError(
                        f"--{name.replace('_', '-')} {asked[name]} differs from {name} {value}, "
                        "which the settings train for; leave one of them out"
                    )
            quantize, scale_group = wanted.values, wanted.group
        return cls(quantize=quantize, scale_group=scale_group or SCALE_GROUP, **others)

    @property
    def quantization(self) -> Quantization | None:
        """The options that say how.

        Raises:
            CheckpointError: if they do not go together.
        """
        return Quantization.asked(self.quantize, self.scale_group, self.head)

    @property
    def trained(self) -> Path:
        """Where the run finds itself finished: `out`, if `gated` was removed since."""
        return self.out if self.out.exists() and not self.gated.exists() else self.gated

    def check(self, settings: TrainConfig) -> None:
        """Refuses what can be seen to be wrong before the training.

        Raises:
            UsageError: for settings without compressed weights, or wrong options.
            CheckpointError: if the result cannot be written, or was removed in part.
        """
        settings.check_convertible()
        _ = self.quantization  # refuses what does not go together
        if self.is_private and self.push_to_hub is None:
            raise UsageError("--private needs --push-to-hub ORG/NAME; give both or none")
        if not self.out.exists():
            check_outputs([self.out])
        elif self.trained == self.out and self.push_to_hub is not None:
            raise CheckpointError(
                f"{self.out} is there and {self.gated} is not; push it with: "
                f"hf upload {self.push_to_hub} {self.out}"
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
            CheckpointError: if the directory was made of another checkpoint, or otherwise.
        """
        if self.trained == self.out:
            self._check_form()
            return inspect(self.out)
        asked = self.quantization
        if self.out.exists():
            check_converted(self.gated, self.out, asked)
            summary = inspect(self.out)
        elif self.quantize == "int4" and not read_record(self.gated).get("trained_as"):
            assert asked is not None
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
