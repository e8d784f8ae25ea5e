"""A checkpoint's ``quantization_config`` -> whether the method ``cast_sparse24`` serves it.

Apart from config.py, since it must be known also where that cannot be imported.
"""

from typing import Any

from cast_serve.checkpoint.declared import BITMASK_24, BITMASK_64

METHOD = "cast_sparse24"  # the quantisation method, as vLLM's --quantization names it
FORMATS = (BITMASK_24, BITMASK_64)


def claims(quantization: dict[str, Any] | None, user_quant: str | None) -> bool:
    """Whether a checkpoint is served by ``cast_sparse24``.

    Args:
        quantization: config.json's ``quantization_config``.
        user_quant: vLLM's ``--quantization``.
    """
    config = quantization or {}
    sparsity = config.get("sparsity_config") or {}
    is_refused_by_vllm = sparsity.get("format") == "dense" and bool(sparsity.get("targets"))
    is_asked_for = user_quant == METHOD and config.get("quant_method") == "compressed-tensors"
    return (
        sparsity.get("format") in FORMATS
        or is_asked_for
        or (is_refused_by_vllm and user_quant is None)
    )
