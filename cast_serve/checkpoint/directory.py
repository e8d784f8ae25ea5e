"""A model directory on disk -> which form its weights have, which linears are targets, and each."""

from pathlib import Path

from cast_serve.checkpoint.declared import BITMASK_64, RAGGED
from cast_serve.checkpoint.formats import packed
from cast_serve.checkpoint.formats.bitmask import Bitmask
from cast_serve.checkpoint.formats.eight_bits import EightBits
from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.formats.marlin24 import Marlin24
from cast_serve.checkpoint.formats.pack_quantized import PackQuantized
from cast_serve.checkpoint.formats.plain import Dense, Gated, Pruned
from cast_serve.checkpoint.formats.ragged import Ragged
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.record import CAST_JSON, CheckpointError
from cast_serve.checkpoint.stored import EIGHT_BITS, StoredModel
from cast_serve.sparsity.pattern import Pattern

PLAIN = {form.kind: form for form in (Dense, Pruned, Gated)}  # by cast.json's kind


class ModelDirectory(StoredModel):
    """A model directory for reading.

    Args:
        path: the directory.
        pattern: its weights', where neither cast.json nor config.json says; None: 2:4.

    Attributes:
        form: how its targets are stored; `kind` and `quantized` are its.
        targets: the linears that are sparse, or by `find_targets` would be.

    Raises:
        CheckpointError, PatternError: as `StoredModel` does.
    """

    def __init__(self, path: Path, pattern: Pattern | None = None) -> None:
        super().__init__(path, pattern)
        self.form = form_of(self)
        if self.form.structure is not None:
            if pattern is not None:
                raise CheckpointError(
                    f"{path} is in the format {RAGGED}, where N is counted from the weights; "
                    "leave --sparsity out"
                )
            self.pattern = self.form.structure.pattern
            self.kept_of_64 = self.form.structure.kept_of_64
        self.kind = self.form.kind
        self.quantized = self.form.quantized
        self.targets: list[str] = self.record.get("targets") or self.form.linears
        if not (self.targets or self.form.dense):
            self.targets = self.candidates
        if unknown := sorted(set(self.targets) - set(self.linears)):
            raise CheckpointError(
                f"{path} has targets that are not linears of its model: {unknown[:5]}"
            )

    def target(self, name: str) -> CompressedLinear:
        """A target's kept values, hardened.

        Raises:
            CheckpointError: if it is damaged.
            PatternError: if it has another pattern.
        """
        return self.form.read(name)


def form_of(source: StoredModel) -> Form:
    """The form that the tensors of a directory show, or else its record says.

    Raises:
        CheckpointError: if it has several that are not read together, or an unknown one.
    """
    _check_one_width(source)
    if packed.find(source):
        is_marlin = source.quantization.get("format") == Marlin24.declared_format
        return Marlin24(source) if is_marlin else PackQuantized(source)
    kind = source.record.get("kind", Dense.kind)
    if Ragged.find(source):
        return Ragged(source)
    declared = (source.quantization.get("sparsity_config") or {}).get("format")
    if Bitmask.find(source) or declared == BITMASK_64:
        return Bitmask(source)
    if declared == RAGGED:
        raise CheckpointError(
            f"{source.path}/config.json names the format {RAGGED}, but no tensor is called "
            "row_offsets; copy the whole directory again"
        )
    if EightBits.find(source):
        return EightBits(source)
    if kind == Bitmask.kind:  # on record, though its tensors are missing
        return Bitmask(source)
    if kind not in PLAIN:
        raise CheckpointError(
            f"{source.path / CAST_JSON}: kind is {kind!r}, but {', '.join(PLAIN)} or "
            f"{Bitmask.kind} is needed; use the release that wrote it"
        )
    return PLAIN[kind](source)


def _check_one_width(source: StoredModel) -> None:
    """Refuses linears of several widths or kinds."""
    in_8_bits = [name for name, dtype in source.weight_dtypes.items() if dtype in EIGHT_BITS]
    if len({source.weight_dtypes[name] for name in in_8_bits}) > 1:
        raise CheckpointError(
            f"{source.path} has linears in int8 and in float8; only one can be read"
        )
    if source.in_words and in_8_bits:
        raise CheckpointError(
            f"{source.path} has linears in 4 bits and in 8 bits, such as {source.in_words[0]} and "
            f"{in_8_bits[0]}; only one can be read"
        )
