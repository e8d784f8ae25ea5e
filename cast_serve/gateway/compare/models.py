"""A variant's directory -> its model's bits, zeros and perplexity, for the dashboard.

cast.json has the perplexity and the pattern; the headers of the shards have the bytes. No weight is
read and nothing is verified: the worker does that, and `cast-serve inspect`.
"""

import json
import logging
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cast_serve.checkpoint.record import (
    CAST_JSON,
    SCALES_TRAINED,
    CheckpointError,
    kept_in_words,
    pattern_of,
    read_json,
    read_record,
    shards,
)
from cast_serve.dtypes import DTYPE_BITS
from cast_serve.gateway.upstream.replica import Variant

logger = logging.getLogger(__name__)

PACKED = "weight_packed"  # 4-bit values, eight to a word
STORED_PARTS = ("weight", "compressed", PACKED, "bitmask", "weight_scale")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def describe(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """`describe_directory` of each variant that is served from a directory; others are empty."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        path = variant.replicas[0].model
        found[variant.name] = {} if path is None else describe_directory(path)
    return found


def describe_directory(path: Path) -> dict[str, Any]:
    """What a model directory says of itself.

    Returns:
        `path`; `model` (what it was trained from, else the directory's name); `kind`, `pattern` and
        `quantized` as cast.json has them; `zeros` (share, of the linears that were pruned or could
        have been); `bits_per_weight` (stored for each of their weights, zeros counted); `quality`
        (`perplexity`, None if it is infinite, `text`, `num_tokens`, `context_tokens` and
        `is_before_quantizing`). Each is None where it is not known; `problem` says why if the
        directory cannot be read.
    """
    found: dict[str, Any] = {
        "path": str(path),
        "model": path.resolve().name,
        **dict.fromkeys(("kind", "pattern", "quantized", "zeros", "bits_per_weight", "quality")),
        "problem": None,
    }
    try:
        record = read_record(path) if (path / CAST_JSON).is_file() else {}
        return {**found, **_told(record), **_counted(path, record)}
    except Exception as error:  # whatever the files hold: this only shows it
        problem = str(error)
        if not isinstance(error, CheckpointError):
            problem = f"{path} is not as expected ({error!r}); check it with cast-serve inspect"
        logger.warning("the dashboard cannot show a model: %s", problem)
        return {**found, "problem": problem}


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """What cast.json says; empty without one."""
    if not record:
        return {}
    kind = record.get("kind")
    quantization = record.get("quantization") or {}
    is_trained_so = quantization.get("scales") == SCALES_TRAINED and not quantization.get("head")
    found: dict[str, Any] = {
        "kind": kind,
        "pattern": None if kind == "dense" else _pattern(record),
        "quantized": quantization.get("quantize"),
    }
    source = (record.get("source") or {}).get("model")
    if isinstance(source, str):
        found["model"] = source
    quality = record.get("quality")
    if quality and "perplexity_hard" in quality:
        perplexity = float(quality["perplexity_hard"])
        found["quality"] = {
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            **{key: quality.get(key) for key in ("text", "num_tokens", "context_tokens")},
            "is_before_quantizing": found["quantized"] is not None and not is_trained_so,
        }
    return found


def _pattern(record: dict[str, Any]) -> str:
    """As `cast-serve inspect` has it."""
    n, m = record["n"], record["m"]
    if not (kept := record.get("kept_of_64")):
        return f"{n}:{m}"
    return kept_in_words(kept.get(name, n * 64 // m) for name in record["targets"])


def _counted(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Share of zeros and stored bits, of the shards' headers."""
    tensors: dict[str, Any] = {}
    for shard in shards(path):
        tensors |= _header(shard)
    compressed = {
        name.rpartition(".")[0] for name in tensors if name.endswith((".compressed", ".bitmask"))
    }
    kept_dense = set(record.get("kept_dense") or ())
    linears = {*compressed, *(record.get("targets") or ()), *kept_dense}
    num_weights = num_bytes = 0
    num_zeros = 0.0
    n, m = pattern_of(record)
    kept_of_64 = record.get("kept_of_64") or {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        if linear not in linears or part not in STORED_PARTS:
            continue
        num_bytes += tensor["data_offsets"][1] - tensor["data_offsets"][0]
        if part not in ("bitmask", "weight"):
            continue
        num = math.prod(tensor["shape"])
        num *= 8 if part == "bitmask" else 1  # of 2:4 at most 4 a row too many
        num_weights += num
        if linear not in kept_dense:
            num_zeros += num * (1 - (kept_of_64[linear] / 64 if linear in kept_of_64 else n / m))
    if not num_weights:
        return {"bits_per_weight": _dense_bits(path)}
    zeros = None
    if compressed or record.get("kind") in ("dense", "pruned"):
        zeros = 0.0 if record.get("kind") == "dense" else num_zeros / num_weights
    return {"zeros": zeros, "bits_per_weight": 8 * num_bytes / num_weights}


def _header(shard: Path) -> dict[str, Any]:
    """Tensor by name, from the first bytes of a safetensors file."""
    with shard.open("rb") as file:
        first = file.read(8)
        num_bytes = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < num_bytes <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{shard} is not a safetensors file; copy the directory again")
        header = json.loads(file.read(num_bytes))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _dense_bits(path: Path) -> int | None:
    """Of a weight in the model's dtype; None if config.json does not say, or it is quantised."""
    config = read_json(path / "config.json")
    if config.get("quantization_config"):
        return None
    return DTYPE_BITS.get(str(config.get("dtype") or config.get("torch_dtype")))
