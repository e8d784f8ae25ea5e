"""A compressed directory -> the model with its zeros, dense, computing what is served."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.checkpoint.architecture import empty_model
from cast_serve.checkpoint.declared import (
    BITMASK_24,
    BITMASK_64,
    quantization_of,
    structure_of,
)
from cast_serve.checkpoint.head import QuantizedHead
from cast_serve.checkpoint.linear import PARTS, CompressedLinear
from cast_serve.checkpoint.record import (
    CheckpointError,
    read_json,
    shards,
)
from cast_serve.checkpoint.shard import each_tensor
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.quantize import rounded
from cast_train.checkpoint import conv1d


def load_compressed(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A directory of bitmasks, decompressed into the dense model.

    int8 and int4 weights are dequantised, and the activations that they multiply are rounded as
    they are where the model is served (sparsity/quantize.py): the quality found here is that of
    serving.

    Raises:
        CheckpointError: if it is missing, of another format, or lacks tensors, or a scale is
            damaged.
        PatternError: if a bitmask is damaged.
    """
    found = quantization_of(directory, read_json(directory / "config.json"))
    structure = structure_of(directory, found)
    if structure is None:
        method = found.get("sparsity_config", found).get("format")
        raise CheckpointError(
            f"{directory} is compressed as {method!r}, not as {BITMASK_24} or {BITMASK_64}; "
            "convert it first (cast-serve convert SRC OUT)"
        )
    model = conv1d.to_linears(empty_model(directory, dtype))
    modules = {name for name, _ in model.named_modules()}
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, _, shard in each_tensor(shards(directory)):
        name, _, part = key.rpartition(".")
        tensor = shard.get_tensor(key)
        if part in (*PARTS, PACKED, "weight_scale", "weight_shape"):
            parts.setdefault(name, {})[part] = tensor
        else:
            state[key] = tensor
    state = conv1d.transposed(model, state)
    for name, found_parts in parts.items():
        key = f"{name}.weight"
        if name not in modules:
            raise CheckpointError(f"{directory} holds {name}, which its config.json does not know")
        if "weight_scale" in found_parts:
            model.get_submodule(name).register_forward_pre_hook(_round_activations)
        if key in state or "weight_shape" in found_parts:  # a dense output layer of integers
            dense = {"weight": state[key]} if key in state else {}
            state[key] = QuantizedHead.from_parts(name, found_parts | dense).dense(dtype)
            continue
        linear = CompressedLinear.from_parts(name, found_parts, structure.of(name))
        state[key] = linear.dense(dtype)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # naming the tensor and both shapes
        raise CheckpointError(f"{directory}: {error}; copy the whole directory again") from error
    is_tied = model.config.get_text_config().tie_word_embeddings
    tied = set(model._tied_weights_keys or ()) if is_tied else set()
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            f"{directory} lacks {sorted(set(missing) - tied)} or holds unknown {sorted(unexpected)}"
        )
    model.tie_weights()
    return model


def _round_activations(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (rounded(inputs[0]),)
