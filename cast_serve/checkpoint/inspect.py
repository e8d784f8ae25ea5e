"""A model directory -> its kind, layers and bytes; every group of compressed linears is checked."""

import logging
from pathlib import Path
from typing import Any

from cast_serve.checkpoint.declared import MARLIN, RAGGED, quantization_of
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.head import QuantizedHead
from cast_serve.checkpoint.linear import CompressedLinear, check_integers
from cast_serve.checkpoint.record import SCALES_TRAINED, CheckpointError, kept_in_words, read_json
from cast_serve.checkpoint.stored import shape_of, tensor_files
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import (
    INT4_SCALE_GROUPS,
    MAX_INT4,
    MAX_INTEGER,
    SCALES_TAKEN_OVER,
)

logger = logging.getLogger(__name__)


def inspect(path: Path) -> dict[str, Any]:
    """What a directory holds; verifies every group and scale of every compressed linear.

    Returns:
        kind (dense, pruned, gated or compressed), pattern (as 2:4, or 16-40:64), quantized
        (int8, int4 or None: the values of the compressed linears), head (int8, int4 or None: the
        output layer), scale_group (of int4 linears, the columns that share a scale, else None),
        num_sparse_layers, num_dense_layers;
        of the targets, and of what training left dense for fewer zeros than the pattern has: zeros
        (their share; None if nothing is pruned), linear_weight_bytes (with bitmasks and scales),
        dense_linear_weight_bytes (in the model's dtype), linear_bytes_ratio and bits_per_weight
        (bits stored for each weight, zeros counted); total_weight_bytes; and the quality that
        training wrote to cast.json: quality, or quality_before_quantizing if that came after it.

    Raises:
        CheckpointError: if the directory cannot be read, or a scale is missing or damaged.
        PatternError: if a compressed linear is damaged.
    """
    directory = ModelDirectory(path)
    if directory.kind in ("quantised", "ragged"):
        raise CheckpointError(
            f"{path} is {directory.kind}, in the form of another program; convert it first "
            "(cast-serve convert SRC OUT)"
        )
    scales = (directory.record.get("quantization") or {}).get("scales", SCALES_TAKEN_OVER)
    is_quantized_here = scales != SCALES_TAKEN_OVER
    kept_dense = directory.record.get("kept_dense") or []
    without_values = set(directory.targets) if directory.kind == "compressed" else set()
    num_sparse = num_weights = num_kept = sparse_bytes = dense_bytes = total_bytes = 0
    head = directory.head_dtype
    for name in directory.files:
        linear, _, part = name.rpartition(".")
        if part in ("compressed", PACKED) and not (head and linear == directory.head):
            pattern = directory.pattern_of(linear)
            compressed = CompressedLinear.from_parts(linear, directory.parts(linear), pattern)
            if compressed.scale is not None and is_quantized_here:
                check_integers(name, compressed.values, MAX_INT4 if part == PACKED else MAX_INTEGER)
            num_sparse += 1
            without_values.discard(linear)
            num_weights += compressed.num_weights
            num_kept += compressed.values.numel()
            sparse_bytes += compressed.nbytes
            dense_bytes += compressed.dense_nbytes
            total_bytes += compressed.values_nbytes
            continue
        tensor = directory.get(name)
        total_bytes += tensor.nbytes
        if part == "weight" and (linear in directory.targets or linear in kept_dense):
            num_weights += tensor.numel()
            zeros_of = 0.0 if linear in kept_dense else directory.pattern_of(linear).zeros
            num_kept += round(tensor.numel() * (1 - zeros_of))
            sparse_bytes += tensor.nbytes
            dense_bytes += tensor.nbytes
    if without_values:
        raise CheckpointError(
            f"{path} lacks the values of {sorted(without_values)[:5]}; the checkpoint is damaged: "
            "copy the directory again"
        )
    zeros = None
    if num_weights and directory.kind != "dense":
        zeros = round(1 - num_kept / num_weights, 4)
    quality = directory.record.get("quality")
    if head:
        name = str(directory.head)
        stored = QuantizedHead.from_parts(name, directory.parts(name))
        if is_quantized_here:
            stored.check_integers()
    if scales == SCALES_TRAINED and not head:  # training measured just this
        is_quantized_here = False
    return {
        "kind": directory.kind,
        "pattern": _described(directory) if directory.kind != "dense" else None,
        "quantized": directory.quantized,
        "head": head,
        "scale_group": directory.form.scale_group,
        "num_sparse_layers": num_sparse,
        "num_dense_layers": len(directory.linears) - num_sparse,
        "zeros": zeros,
        "linear_weight_bytes": sparse_bytes,
        "dense_linear_weight_bytes": dense_bytes,
        "linear_bytes_ratio": round(sparse_bytes / dense_bytes, 4) if dense_bytes else None,
        "bits_per_weight": round(8 * sparse_bytes / num_weights, 4) if num_weights else None,
        "total_weight_bytes": total_bytes,
        "quality": None if is_quantized_here else quality,
        "quality_before_quantizing": quality if is_quantized_here else None,
    }


def _described(directory: ModelDirectory) -> str:
    if not directory.kept_of_64:
        return str(directory.pattern)
    return kept_in_words(directory.pattern_of(name).stored.n for name in directory.targets)


def count_sparse(path: Path) -> tuple[int, bool]:
    """How many linears of a model directory are served sparse, and whether with stored zeros.

    Reads file headers, and the first weight where another program stored 8-bit weights with their
    zeros: if that is 2:4 all must be, which is checked when they are loaded. 2:4 weights with their
    zeros in bf16, fp16 or fp32, such as a dense twin's, count as dense.

    Raises:
        CheckpointError: if there is no shard, or a scale is missing or damaged or of a shape that
            does not belong to its weight.
    """
    files = tensor_files(path)
    if any(name.endswith(".row_offsets") for name in files):
        raise CheckpointError(
            f"{path} is in the format {RAGGED}, which vLLM does not serve any more; "
            "convert it first (cast-serve convert SRC OUT)"
        )
    for part in ("compressed", PACKED):
        stored = [name.removesuffix(f".{part}") for name in files if name.endswith(f".{part}")]
        compressed = [name for name in stored if f"{name}.bitmask" in files]
        if compressed:
            _check_scale_shapes(files, compressed, part)
            return len(compressed), False
    quantization = quantization_of(path, read_json(path / "config.json"))
    if quantization.get("format") == MARLIN:
        raise CheckpointError(
            f"{path} is in the format {MARLIN}, which vLLM does not serve any more; "
            "convert it first (cast-serve convert SRC OUT)"
        )
    if quantization.get("format") not in ("int-quantized", "float-quantized"):
        return 0, False
    try:
        directory = ModelDirectory(path)
    except ValueError as error:  # transformers' too, of a model that it does not know
        logger.warning("served by vLLM itself, not 2:4-sparse: %s", error)
        return 0, False
    first = directory.targets[0]
    try:
        directory.target(first)
    except PatternError as error:
        logger.info("served by vLLM itself, since it is not 2:4: %s", error)
        return 0, False
    _check_scale_shapes(files, directory.targets, "weight")
    return len(directory.targets), True


def _check_scale_shapes(files: dict[str, Path], linears: list[str], part: str) -> None:
    """Refuses scales of another shape than their weight's has; reads only file headers."""
    for name in linears:
        if f"{name}.weight_scale" not in files:
            continue  # of a weight that is not quantised, or refused when it is loaded
        scale, weight = (shape_of(files, f"{name}.{tensor}") for tensor in ("weight_scale", part))
        wanted = [[*weight[:1], 1], [1]]
        bitmask = shape_of(files, f"{name}.bitmask")
        if part == PACKED and len(bitmask) == 2:  # a byte of 8 columns, the last maybe of 4
            wanted = [[bitmask[0], -(-bitmask[1] * 8 // group)] for group in INT4_SCALE_GROUPS]
        if scale not in wanted and (scale or part == PACKED):
            raise CheckpointError(
                f"{name}.weight_scale is {scale}, but {' or '.join(map(str, wanted))} belongs to "
                f"{name}.{part}, which is {weight}; copy the directory again, or start from the "
                "checkpoint that it was made from"
            )
