"""A model directory on disk -> its tensors by name, its record and the linears of its model."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cast_serve.checkpoint.architecture import linears_of, meta_model, name_of
from cast_serve.checkpoint.declared import (
    Structure,
    check_declared,
    quantization_of,
    structure_of,
)
from cast_serve.checkpoint.record import (
    CAST_JSON,
    GATED_METHOD,
    CheckpointError,
    check_listed,
    pattern_of,
    read_json,
    read_record,
    shards,
)
from cast_serve.checkpoint.shard import check_contained, each_tensor, opened
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.targets import find_targets

EIGHT_BITS = {"I8": "int8", "F8_E4M3": "float8"}  # safetensors' names


class StoredModel:
    """A model directory for reading, whatever the form of its weights; `get` loads a tensor.

    Attributes:
        pattern: N:M of the record, or else of config.json; if neither says, as asked for, or 2:4.
        kept_of_64: N by name, of the linears that differ from it.
        config: config.json.
        quantization: what it says of compression and quantisation; empty if nothing.
        record: cast.json, after the shards that it lists were checked; empty if there is none.
        files: shard by tensor name.
        part_names: by module, the last words of its tensors' names.
        linears: every linear of the model, and whether it stores its weight transposed (GPT-2).
        candidates: the linears that can have the pattern.
        head: the output layer's module name; None if the model has none.
        tied_embedding: the embedding's module name if the output layer shares its weight.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or is quantised in a way that is not
            read.
        PatternError: if no linear can have the pattern.
    """

    def __init__(self, path: Path, pattern: Pattern | None = None) -> None:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds no model: there is no config.json; name an HF directory"
            )
        check_contained(path)
        self.path = path
        self.config = read_json(path / "config.json")
        self.files = tensor_files(path)
        self.part_names: dict[str, list[str]] = {}
        for name in self.files:
            module, _, part = name.rpartition(".")
            self.part_names.setdefault(module, []).append(part)
        self.record = read_record(path) if (path / CAST_JSON).is_file() else {}
        check_listed(path, self.record)
        self._model = meta_model(path, len(self.files))
        self.linears = linears_of(self._model)
        self.head = name_of(self._model, self._model.get_output_embeddings())
        is_tied = self._model.config.get_text_config().tie_word_embeddings
        embedding = name_of(self._model, self._model.get_input_embeddings())
        self.tied_embedding = embedding if is_tied else None
        self._check_complete()
        self.quantization = quantization_of(path, self.config)
        if self.quantization.get("quant_method") == GATED_METHOD:
            self.quantization = {}
        try:
            check_declared(path, self.quantization)
        except (AttributeError, TypeError):  # an object is expected, and something else found
            raise CheckpointError(
                f"{path}/config.json: quantization_config is malformed: {self.quantization!s:.300}"
            ) from None
        said = self._said()
        self.pattern, self.kept_of_64 = said.pattern, said.kept_of_64
        if pattern is not None and pattern != self.pattern:
            declared = structure_of(path, self.quantization)
            if declared is not None or self.record.get("m") is not None:
                raise CheckpointError(
                    f"{path} is {self.pattern} by its cast.json or config.json, but --sparsity is "
                    f"{pattern}; leave it out"
                )
            self.pattern = pattern

    def _said(self) -> Structure:
        """Raises CheckpointError if cast.json and config.json say different things."""
        n, m = pattern_of(self.record)
        recorded = Structure(Pattern(n, m), self.record.get("kept_of_64") or {})
        declared = structure_of(self.path, self.quantization)
        if declared is None:
            return recorded
        if self.record.get("m") is None:
            return declared
        if recorded.pattern.stored != declared.pattern or dict(recorded.kept_of_64) != dict(
            declared.kept_of_64
        ):
            raise CheckpointError(
                f"{self.path}: cast.json says {recorded.pattern}, which is stored as "
                f"{recorded.pattern.stored}, but config.json says {declared.pattern}"
                f"{', or another kept_of_64' if recorded.kept_of_64 else ''}; copy both again"
            )
        return recorded

    def pattern_of(self, name: str) -> Pattern:
        """A linear's pattern."""
        return Structure(self.pattern, self.kept_of_64).of(name)

    def in_features(self, name: str) -> int:
        """Of a linear of the model."""
        return int(self._model.get_submodule(name).weight.shape[0 if self.linears[name] else 1])

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A linear's weight, gate or mask as stored -> [out_features, in_features], or back."""
        return tensor.T.contiguous() if self.linears[name] else tensor

    def num_weights(self, name: str) -> int:
        """Of a linear of the model, zeros counted."""
        return int(self._model.get_submodule(name).weight.numel())

    def _check_complete(self) -> None:
        """Refuses a directory that lacks what the model needs, such as one without its last shard.

        A directory that also holds what the model does not know uses other names, and is not judged
        here.

        Raises:
            CheckpointError: naming a tensor that is missing.
        """
        modules = {name for name, _ in self._model.named_modules()}
        if self.part_names.keys() - modules:
            return
        missing = [
            name
            for name, _ in self._model.named_parameters()
            if name not in self.files
            and not (name.endswith(".weight") and name.removesuffix(".weight") in self.part_names)
            and not (self.tied_embedding and name == f"{self.head}.weight")
        ]
        if missing:
            raise CheckpointError(
                f"{self.path} has no tensor {missing[0]}, and lacks {len(missing)} in all, which "
                "its config.json asks for; copy the whole directory again"
            )

    @cached_property
    def candidates(self) -> list[str]:
        return list(find_targets(self._model, self.pattern)[0])

    @cached_property
    def weight_dtypes(self) -> dict[str, str]:
        """The dtype of each linear's weight but the output layer's, as safetensors names it.

        Raises:
            CheckpointError: if another module is in 8 bits or packed, or one in 8 bits of another
                kind.
        """
        weights: dict[str, str] = {}
        for name in self.files:
            module, _, part = name.rpartition(".")
            is_inner_linear = module in self.linears and module != self.head
            is_head_in_words = module == self.head and self.head_dtype == "int4"
            if part == PACKED and not (is_inner_linear or is_head_in_words):
                raise CheckpointError(
                    f"{self.path}: {name} is packed, but only linears other than the output layer "
                    "are read so where zeros are stored; leave it out of the quantisation"
                )
            if part not in ("weight", "compressed"):
                continue
            dtype = self.dtype(name)
            if is_inner_linear:
                weights[module] = dtype
            readable = EIGHT_BITS if is_inner_linear else {"I8"} if module == self.head else ()
            if (dtype == "I8" or dtype.startswith("F8")) and dtype not in readable:
                raise CheckpointError(
                    f"{self.path}: {name} is {dtype}, but only linears are read in I8 and F8_E4M3, "
                    "and the output layer in I8; leave it out of the quantisation"
                )
        return weights

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: if there is none of that name.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        with opened(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it, as I8 or BF16; reads only the file's header."""
        with opened(self.files[name]) as tensors:
            return str(tensors.get_slice(name).get_dtype())

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that a module stores, by the last word of their names."""
        return {part: self.get(f"{name}.{part}") for part in self.part_names.get(name, ())}

    @property
    def model_dtype(self) -> torch.dtype:
        """What config.json says; bf16 if it says nothing."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return {"float16": torch.float16, "float32": torch.float32}.get(str(name), torch.bfloat16)

    @property
    def in_words(self) -> list[str]:
        """The modules whose integers are packed, but the output layer."""
        names = (name for name, parts in self.part_names.items() if PACKED in parts)
        return [name for name in names if name != self.head]

    @property
    def head_dtype(self) -> str | None:
        """``int8`` or ``int4`` if the output layer is stored so; int4 only beside bitmasks."""
        parts = self.part_names.get(str(self.head), [])
        if PACKED in parts and "bitmask" not in parts:
            has_bitmasks = any("bitmask" in others for others in self.part_names.values())
            return "int4" if has_bitmasks else None
        return "int8" if "weight" in parts and self.dtype(f"{self.head}.weight") == "I8" else None


def tensor_files(directory: Path) -> dict[str, Path]:
    """Shard by tensor name; reads only file headers.

    Raises:
        CheckpointError: if there is none, or a tensor stands in two.
    """
    files = {name: path for name, path, _ in each_tensor(shards(directory))}
    if not files:
        raise CheckpointError(
            f"{directory} has no *.safetensors; save the model with safetensors first"
        )
    return files


def shape_of(files: Mapping[str, Path], name: str) -> list[int]:
    """Of a tensor of `tensor_files`, from the file's header; empty if there is none."""
    if name not in files:
        return []
    with opened(files[name]) as tensors:
        return list(tensors.get_slice(name).get_shape())
