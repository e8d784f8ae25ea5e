"""A model directory on disk -> its tensors by name, its record, and which linears are targets."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cast_serve.checkpoint.record import (
    CAST_JSON,
    CheckpointError,
    check_listed,
    read_json,
    read_record,
    shards,
)
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern
from cast_serve.sparsity.targets import find_targets


class ModelDirectory:
    """A model directory for reading; tensors are loaded only by `get`.

    Attributes:
        kind: dense, pruned, gated or compressed.
        pattern: N:M of the record; 2:4 if there is none.
        config: config.json.
        record: cast.json, after the shards that it lists were checked; empty if there is none.
        files: shard by tensor name.
        linears: every linear of the model, and whether it stores its weight transposed (GPT-2).
        targets: the linears that are sparse, or by `find_targets` would be.
        head: the output layer's module name; None if the model has none.
        tied_embedding: the embedding's module name if the output layer shares its weight.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or is quantised in another format.
        PatternError: if no linear can have the pattern.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds no model: there is no config.json; name an HF directory"
            )
        self.path = path
        self.config = read_json(path / "config.json")
        self.files = tensor_files(path)
        self.record = read_record(path) if (path / CAST_JSON).is_file() else {}
        check_listed(path, self.record)
        model = _meta_model(path)
        self.linears = _linears(model)
        is_compressed = any(name.endswith(".compressed") for name in self.files)
        self.kind = "compressed" if is_compressed else self.record.get("kind", "dense")
        self.pattern = (
            Pattern(int(self.record["n"]), int(self.record["m"])) if self.record else TWO_FOUR
        )
        self.targets: list[str] = self.record.get("targets") or list(
            find_targets(model, self.pattern)[0]
        )
        self.head = _name_of(model, model.get_output_embeddings())
        is_tied = model.config.get_text_config().tie_word_embeddings
        self.tied_embedding = _name_of(model, model.get_input_embeddings()) if is_tied else None
        if not is_compressed and "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise CheckpointError(
                f"{path} is quantised ({method}); convert starts from bf16, fp16 or fp32"
            )

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: if there is none of that name.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it, as I8 or BF16; reads only the file's header."""
        with safe_open(self.files[name], framework="pt") as tensors:
            return str(tensors.get_slice(name).get_dtype())

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that a module stores, by the last word of their names."""
        return {
            part: self.get(file)
            for file in self.files
            for module, _, part in [file.rpartition(".")]
            if module == name
        }

    @property
    def quantized(self) -> str | None:
        """``int8`` if the values of a compressed linear are; float8 is not read here."""
        compressed = (name for name in self.files if name.endswith(".compressed"))
        return "int8" if any(self.dtype(name) == "I8" for name in compressed) else None

    @property
    def head_dtype(self) -> str | None:
        """``int8`` if the output layer is stored so."""
        name = f"{self.head}.weight"
        return "int8" if name in self.files and self.dtype(name) == "I8" else None


def tensor_files(directory: Path) -> dict[str, Path]:
    """Shard by tensor name; reads only file headers.

    Raises:
        CheckpointError: if there is none.
    """
    files: dict[str, Path] = {}
    for shard in shards(directory):
        with safe_open(shard, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), shard)
    if not files:
        raise CheckpointError(
            f"{directory} has no *.safetensors; save the model with safetensors first"
        )
    return files


def _meta_model(directory: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _linears(model: torch.nn.Module) -> dict[str, bool]:
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind == "Conv1D" for name, kind in kinds.items() if kind in ("Linear", "Conv1D")}


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)
