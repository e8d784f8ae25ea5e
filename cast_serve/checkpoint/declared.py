"""config.json -> what it says of compression and quantisation; what is not read is refused."""

from pathlib import Path
from typing import Any

from cast_serve.checkpoint.record import CheckpointError

OLD_KEY = "compression_config"  # of config.json, in place of quantization_config
PACK_QUANTIZED = "pack-quantized"
MARLIN = "marlin-24"
PACKED_FORMATS = (PACK_QUANTIZED, MARLIN)
FORMATS = ("dense", "int-quantized", "float-quantized", *PACKED_FORMATS)
SPARSE_FORMATS = ("dense", "sparse-24-bitmask")


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of compression and quantisation; empty if nothing.

    Raises:
        CheckpointError: if that is no object.
    """
    found = config.get("quantization_config") or config.get(OLD_KEY) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}/config.json: quantization_config is {found!r:.100}")
    return found


def check_declared(path: Path, quantization: dict[str, Any]) -> None:
    """Refuses what is quantised or compressed in a way that is not read.

    Raises:
        CheckpointError: naming it.
    """
    if not quantization:
        return
    remedy = "start from the checkpoint that it was made of, in bf16, fp16 or fp32"
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
    is_packed = form in PACKED_FORMATS
    strategies = ("channel", "tensor", "group") if is_packed else ("channel", "tensor")
    for weights in weights_of(quantization):
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
