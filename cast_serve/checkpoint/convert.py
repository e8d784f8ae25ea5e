"""A gated or already N:M directory -> hardened weights -> a compressed directory, by shards.

Hardening keeps the N largest gates of each group and writes zeros for the rest. Every group of
every target is verified, in what is read and in what was written; the output appears under its
name only when it is whole. Layout of the output: bitmask.py, and ``quantization_config`` and
``cast.json`` as others and we read them. ``cast.json`` keeps what training wrote, its ``source``
(hashes of model, text and teacher) included, and adds ``converted_from``: the sha256 of every shard
that was converted. Up to 0.1.0's first conversions ``source`` held the latter.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cast_serve.sparsity.bitmask import compress, unpack_mask
from cast_serve.sparsity.pattern import (
    TWO_FOUR,
    CheckpointError,
    Pattern,
    PatternError,
    check_weight,
    hard_mask,
    sha256,
)
from cast_serve.sparsity.targets import find_targets

FORMAT_VERSION = 1
CAST_JSON = "cast.json"

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
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; remove it or name another directory")
    reader = _Reader(source)
    if reader.kind == "compressed":
        raise CheckpointError(f"{source} is compressed already; serve it as it is")
    if reader.pattern != TWO_FOUR:
        raise PatternError(
            f"{source} is {reader.pattern}, but only 2:4 has compressed weights and kernels; "
            "serve it dense, or train with --sparsity 2:4"
        )
    with _new_folder(out) as compressed, _new_folder(dense_twin) as dense:
        _write(reader, compressed, dense, progress or (lambda done, total: None))
        summary = inspect(compressed)
    return summary


def inspect(folder: Path) -> dict[str, Any]:
    """What a directory holds; verifies every group of every compressed linear.

    Returns:
        kind (dense, pruned, gated or compressed), pattern, num_sparse_layers, num_dense_layers,
        linear_weight_bytes, dense_linear_weight_bytes, linear_bytes_ratio, total_weight_bytes, and
        whatever quality cast.json has.

    Raises:
        CheckpointError: if the directory cannot be read.
        PatternError: if a compressed linear is damaged.
    """
    reader = _Reader(folder)
    num_sparse = sparse_bytes = dense_bytes = total_bytes = 0
    for name in reader.names:
        tensor = reader.get(name)
        total_bytes += tensor.nbytes
        linear, _, part = name.rpartition(".")
        if part == "compressed":
            bitmask = reader.get(f"{linear}.bitmask")
            _, in_features = reader.get(f"{linear}.shape").flatten().tolist()
            unpack_mask(bitmask, in_features, linear)
            num_sparse += 1
            sparse_bytes += tensor.nbytes + bitmask.nbytes
            dense_bytes += tensor.nbytes * 2
        elif part == "weight" and linear in reader.targets:
            sparse_bytes += tensor.nbytes
            dense_bytes += tensor.nbytes
    return {
        "kind": reader.kind,
        "pattern": str(reader.pattern) if reader.kind != "dense" else None,
        "num_sparse_layers": num_sparse,
        "num_dense_layers": len(reader.linears) - num_sparse,
        "linear_weight_bytes": sparse_bytes,
        "dense_linear_weight_bytes": dense_bytes,
        "linear_bytes_ratio": round(sparse_bytes / dense_bytes, 4) if dense_bytes else None,
        "total_weight_bytes": total_bytes,
        "quality": reader.cast.get("quality"),
    }


def check_converted(source: Path, out: Path) -> None:
    """Refuses an output that was converted from other shards than the source has now.

    Args:
        source: a directory as `convert` takes it.
        out: a directory that `convert` made.

    Raises:
        CheckpointError: naming the shards that differ.
    """
    recorded = _read_json(out / CAST_JSON).get("converted_from")
    remedy = f"remove {out} and convert {source} again, or name another directory"
    if recorded is None:
        raise CheckpointError(
            f"{out / CAST_JSON} has no converted_from, so it is not known what {out} was "
            f"converted from (an earlier release did not write it); {remedy}"
        )
    found = {file.name: sha256(file) for file in sorted(source.glob("*.safetensors"))}
    differ = [f for f in sorted(found | recorded) if found.get(f) != recorded.get(f)]
    if differ:
        raise CheckpointError(
            f"{out} was not converted from what {source} holds now: {', '.join(differ)} "
            f"differ; {remedy}"
        )


def count_compressed(folder: Path) -> int:
    """How many linears of a model directory are compressed on disk; reads only file headers."""
    return sum(name.endswith(".compressed") for name in _tensor_files(folder))


class _Reader:
    """A model directory: its tensors by name, its ``cast.json``, and which linears are targets."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} holds no model: there is no config.json; name an HF directory"
            )
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        self.files = _tensor_files(folder)
        self.names = list(self.files)
        self.cast = self._read_cast_json()
        model = _meta_model(folder)
        self.linears = _linears(model)
        is_compressed = any(name.endswith(".compressed") for name in self.names)
        self.kind = "compressed" if is_compressed else self.cast.get("kind", "dense")
        self.pattern = Pattern(int(self.cast["n"]), int(self.cast["m"])) if self.cast else TWO_FOUR
        self.targets: list[str] = self.cast.get("targets") or list(
            find_targets(model, self.pattern)[0]
        )
        if not is_compressed and "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise CheckpointError(
                f"{folder} is quantised ({method}); convert starts from bf16, fp16 or fp32"
            )

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}; the checkpoint is incomplete"
            )
        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def hardened(self, name: str) -> Tensor:
        """A target's weight [out_features, in_features] with exact zeros where it was dropped."""
        weight, is_transposed = self.get(f"{name}.weight"), self.linears[name]
        if is_transposed:
            weight = weight.T.contiguous()
        if self.kind != "gated":
            check_weight(weight, self.pattern, name)
            return weight
        if self.cast.get("method") == "adams":  # the weights' own sizes are its gates
            gate = weight.float().abs()
        else:
            gate = self.get(f"{name}.gate")
            gate = gate.T if is_transposed else gate
        try:
            weight = torch.where(hard_mask(gate, self.pattern), weight, torch.zeros_like(weight))
        except PatternError as error:
            raise PatternError(f"{name}.gate: {error}") from None
        if f"{name}.scale" not in self.files:
            return weight
        scale = self.get(f"{name}.scale").float()  # [out_features, column parts]
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        return (weight.float() * scale).to(weight.dtype)

    def _read_cast_json(self) -> dict[str, Any]:
        path = self.folder / CAST_JSON
        if not path.is_file():
            return {}
        cast = _read_json(path)
        if cast.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {cast.get('format_version')!r}, but this release reads "
                f"{FORMAT_VERSION}; convert it with the release that wrote it"
            )
        for file, expected in cast.get("sha256", {}).items():
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / file} is missing, but {path} lists it")
            if (found := sha256(self.folder / file)) != expected:
                raise CheckpointError(
                    f"{self.folder / file} has sha256 {found}, but {path} says {expected}; "
                    "the file was changed or damaged after it was written"
                )
        return cast


def _write(reader: _Reader, compressed: Path, dense: Path | None, progress: Progress) -> None:
    shards: dict[Path, list[str]] = {}
    for name, file in reader.files.items():
        shards.setdefault(file, []).append(name)
    targets = set(reader.targets)
    if missing := sorted(name for name in targets if f"{name}.weight" not in reader.files):
        raise CheckpointError(f"{reader.folder} has no weight for its targets {missing[:5]}")
    done = dense_bytes = sparse_bytes = 0
    written: dict[str, str] = {}
    dense_written: dict[str, str] = {}
    for file, names in shards.items():
        tensors, dense_tensors = {}, {}
        for name in names:
            linear, _, part = name.rpartition(".")
            if linear in targets and part == "weight":
                weight = reader.hardened(linear)
                values, bitmask = compress(weight, linear)
                tensors[f"{linear}.compressed"] = values
                tensors[f"{linear}.bitmask"] = bitmask
                tensors[f"{linear}.shape"] = torch.tensor([[size] for size in weight.shape])
                dense_bytes += weight.nbytes
                sparse_bytes += values.nbytes + bitmask.nbytes
                if dense:
                    dense_tensors[name] = (
                        weight.T.contiguous() if reader.linears[linear] else weight
                    )
            elif not (linear in targets and part in ("gate", "scale")):
                tensors[name] = dense_tensors[name] = reader.get(name)
            progress(done := done + 1, len(reader.names))
        if tensors:
            save_file(tensors, compressed / file.name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, file.name)
        if dense and dense_tensors:
            save_file(dense_tensors, dense / file.name, metadata={"format": "pt"})
            dense_written |= dict.fromkeys(dense_tensors, file.name)

    config = {
        **reader.config,
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
                "ignore": sorted(set(reader.linears) - targets),
                "registry_requires_subclass": False,
            },
        },
    }
    cast = {
        "method": None,
        "n": 2,
        "m": 4,
        "targets": sorted(targets),
        **{key: value for key, value in reader.cast.items() if key != "sha256"},
        "format_version": FORMAT_VERSION,
        "converted_from": {file.name: sha256(file) for file in shards},
        "dense_linear_weight_bytes": dense_bytes,
        "linear_weight_bytes": sparse_bytes,
    }
    _finish(reader.folder, compressed, written, config, {**cast, "kind": "compressed"})
    if dense:
        _finish(reader.folder, dense, dense_written, reader.config, {**cast, "kind": "pruned"})


def _finish(
    source: Path,
    folder: Path,
    written: dict[str, str],
    config: dict[str, Any],
    cast: dict[str, Any],
) -> None:
    """Copies tokenizer and the like; writes index, config and cast.json last."""
    for file in source.iterdir():
        is_ours = file.name in ("config.json", CAST_JSON) or ".safetensors" in file.name
        if file.is_file() and not is_ours and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copy2(file, folder / file.name)
    if len(set(written.values())) > 1:
        total = sum((folder / file).stat().st_size for file in set(written.values()))
        index = {"metadata": {"total_size": total}, "weight_map": written}
        _write_json(folder / "model.safetensors.index.json", index)
    cast["sha256"] = {file: sha256(folder / file) for file in sorted(set(written.values()))}
    _write_json(folder / CAST_JSON, cast)
    _write_json(folder / "config.json", config)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a container's user could not read


@contextmanager
def _new_folder(out: Path | None) -> Iterator[Any]:
    """A temporary neighbour of `out`, renamed to it on success and removed on any failure."""
    if out is None:
        yield None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _meta_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _linears(model: torch.nn.Module) -> dict[str, bool]:
    """Every linear of the model, and whether it stores its weight transposed (GPT-2)."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind == "Conv1D" for name, kind in kinds.items() if kind in ("Linear", "Conv1D")}


def _tensor_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), shard)
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors; save the model with safetensors first"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
