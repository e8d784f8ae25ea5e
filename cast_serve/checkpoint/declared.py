"""config.json -> what it says of compression and quantisation; what is not read is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.checkpoint.record import CheckpointError, checked_kept
from cast_serve.sparsity.pattern import TWO_FOUR, WORD, Pattern, PatternError

OLD_KEY = "compression_config"  # of config.json, in place of quantization_config
PACK_QUANTIZED = "pack-quantized"
MARLIN = "marlin-24"
PACKED_FORMATS = (PACK_QUANTIZED, MARLIN)
FORMATS = ("dense", "int-quantized", "float-quantized", *PACKED_FORMATS)
# Of sparsity_config: 2:4 as compressed-tensors wrote it, ours of N:64, and rows of any count.
BITMASK_24, BITMASK_64, RAGGED = "sparse-24-bitmask", "sparse-64-bitmask", "sparse-bitmask"
SPARSE_FORMATS = ("dense", BITMASK_24, BITMASK_64, RAGGED)


@dataclass(frozen=True)
class Structure:
    """What the compressed linears of a directory are stored as.

    Attributes:
        pattern: 2:4 or N:64.
        kept_of_64: N by name, of the linears that differ from it.
    """

    pattern: Pattern
    kept_of_64: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> Pattern:
        """2:4 or N:64 of a linear."""
        kept = self.kept_of_64.get(name)
        return self.pattern if kept is None else Pattern(kept, WORD)


def structure_of(path: Path, quantization: dict[str, Any]) -> Structure | None:
    """What config.json says the bitmasks of a directory are; None if it has none of ours.

    Raises:
        CheckpointError: if that is not N:M, or not of its format.
    """
    sparsity = quantization.get("sparsity_config") or {}
    form, text = sparsity.get("format"), sparsity.get("sparsity_structure")
    where = f"{path}/config.json: sparsity_structure"
    if form == BITMASK_24:
        if text not in (None, "unstructured", str(TWO_FOUR)):  # older programs wrote no structure
            raise CheckpointError(
                f"{where} is {text!r:.100}, but the format {form} stores 2:4; "
                "copy config.json again"
            )
        return Structure(TWO_FOUR)
    if form != BITMASK_64:
        return None
    try:
        pattern = Pattern.parse(str(text))
    except PatternError as error:
        raise CheckpointError(f"{where}: {error}; copy config.json again") from None
    if pattern.m != WORD:
        raise CheckpointError(
            f"{where} is {pattern}, but the format {BITMASK_64} stores N:64; copy config.json again"
        )
    return Structure(pattern, checked_kept(where, sparsity.get("kept_of_64")))


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of compression and quantisation; empty if nothing.

    Raises:
        CheckpointError: if that is no object.
    """
    found = config.get("quantization_config") or config.get(OLD_KEY) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}/config.json: quantization_config is {found!r:.100}")
    if found.get("format") in (BITMASK_24, RAGGED):  # of the oldest files: it is all there is
        found = {"sparsity_config": found}
    return found


def check_declared(path: Path, quantization: dict[str, Any]) -> None:
    """Refuses what is quantised or compressed in a way that is not read.

    Raises:
        CheckpointError: naming it.
    """
    if not quantization:
        return
    remedy = "start from the checkpoint that it was made from, in bf16, fp16 or fp32"
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise CheckpointError(f"{path} is quantised ({method}), which is not read; {remedy}")
    sparse_format = (quantization.get("sparsity_config") or {}).get("format", "dense")
    form = quantization.get("format") or "dense"
    for found, known in ((form, FORMATS), (sparse_format, SPARSE_FORMATS)):
        if found not in known:
            raise CheckpointError(
                f"{path} is in the format {found}, but only {', '.join(known)} are read; {remedy}"
            )
    if quantization.get("kv_cache_scheme"):
        raise CheckpointError(f"{path} has scales for a quantised KV cache; {remedy}")
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        is_packed = (group.get("format") or form) in PACKED_FORMATS  # a head may have its own
        strategies = ("channel", "tensor", "group") if is_packed else ("channel", "tensor")
        if weights.get("symmetric") is False:
            raise CheckpointError(
                f"{path} is quantised asymmetrically, which is not read; {remedy}"
            )
        if (strategy := weights.get("strategy", "channel")) not in strategies:
            raise CheckpointError(
                f"{path} has a scale for each {strategy} of a weight, but only one for each "
                f"{' or '.join(strategies)} is read; {remedy}"
            )
        kind, num_bits = weights.get("type", "int"), weights.get("num_bits")
        if is_packed and (kind != "int" or num_bits not in (4, 8)):
            raise CheckpointError(
                f"{path} has weights of type {kind} in {num_bits} bits, packed, but only int in 4 "
                f"or 8 bits is read; {remedy}"
            )


def weights_of(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """How each of the config_groups quantises its weights."""
    groups = (quantization.get("config_groups") or {}).values()
    return [group.get("weights") or {} for group in groups]
