"""A model directory on disk -> its tensors by name, its record, and which linears are targets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cast_serve.checkpoint.formats.integers import FOREIGN_PARTS
from cast_serve.checkpoint.record import (
    CAST_JSON,
    GATED_METHOD,
    CheckpointError,
    check_listed,
    read_json,
    read_record,
    shards,
)
from cast_serve.checkpoint.shard import check_contained, each_tensor, opened
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, SCALE_GROUP
from cast_serve.sparsity.targets import find_targets

OLD_KEY = "compression_config"  # of config.json, in place of quantization_config
EIGHT_BITS = {"I8": "int8", "F8_E4M3": "float8"}  # safetensors' names
MARLIN = "marlin-24"
PACKED_FORMATS = ("pack-quantized", MARLIN)
FORMATS = ("dense", "int-quantized", "float-quantized", *PACKED_FORMATS)
SPARSE_FORMATS = ("dense", "sparse-24-bitmask")


class ModelDirectory:
    """A model directory for reading; tensors are loaded only by `get`.

    Attributes:
        kind: dense, pruned, gated, compressed, or quantised: by another program, with its zeros
            stored or as marlin-24.
        pattern: N:M of the record; 2:4 if there is none.
        config: config.json.
        quantization: what it says of compression and quantisation; empty if nothing.
        record: cast.json, after the shards that it lists were checked; empty if there is none.
        files: shard by tensor name.
        linears: every linear of the model, and whether it stores its weight transposed (GPT-2).
        targets: the linears that are sparse, or by `find_targets` would be.
        quantized: int8, int4 or float8 if the weights of targets are, else None.
        is_widened: whether quantised weights can only become unquantised ones: float8, and integers
            whose scale groups no kernel has.
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
        check_contained(path)
        self.path = path
        self.config = read_json(path / "config.json")
        self.files = tensor_files(path)
        self.record = read_record(path) if (path / CAST_JSON).is_file() else {}
        check_listed(path, self.record)
        model = _meta_model(path, len(self.files))
        self.linears = _linears(model)
        self.pattern = Pattern(self.record.get("n") or 2, self.record.get("m") or 4)
        self.head = _name_of(model, model.get_output_embeddings())
        is_tied = model.config.get_text_config().tie_word_embeddings
        self.tied_embedding = _name_of(model, model.get_input_embeddings()) if is_tied else None
        self._check_complete(model)
        self.quantization = quantization_of(path, self.config)
        if self.quantization.get("quant_method") == GATED_METHOD:
            self.quantization = {}
        try:
            _check_quantization(path, self.quantization)
        except (AttributeError, TypeError):  # an object is expected, and something else found
            raise CheckpointError(
                f"{path}/config.json: quantization_config is malformed: {self.quantization!s:.300}"
            ) from None
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
        parts = (name.rpartition(".") for name in self.files)
        foreign = {module for module, _, part in parts if part in FOREIGN_PARTS} & {*self.linears}
        compressed += [name for name in packed if name not in foreign]
        self.quantized: str | None = "int4" if packed else dtypes.pop() if dtypes else None
        self.is_widened = self.quantized == "float8"
        if foreign:
            self.quantized, self.is_widened = self._foreign_integers()
        self.kind = "quantised" if in_8_bits or foreign else self.record.get("kind", "dense")
        if compressed:
            self.kind = "compressed"
        found = sorted({*compressed, *in_8_bits, *foreign})
        self.targets: list[str] = self.record.get("targets") or (
            found or list(find_targets(model, self.pattern)[0])
        )
        if unknown := sorted(set(self.targets) - set(self.linears)):
            raise CheckpointError(f"{path} has targets that are no linears of its: {unknown[:5]}")
        is_other = OLD_KEY in self.config or bool(foreign)
        self.is_foreign = is_other or any(
            f"{name}.weight" in self.files
            or f"{name}.input_scale" in self.files
            or weights[name].startswith("F8")
            or shape_of(self.files, f"{name}.weight_scale")[1:] != [1]
            for name in in_8_bits
        )

    def _check_complete(self, model: torch.nn.Module) -> None:
        """Refuses a directory that lacks what the model needs, as one without its last shard does.

        A directory that also holds what the model does not know names its tensors otherwise, and
        is not judged here.

        Raises:
            CheckpointError: naming a tensor that is missing.
        """
        modules = {name for name, _ in model.named_modules()}
        stored = {name.rpartition(".")[0] for name in self.files}
        if stored - modules:
            return
        missing = [
            name
            for name, _ in model.named_parameters()
            if name not in self.files
            and not (name.endswith(".weight") and name.removesuffix(".weight") in stored)
            and not (self.tied_embedding and name == f"{self.head}.weight")
        ]
        if missing:
            raise CheckpointError(
                f"{self.path} has no tensor {missing[0]}, and lacks {len(missing)} in all, which "
                "its config.json asks for; copy the whole directory again"
            )

    def _stored_weights(self) -> dict[str, str]:
        """The dtype of each linear's weight but the output layer's, as safetensors names it.

        Raises:
            CheckpointError: if another module is in 8 bits or packed, or one in 8 bits of another
                kind.
        """
        weights: dict[str, str] = {}
        for name in self.files:
            module, _, part = name.rpartition(".")
            is_inner_linear = module in self.linears and module != self.head
            if part == PACKED and not is_inner_linear:
                raise CheckpointError(
                    f"{self.path}: {name} is packed, but only linears other than the output layer "
                    "are read so; leave it out of the quantisation"
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
        return {"float16": torch.float16, "float32": torch.float32}.get(str(name), torch.bfloat16)

    @property
    def scale_group(self) -> int | None:
        """Of 4-bit weights, the columns that share a scale when they are converted; else None.

        The largest of our scale groups that divides all that config.json names.
        """
        if self.quantized != "int4" or self.is_widened:
            return None
        sizes = [
            weights.get("group_size") or SCALE_GROUP for weights in _weights(self.quantization)
        ]
        return next((g for g in INT4_SCALE_GROUPS if all(size % g == 0 for size in sizes)), None)

    def _foreign_integers(self) -> tuple[str, bool]:
        """Which integers another program packed, and whether they can only be widened.

        Raises:
            CheckpointError: if config.json does not say it, or says several.
        """
        form = self.quantization.get("format")
        all_weights = _weights(self.quantization)
        found = {(weights.get("num_bits"), _is_widened(weights)) for weights in all_weights}
        if form not in PACKED_FORMATS or not found:
            raise CheckpointError(
                f"{self.path} holds packed weights, but its config.json says format {form!r} with "
                f"{len(found)} config_groups; {' or '.join(PACKED_FORMATS)} with one or more is "
                "needed: copy config.json again"
            )
        if len(found) > 1:
            kinds = [
                f"{weights.get('num_bits')} bits (strategy {weights.get('strategy')}, group_size "
                f"{weights.get('group_size')})"
                for weights in all_weights
            ]
            raise CheckpointError(
                f"{self.path} has linears in {' and in '.join(kinds)}; only one can be read: "
                "start from the checkpoint that it was made of"
            )
        num_bits, is_widened = found.pop()
        return f"int{num_bits}", is_widened

    @property
    def head_dtype(self) -> str | None:
        """``int8`` if the output layer is stored so."""
        name = f"{self.head}.weight"
        return "int8" if name in self.files and self.dtype(name) == "I8" else None


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


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of compression and quantisation; empty if nothing.

    Raises:
        CheckpointError: if that is no object.
    """
    found = config.get("quantization_config") or config.get(OLD_KEY) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}/config.json: quantization_config is {found!r:.100}")
    return found


def empty_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model of config.json, with weights by chance, and with the generation settings."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    settings.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        settings, dtype=dtype, attn_implementation=attention_of(settings)
    )
    if (directory / "generation_config.json").is_file():  # which `from_config` knows nothing of
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def attention_of(settings: Any) -> str | None:
    """The attention that transformers must compute a model with; None: any.

    PyTorch's fused attention leaves out Gemma2's cap of the scores, without a word.
    """
    is_capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if is_capped else None


def _meta_model(directory: Path, num_tensors: int) -> Any:
    """The model without weights, as transformers builds it of config.json.

    Raises:
        CheckpointError: if transformers cannot, or there are fewer tensors than layers: a layer
            that is not stored could be one of a billion.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        for key in ("quantization_config", OLD_KEY):
            config.__dict__.pop(key, None)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if num_layers > num_tensors:
            raise CheckpointError(f"it has {num_layers} layers, but {num_tensors} tensors")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever a foreign config.json makes it raise
        raise CheckpointError(
            f"{directory}/config.json describes no model that can be built: {error!s:.500}"
        ) from error


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
    for weights in _weights(quantization):
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


def _weights(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """How each of the config_groups quantises its weights."""
    groups = (quantization.get("config_groups") or {}).values()
    return [group.get("weights") or {} for group in groups]


def _is_widened(weights: dict[str, Any]) -> bool:
    """Whether no kernel has the scale groups of packed integers."""
    if weights.get("strategy") != "group":
        return False
    size = weights.get("group_size") or 0
    return weights["num_bits"] == 8 or size < 1 or size % min(INT4_SCALE_GROUPS) != 0
