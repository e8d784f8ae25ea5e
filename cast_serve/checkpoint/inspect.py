"""A model directory -> its kind, layers and bytes; every group of compressed linears is checked."""

from pathlib import Path
from typing import Any

from cast_serve.checkpoint.directory import ModelDirectory, tensor_files
from cast_serve.checkpoint.linear import CompressedLinear, check_integers, check_scale
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.quantize import SCALES_TAKEN_OVER


def inspect(path: Path) -> dict[str, Any]:
    """What a directory holds; verifies every group and scale of every compressed linear.

    Returns:
        kind (dense, pruned, gated or compressed), pattern, quantized and head (int8 or None: the
        values of the compressed linears, the output layer), num_sparse_layers, num_dense_layers,
        linear_weight_bytes (of the targets, with bitmasks and scales), dense_linear_weight_bytes
        (of the targets in the model's dtype), linear_bytes_ratio, bits_per_weight (bits stored for
        each weight of the targets, zeros counted), total_weight_bytes, and the quality that
        training wrote to cast.json: quality, or quality_before_quantizing if int8 came after it.

    Raises:
        CheckpointError: if the directory cannot be read, or a scale is missing or damaged.
        PatternError: if a compressed linear is damaged.
    """
    directory = ModelDirectory(path)
    if directory.kind == "quantised":
        raise CheckpointError(
            f"{path} is quantised by another program, with its zeros stored; "
            "convert it first (cast-serve convert SRC OUT)"
        )
    scales = (directory.record.get("quantization") or {}).get("scales", SCALES_TAKEN_OVER)
    is_quantized_here = scales != SCALES_TAKEN_OVER
    num_sparse = num_weights = sparse_bytes = dense_bytes = total_bytes = 0
    for name in directory.files:
        linear, _, part = name.rpartition(".")
        if part == "compressed":
            compressed = CompressedLinear.from_parts(linear, directory.parts(linear))
            if compressed.scale is not None and is_quantized_here:
                check_integers(name, compressed.values)
            num_sparse += 1
            num_weights += compressed.num_weights
            sparse_bytes += compressed.nbytes
            dense_bytes += compressed.dense_nbytes
            total_bytes += compressed.values.nbytes
            continue
        tensor = directory.get(name)
        total_bytes += tensor.nbytes
        if part == "weight" and linear in directory.targets:
            num_weights += tensor.numel()
            sparse_bytes += tensor.nbytes
            dense_bytes += tensor.nbytes
    quality = directory.record.get("quality")
    head = directory.head_dtype
    if head:
        parts = directory.parts(str(directory.head))
        values = parts["weight"]
        check_scale(str(directory.head), parts.get("weight_scale"), values.shape[0])
        if is_quantized_here:
            check_integers(f"{directory.head}.weight", values)
    return {
        "kind": directory.kind,
        "pattern": str(directory.pattern) if directory.kind != "dense" else None,
        "quantized": directory.quantized,
        "head": head,
        "num_sparse_layers": num_sparse,
        "num_dense_layers": len(directory.linears) - num_sparse,
        "linear_weight_bytes": sparse_bytes,
        "dense_linear_weight_bytes": dense_bytes,
        "linear_bytes_ratio": round(sparse_bytes / dense_bytes, 4) if dense_bytes else None,
        "bits_per_weight": round(8 * sparse_bytes / num_weights, 4) if num_weights else None,
        "total_weight_bytes": total_bytes,
        "quality": None if is_quantized_here else quality,
        "quality_before_quantizing": quality if is_quantized_here else None,
    }


def count_compressed(path: Path) -> int:
    """How many linears of a model directory are compressed on disk; reads only file headers.

    Raises:
        CheckpointError: if there is no shard.
    """
    return sum(name.endswith(".compressed") for name in tensor_files(path))
