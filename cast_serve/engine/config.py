"""A checkpoint's ``quantization_config`` -> which of its layers run 2:4-sparse in vLLM."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from cast_serve.engine.head import Int8HeadMethod
from cast_serve.engine.linear import Sparse24LinearMethod

METHOD = "cast_sparse24"
FORMAT = "sparse-24-bitmask"
REMEDY = "`cast-serve convert` makes a directory that is served of what it can read"
# What a quantised checkpoint must say, per part of its config_groups: 8-bit integers, one scale a
# row of the weight. Activations are quantised as they come, finer than any file asks for.
SERVED = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True},
}


@register_quantization_config(METHOD)
class Sparse24Config(QuantizationConfig):
    """vLLM's configuration of a 2:4-sparse checkpoint.

    Args:
        ignore: module names, or regular expressions after ``re:``, that are not 2:4.
        is_quantized: whether the kept weights are int8 with a scale a row.
        unquantized: names, as in ignore, that stay in the model's dtype all the same.
    """

    def __init__(
        self, ignore: list[str], is_quantized: bool = False, unquantized: list[str] | None = None
    ) -> None:
        super().__init__()
        self.ignore = ignore
        self.is_quantized = is_quantized
        self.unquantized = unquantized or []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims compressed-tensors checkpoints in our format, and no others."""
        sparsity = (hf_quant_cfg or {}).get("sparsity_config") or {}
        return METHOD if sparsity.get("format") == FORMAT else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        """Reads config.json's ``quantization_config``.

        Raises:
            ValueError: if the checkpoint is quantised in a form that is not served, or not 2:4, or
                targets other layers than linears.
        """
        sparsity = config["sparsity_config"]
        if sparsity.get("sparsity_structure") != "2:4" or sparsity.get("targets") != ["Linear"]:
            raise ValueError(
                f"sparsity_structure {sparsity.get('sparsity_structure')!r} with targets "
                f"{sparsity.get('targets')} is not served; 2:4 on ['Linear'] is needed"
            )
        ignore = list(sparsity.get("ignore", []))
        unquantized = list(config.get("ignore", []))
        form, scheme = config.get("format", "dense"), config.get("config_groups") or {}
        if form == "dense" and not scheme:
            return cls([*ignore, *unquantized])
        if form != "int-quantized" or not scheme:
            raise ValueError(
                f"the checkpoint is 2:4-sparse and quantised ({form}); 2:4 weights are served in "
                f"bf16, fp16, fp32 or as int-quantized with 8 bits; {REMEDY}"
            )
        for name, group in scheme.items():
            _check_scheme(name, group)
        return cls(ignore, is_quantized=True, unquantized=unquantized)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a target, of an 8-bit head, of an ignored linear; else None.

        Raises:
            ValueError: if a linear is quantised and not 2:4.
        """
        is_quantized = self.is_quantized and not self._is_in(self.unquantized, prefix)
        if isinstance(layer, ParallelLMHead):
            return Int8HeadMethod(prefix) if is_quantized else None
        if not isinstance(layer, LinearBase):
            return None
        if not self._is_in(self.ignore, prefix):
            return Sparse24LinearMethod(prefix, is_quantized)
        if is_quantized:
            raise ValueError(
                f"{prefix} is int8 and not 2:4; only the head is served in that form; {REMEDY}"
            )
        return UnquantizedLinearMethod()

    def _is_in(self, names: list[str], prefix: str) -> bool:
        mapping = self.packed_modules_mapping
        return bool(should_ignore_layer(prefix, ignore=names, fused_mapping=mapping))


def _check_scheme(name: str, group: dict[str, Any]) -> None:
    """Refuses what would be computed wrongly."""
    for part, wanted in SERVED.items():
        found = group.get(part) or {}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValueError(
                    f"config_groups.{name}.{part}.{key} is {found.get(key)!r}; of 8-bit 2:4 "
                    f"weights {value!r} is served; {REMEDY}"
                )
