"""A checkpoint's ``quantization_config`` -> which of its layers run 2:4-sparse in vLLM."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

from cast_serve.engine.linear import Sparse24LinearMethod

METHOD = "cast_sparse24"
FORMAT = "sparse-24-bitmask"


@register_quantization_config(METHOD)
class Sparse24Config(QuantizationConfig):
    """vLLM's configuration of a 2:4-sparse checkpoint.

    Args:
        ignore: module names, or regular expressions after ``re:``, that stay dense.
    """

    def __init__(self, ignore: list[str]) -> None:
        super().__init__()
        self.ignore = ignore

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
            ValueError: if the checkpoint is quantised as well, or not 2:4, or targets other layers
                than linears.
        """
        sparsity = config["sparsity_config"]
        if config.get("format", "dense") != "dense" or config.get("config_groups"):
            raise ValueError(
                f"the checkpoint is 2:4-sparse and quantised ({config.get('format')}); "
                "only unquantised 2:4 weights are served"
            )
        if sparsity.get("sparsity_structure") != "2:4" or sparsity.get("targets") != ["Linear"]:
            raise ValueError(
                f"sparsity_structure {sparsity.get('sparsity_structure')!r} with targets "
                f"{sparsity.get('targets')} is not served; 2:4 on ['Linear'] is needed"
            )
        return cls([*sparsity.get("ignore", []), *config.get("ignore", [])])

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

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The sparse method for a target, the dense one for an ignored linear, else None."""
        if not isinstance(layer, LinearBase):
            return None
        if should_ignore_layer(
            prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping
        ):
            return UnquantizedLinearMethod()
        return Sparse24LinearMethod(prefix)
