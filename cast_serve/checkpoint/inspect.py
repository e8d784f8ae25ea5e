"""A model directory -> its kind, layers and bytes; every group of compressed linears is checked."""

from pathlib import Path
from typing import Any

from cast_serve.checkpoint.directory import ModelDirectory, tensor_files
from cast_serve.sparsity.bitmask import unpack_mask


def inspect(path: Path) -> dict[str, Any]:
    """What a directory holds; verifies every group of every compressed linear.

    Returns:
        kind (dense, pruned, gated or compressed), pattern, num_sparse_layers, num_dense_layers,
        linear_weight_bytes, dense_linear_weight_bytes, linear_bytes_ratio, total_weight_bytes, and
        whatever quality cast.json has.

    Raises:
        CheckpointError: if the directory cannot be read.
        PatternError: if a compressed linear is damaged.
    """
    directory = ModelDirectory(path)
    num_sparse = sparse_bytes = dense_bytes = total_bytes = 0
    for name in directory.files:
        tensor = directory.get(name)
        total_bytes += tensor.nbytes
        linear, _, part = name.rpartition(".")
        if part == "compressed":
            bitmask = directory.get(f"{linear}.bitmask")
            _, in_features = directory.get(f"{linear}.shape").flatten().tolist()
            unpack_mask(bitmask, in_features, linear)
            num_sparse += 1
            sparse_bytes += tensor.nbytes + bitmask.nbytes
            dense_bytes += tensor.nbytes * 2
        elif part == "weight" and linear in directory.targets:
            sparse_bytes += tensor.nbytes
            dense_bytes += tensor.nbytes
    return {
        "kind": directory.kind,
        "pattern": str(directory.pattern) if directory.kind != "dense" else None,
        "num_sparse_layers": num_sparse,
        "num_dense_layers": len(directory.linears) - num_sparse,
        "linear_weight_bytes": sparse_bytes,
        "dense_linear_weight_bytes": dense_bytes,
        "linear_bytes_ratio": round(sparse_bytes / dense_bytes, 4) if dense_bytes else None,
        "total_weight_bytes": total_bytes,
        "quality": directory.record.get("quality"),
    }


def count_compressed(path: Path) -> int:
    """How many linears of a model directory are compressed on disk; reads only file headers.

    Raises:
        CheckpointError: if there is no shard.
    """
    return sum(name.endswith(".compressed") for name in tensor_files(path))
