"""What is converted, and how -> the ``quantization_config`` of config.json.

It is what compressed-tensors 0.12 writes for bf16 and int8. 4 bits are ``pack-quantized`` under the
sparsity format ``sparse-24-bitmask``: compressed-tensors packs integers so, but always with the
zeros, which takes 4.125 bits a weight in place of 3.125. N:64 is ``sparse-64-bitmask``, which is
ours alone: compressed-tensors stores other patterns than 2:4 in rows of any length. Unless
it and the linears are both of 8 bits, an output layer has a group of its own, with a format.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cast_serve.checkpoint.declared import BITMASK_24, BITMASK_64, PACK_QUANTIZED
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError, read_json
from cast_serve.sparsity.pattern import TWO_FOUR

logger = logging.getLogger(__name__)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FORMS = {"int8": "int-quantized", "int4": PACK_QUANTIZED}
# vLLM 0.32 makes their output layer without asking the quantisation for it, or has none.
NO_QUANTIZED_HEAD = ("OPTForCausalLM", "BloomForCausalLM", "Gemma2ForCausalLM")


def resolved(quantization: Quantization | None, source: Path) -> Quantization | None:
    """The same with the output layer's form decided for a model.

    Args:
        quantization: as asked for.
        source: a model directory.

    Raises:
        CheckpointError: if it has no config.json that can be read, or vLLM cannot load the form.
    """
    if quantization is None or quantization.head is None:
        return quantization
    name = _without_quantized_head(read_json(source / "config.json"))
    head = "int8" if quantization.head == "auto" else quantization.head
    if name is None:
        return quantization.with_head(head)
    if quantization.head == "auto":
        logger.warning(
            "%s: vLLM has no int8 output layer for %s; it stays unquantised", source, name
        )
        return quantization.with_head(None)
    raise CheckpointError(f"vLLM has no {head} output layer for {name}; give --head none")


def _without_quantized_head(config: Mapping[str, Any]) -> str | None:
    return next((n for n in config.get("architectures") or () if n in NO_QUANTIZED_HEAD), None)


def quantization_config(
    source: ModelDirectory, quantization: dict[str, Any] | None
) -> dict[str, Any]:
    """What config.json says of the compressed weights, of vLLM's plugin and of other readers.

    Args:
        source: what is converted.
        quantization: as cast.json has it.
    """
    dense_linears = sorted(set(source.linears) - set(source.targets))
    stored = source.pattern.stored
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
    }
    if quantization:
        values, of_head = quantization["quantize"], quantization["head"]
        head = source.head if of_head else None
        config["format"] = FORMS[values]
        config["quantization_status"] = "compressed"
        config["config_groups"] = {"group_0": _group("Linear", values, quantization)}
        config["ignore"] = [name for name in dense_linears if name != head]
        if head and "int4" in (values, of_head):
            own = {**_group(head, of_head, quantization), "format": FORMS[of_head]}
            config["config_groups"]["group_1"] = own
    config["sparsity_config"] = {
        "format": BITMASK_24 if stored == TWO_FOUR else BITMASK_64,
        "sparsity_structure": str(stored),
        "global_sparsity": _zeros(source),
        "targets": ["Linear"],
        "ignore": dense_linears,
        "registry_requires_subclass": False,
    }
    if source.kept_of_64:
        config["sparsity_config"]["kept_of_64"] = dict(source.kept_of_64)
    return config


def _group(target: str, values: str, quantization: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = {**INT8, "strategy": "channel", "dynamic": False}
    if values == "int4":
        size = quantization["scale_group"]
        weights |= {"num_bits": 4, "strategy": "group", "group_size": size}
    return {
        "targets": [target],
        "weights": weights,
        "input_activations": {**INT8, "strategy": "token", "dynamic": True},
    }


def _zeros(source: ModelDirectory) -> float:
    """The share of zeros in all targets."""
    sizes = {name: source.num_weights(name) for name in source.targets}
    zeros = sum(source.pattern_of(name).zeros * size for name, size in sizes.items())
    return round(zeros / sum(sizes.values()), 6)
