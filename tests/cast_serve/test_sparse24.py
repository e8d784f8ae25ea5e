"""Which checkpoints the vLLM plugin claims, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from vllm.model_executor.layers.quantization import (  # noqa: E402
    QUANTIZATION_METHODS,
    get_quantization_config,
)

from cast_serve import plugin  # noqa: E402

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHECKPOINT: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "sparsity_config": {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    },
}


@pytest.fixture(scope="module")
def config_class() -> Any:
    plugin.register()
    plugin.register()  # vLLM calls it in every process, some twice
    assert QUANTIZATION_METHODS.count("cast_sparse24") == 1
    return get_quantization_config("cast_sparse24")


def test_claims_our_format_and_no_other(config_class: Any) -> None:
    claim = config_class.override_quantization_method
    assert claim(CHECKPOINT, None) == "cast_sparse24"
    assert claim({"quant_method": "compressed-tensors", "format": "int-quantized"}, None) is None
    assert claim({"quant_method": "gptq", "sparsity_config": None}, None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float-quantized"}, r"2:4-sparse and quantised \(float-quantized\)"),
        ({"config_groups": {"group_0": {}}}, "2:4-sparse and quantised"),
        ({"sparsity_config": {"targets": []}}, r"targets \[\] is not served"),
        ({"sparsity_config": {"sparsity_structure": "4:8"}}, "'4:8' with targets"),
    ],
)
def test_refuses(config_class: Any, changes: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(CHECKPOINT)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        config_class.from_config(config)


def test_only_linears_are_touched(config_class: Any) -> None:
    assert config_class.from_config(CHECKPOINT).get_quant_method(nn.Embedding(2, 2), "x") is None


def test_a_shard_that_breaks_a_bitmask_byte_is_refused(config_class: Any) -> None:
    from cast_serve.sparse24 import Sparse24LinearMethod

    with pytest.raises(ValueError, match=r"o_proj: in_features 24 over 2 .* leaves 12 per rank"):
        Sparse24LinearMethod("o_proj").create_weights(
            nn.Module(), 12, [8], 24, 8, torch.bfloat16, weight_loader=None
        )
