"""A gated or already N:M directory -> hardened weights -> a compressed directory, by shards.

Hardening keeps the N largest gates of each group and writes zeros for the rest. Every group of
every target is verified, in the input and in the output; the output appears under its name only
when it is complete. bitmask.py describes the tensors; ``quantization_config`` is that of
compressed-tensors. ``cast.json`` keeps what training wrote, with its ``source`` (hashes of model,
text and teacher), and adds ``converted_from``: the sha256 of every shard that was converted. Early
builds of 0.1.0 wrote the latter to ``source``.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.record import (
    CAST_JSON,
    CheckpointError,
    check_new,
    new_directory,
    read_record,
    sha256,
    shards,
    write_record,
)
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import TWO_FOUR, PatternError, check_weight, hard_mask

Progress = Callable[[int, int], None]  # tensors done, tensors in all


def convert(
    source: Path, out: Path, dense_twin: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the compressed directory and, if asked, its dense twin.

    Args:
        source: gated checkpoint, or an HF directory whose targets are 2:4 already.
        out: the directory to make; must not exist.
        dense_twin: a second directory to make, with the hardened weights stored densely.
        progress: called after each tensor.

    Returns:
        `inspect` of the output.

    Raises:
        CheckpointError: if the source cannot be read, or an output exists.
        PatternError: if the pattern is not 2:4, or a group of a target does not have it.
    """
    for folder in filter(None, (out, dense_twin)):
        check_new(folder)
    directory = ModelDirectory(source)
    if directory.kind == "compressed":
        raise CheckpointError(f"{source} is compressed already; serve it as it is")
    if directory.pattern != TWO_FOUR:
        raise PatternError(
            f"{source} is {directory.pattern}, but only 2:4 has compressed weights and kernels; "
            "serve it dense, or train with --sparsity 2:4"
        )
    new_twin: AbstractContextManager[Path | None] = (
        new_directory(dense_twin) if dense_twin else nullcontext()
    )
    with new_directory(out) as compressed, new_twin as dense:
        _write(directory, compressed, dense, progress or (lambda done, total: None))
        summary = inspect(compressed)
    return summary


def check_converted(source: Path, out: Path) -> None:
    """Refuses an output that was converted from other shards than the source has now.

    Args:
        source: a directory as `convert` takes it.
        out: a directory that `convert` made.

    Raises:
        CheckpointError: naming the shards that differ.
    """
    recorded = read_record(out).get("converted_from")
    remedy = f"remove {out} and convert {source} again, or name another directory"
    if recorded is None:
        raise CheckpointError(
            f"{out / CAST_JSON} has no converted_from, so it is not known what {out} was "
            f"converted from (an earlier release did not write it); {remedy}"
        )
    found = {file.name: sha256(file) for file in shards(source)}
    differ = [f for f in sorted(found | recorded) if found.get(f) != recorded.get(f)]
    if differ:
        raise CheckpointError(
            f"{out} was not converted from what {source} holds now: {', '.join(differ)} "
            f"differ; {remedy}"
        )


def _hardened(source: ModelDirectory, name: str) -> Tensor:
    """A target's weight [out_features, in_features] with exact zeros where it was dropped."""
    weight, is_transposed = source.get(f"{name}.weight"), source.linears[name]
    if is_transposed:
        weight = weight.T.contiguous()
    if source.kind != "gated":
        check_weight(weight, source.pattern, name)
        return weight
    if source.record.get("method") == "adams":  # it has no gates: |W| ranks the weights
        gate = weight.float().abs()
    else:
        gate = source.get(f"{name}.gate")
        gate = gate.T if is_transposed else gate
    try:
        weight = torch.where(hard_mask(gate, source.pattern), weight, torch.zeros_like(weight))
    except PatternError as error:
        raise PatternError(f"{name}.gate: {error}") from None
    if f"{name}.scale" not in source.files:
        return weight
    scale = source.get(f"{name}.scale").float()  # [out_features, column parts]
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return (weight.float() * scale).to(weight.dtype)


def _write(
    source: ModelDirectory, compressed: Path, dense: Path | None, progress: Progress
) -> None:
    names_of: dict[Path, list[str]] = {}
    for name, file in source.files.items():
        names_of.setdefault(file, []).append(name)
    targets = set(source.targets)
    if missing := sorted(name for name in targets if f"{name}.weight" not in source.files):
        raise CheckpointError(f"{source.path} has no weight for its targets {missing[:5]}")
    done = dense_bytes = sparse_bytes = 0
    written: dict[str, str] = {}
    dense_written: dict[str, str] = {}
    for file, names in names_of.items():
        tensors, dense_tensors = {}, {}
        for name in names:
            linear, _, part = name.rpartition(".")
            if linear in targets and part == "weight":
                weight = _hardened(source, linear)
                values, bitmask = compress(weight, linear)
                tensors[f"{linear}.compressed"] = values
                tensors[f"{linear}.bitmask"] = bitmask
                tensors[f"{linear}.shape"] = torch.tensor([[size] for size in weight.shape])
                dense_bytes += weight.nbytes
                sparse_bytes += values.nbytes + bitmask.nbytes
                if dense:
                    dense_tensors[name] = (
                        weight.T.contiguous() if source.linears[linear] else weight
                    )
            elif not (linear in targets and part in ("gate", "scale")):
                tensors[name] = dense_tensors[name] = source.get(name)
            progress(done := done + 1, len(source.files))
        if tensors:
            save_file(tensors, compressed / file.name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, file.name)
        if dense and dense_tensors:
            save_file(dense_tensors, dense / file.name, metadata={"format": "pt"})
            dense_written |= dict.fromkeys(dense_tensors, file.name)

    config = {
        **source.config,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "sparsity_structure": "2:4",
                "global_sparsity": 0.5,
                "targets": ["Linear"],
                "ignore": sorted(set(source.linears) - targets),
                "registry_requires_subclass": False,
            },
        },
    }
    record = {
        "method": None,
        "n": 2,
        "m": 4,
        "targets": sorted(targets),
        **source.record,
        "converted_from": {file.name: sha256(file) for file in names_of},
        "dense_linear_weight_bytes": dense_bytes,
        "linear_weight_bytes": sparse_bytes,
    }
    _finish(source.path, compressed, written, config, {**record, "kind": "compressed"})
    if dense:
        _finish(source.path, dense, dense_written, source.config, {**record, "kind": "pruned"})


def _finish(
    source: Path,
    folder: Path,
    written: dict[str, str],
    config: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Copies the tokenizer and other small files; writes index, config and cast.json last."""
    for file in source.iterdir():
        is_ours = file.name in ("config.json", CAST_JSON) or ".safetensors" in file.name
        if file.is_file() and not is_ours and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copy2(file, folder / file.name)
    write_record(folder, record, config=config, weight_map=written)
