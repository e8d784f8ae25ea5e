"""The options --quantize, --scale-group and --head -> one value: what is quantised, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cast_serve.errors import CheckpointError
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, SCALE_GROUP

Quantized = Literal["int8", "int4"]
Head = Literal["int8", "int4", "auto"]


@dataclass(frozen=True)
class Quantization:
    """What the targets' kept values and the output layer become.

    Attributes:
        values: int8 or int4.
        scale_group: of int4, the columns that share a scale; of the head's too.
        head: of the output layer; auto: int8 where vLLM has one; None: it stays as it is.

    Raises:
        CheckpointError: for scale groups that are not served.
    """

    values: Quantized
    scale_group: int = SCALE_GROUP
    head: Head | None = None

    def __post_init__(self) -> None:
        known = ", ".join(map(str, INT4_SCALE_GROUPS))
        is_default = self.scale_group == SCALE_GROUP
        if self.scale_group not in INT4_SCALE_GROUPS or not (is_default or self._has_int4):
            raise CheckpointError(
                f"--scale-group {self.scale_group} is not served; it needs --quantize int4 or "
                f"--head int4 and is one of {known}"
            )

    @classmethod
    def asked(
        cls,
        values: Quantized | None,
        scale_group: int = SCALE_GROUP,
        head: Literal["int8", "int4", "none"] | None = None,
    ) -> "Quantization | None":
        """The options of a command line; None: nothing is quantised.

        Raises:
            CheckpointError: for options that need --quantize, or a scale group that is not served.
        """
        if values is not None:
            return cls(values, scale_group, None if head == "none" else head or "auto")
        if head in ("int8", "int4"):
            raise CheckpointError(f"--head {head} needs --quantize int8 or int4; give both or none")
        if scale_group != SCALE_GROUP:
            raise CheckpointError(
                f"--scale-group {scale_group} needs --quantize int4; give both or none"
            )
        return None

    @property
    def group(self) -> int | None:
        """The scale group of int4; None: a row has one scale."""
        return self.scale_group if self.values == "int4" else None

    @property
    def _has_int4(self) -> bool:
        return "int4" in (self.values, self.head)

    def with_head(self, head: Head | None) -> "Quantization":
        """The same with another form of the output layer."""
        return replace(self, head=head)

    def record(self) -> dict[str, Any]:
        """What cast.json says under quantization."""
        scale_group = {"scale_group": self.scale_group} if self._has_int4 else {}
        return {"quantize": self.values, "head": self.head, **scale_group}


def check_recorded(
    asked: Quantization | None, recorded: Mapping[str, Any], made: str, remedy: str
) -> None:
    """Refuses a directory that was converted in another way than is asked for.

    Args:
        asked: for; with head auto any head will do.
        recorded: cast.json's quantization; empty: none.
        made: the directory.
        remedy: of the error.

    Raises:
        CheckpointError: naming the option.
    """
    wanted = {"quantize": None, "head": None} if asked is None else asked.record()
    if wanted["head"] == "auto":
        del wanted["head"]
    for option, value in wanted.items():
        if recorded.get(option) != value:
            raise CheckpointError(
                f"{made} was converted with --{option.replace('_', '-')} "
                f"{recorded.get(option) or 'none'}, but {value or 'none'} is asked for; {remedy}"
            )
