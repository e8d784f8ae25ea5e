"""A model directory on disk -> its tensors by name, its record, and which linears are targets."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cast_serve.checkpoint.record import (
    CAST_JSON,
    GATED_METHOD,
    CheckpointError,
    check_listed,
    read_json,
    read_record,
    shards,
)
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern
from cast_serve.sparsity.targets import find_targets

OLD_KEY = "compression_config"  # of config.json, in place of quantization_config
EIGHT_BITS = {"I8": "int8", "F8_E4M3": "float8"}  # safetensors' names
FORMATS = ("dense", "int-quantized", "float-quantized")
INT4_FORMAT = "pack-quantized"  # read if the zeros are not stored
BITMASK_FORMAT = "sparse-24-bitmask"
SPARSE_FORMATS = ("dense", BITMASK_FORMAT)


class ModelDirectory:
    """A model directory for reading; tensors are loaded only by `get`.

    Attributes:
        kind: dense, pruned, gated, compressed, or quantised: by another program, zeros stored.
        pattern: N:M of the record; 2:4 if there is none.
        config: config.json.
        quantization: what it says of compression and quantisation; empty if nothing.
        record: cast.json, after the shards that it lists were checked; empty if there is none.
        files: shard by tensor name.
        linears: every linear of the model, and whether it stores its weight transposed (GPT-2).
        targets: the linears that are sparse, or by `find_targets` would be.
        quantized: int8, int4 or float8 if the weights of targets are, else None.
        is_foreign: whether it is quantised or compressed otherwise than `convert` writes it.
        head: the output layer's module name; None if the model has none.
        tied_embedding: the embedding's module name if the output layer shares its weight.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or is quantised in a way that is not
            read.
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
        self.pattern = (
            Pattern(int(self.record["n"]), int(self.record["m"])) if self.record else TWO_FOUR
        )
        self.head = _name_of(model, model.get_output_embeddings())
        is_tied = model.config.get_text_config().tie_word_embeddings
        self.tied_embedding = _name_of(model, model.get_input_embeddings()) if is_tied else None
        self.quantization: dict[str, Any] = (
            self.config.get("quantization_config") or self.config.get(OLD_KEY) or {}
        )
        if self.quantization.get("quant_method") == GATED_METHOD:
            self.quantization = {}
        _check_quantization(path, self.quantization)
        weights = self._stored_weights()
        in_8_bits = [name for name, dtype in weights.items() if dtype in EIGHT_BITS]
        compressed = [name for name in weights if f"{name}.compressed" in self.files]
        dtypes = {EIGHT_BITS.get(weights[name]) for name in in_8_bits}
        if len(dtypes) > 1:
            raise CheckpointError(f"{path} has linears in int8 and in float8; only one can be read")
        packed = [name.removesuffix(f".{PACKED}") for name in self.files if name.endswith(PACKED)]
        if packed and in_8_bits:
            raise CheckpointError(
                f"{path} has linears in 4 bits and in 8 bits, such as {packed[0]} and "
                f"{in_8_bits[0]}; only one can be read"
            )
        compressed += packed
        self.quantized: str | None = "int4" if packed else dtypes.pop() if dtypes else None
        if compressed:
            self.kind = "compressed"
        else:
            self.kind = "quantised" if in_8_bits else self.record.get("kind", "dense")
        found = sorted({*compressed, *in_8_bits})
        self.targets: list[str] = self.record.get("targets") or (
            found or list(find_targets(model, self.pattern)[0])
        )
        self.is_foreign = OLD_KEY in self.config or any(
            f"{name}.weight" in self.files
            or f"{name}.input_scale" in self.files
            or weights[name].startswith("F8")
            or self._shape(f"{name}.weight_scale")[1:] != [1]
            for name in in_8_bits
        )

    def _stored_weights(self) -> dict[str, str]:
        """The dtype of each linear's weight but the output layer's, as safetensors names it.

        Raises:
            CheckpointError: if another module is in 8 bits, or one in 8 bits of another kind.
        """
        weights: dict[str, str] = {}
        for name in self.files:
            module, _, part = name.rpartition(".")
            if part not in ("weight", "compressed"):
                continue
            dtype = self.dtype(name)
            is_inner_linear = module in self.linears and module != self.head
            if is_inner_linear:
                weights[module] = dtype
            readable = EIGHT_BITS if is_inner_linear else {"I8"} if module == self.head else ()
            if (dtype == "I8" or dtype.startswith("F8")) and dtype not in readable:
                raise CheckpointError(
                    f"{self.path}: {name} is {dtype}, but only linears are read in I8 and F8_E4M3, "
                    "and the output layer in I8; leave it out of the quantisation"
                )
        return weights

    def _shape(self, name: str) -> list[int]:
        """Of a tensor, from the file's header; empty if there is none."""
        if name not in self.files:
            return []
        with safe_open(self.files[name], framework="pt") as tensors:
            return list(tensors.get_slice(name).get_shape())

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
    def model_dtype(self) -> torch.dtype:
        """What config.json says; bf16 if it says nothing."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return {"float16": torch.float16, "float32": torch.float32}.get(name, torch.bfloat16)

    @property
    def scale_group(self) -> int | None:
        """The columns that share a scale, as config.json says; None if rows or weights do."""
        groups = (self.quantization.get("config_groups") or {}).values()
        sizes = [(group.get("weights") or {}).get("group_size") for group in groups]
        return next((size for size in sizes if size), None)

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
    for key in ("quantization_config", OLD_KEY):
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _linears(model: torch.nn.Module) -> dict[str, bool]:
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind == "Conv1D" for name, kind in kinds.items() if kind in ("Linear", "Conv1D")}


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _check_quantization(path: Path, quantization: dict[str, Any]) -> None:
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
    is_int4 = quantization.get("format") == INT4_FORMAT and sparse_format == BITMASK_FORMAT
    for found, known in (
        (quantization.get("format") or "dense", (*FORMATS, INT4_FORMAT) if is_int4 else FORMATS),
        (sparse_format, SPARSE_FORMATS),
    ):
        if found not in known:
            raise CheckpointError(
                f"{path} is in the format {found}, but only {', '.join(known)} are read; {remedy}"
            )
    if quantization.get("kv_cache_scheme"):
        raise CheckpointError(f"{path} has scales for a quantised KV cache; {remedy}")
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("symmetric") is False:
            raise CheckpointError(
                f"{path} is quantised asymmetrically, which is not read; {remedy}"
            )
        strategies = ("channel", "tensor", "group") if is_int4 else ("channel", "tensor")
        if (strategy := weights.get("strategy", "channel")) not in strategies:
            raise CheckpointError(
                f"{path} has a scale for each {strategy} of a weight, but only one for each "
                f"channel or tensor is read; {remedy}"
            )
