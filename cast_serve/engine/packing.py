"""What linear.py and head.py share in packing a loaded layer: kernels ready, scales checked."""

import functools
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from cast_serve import kernels

GPU_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache  # every layer asks
def load_kernels(is_cuda: bool) -> None:
    """Loads the kernels; those of a CPU with the settings that are measured once per machine."""
    kernels.load(tune=not is_cuda)


def row_scales(rows: int, attributes: dict[str, Any]) -> ChannelQuantScaleParameter:
    """The parameter that ``weight_scale`` [rows, 1] on disk is loaded into; 0 until then."""
    return ChannelQuantScaleParameter(
        data=torch.zeros(rows, 1, dtype=torch.float32),
        output_dim=0,
        weight_loader=attributes["weight_loader"],
    )


def keep_scales(layer: nn.Module, prefix: str, num_loaded: int | None = None) -> None:
    """Turns a loaded ``weight_scale`` into ``scale``, fp32 [rows], as the kernels take it.

    Args:
        num_loaded: rows that the checkpoint has; None: all. Those after them are padding.

    Raises:
        ValueError: if a scale is not positive and finite, or the layer runs in fp32 on a GPU.
    """
    scale = layer.weight_scale.data.flatten()
    if scale.is_cuda and layer.params_dtype not in GPU_DTYPES:
        raise ValueError(
            f"{prefix} has 8-bit weights, which a GPU multiplies in bf16 or fp16, but the model "
            f"runs in {layer.params_dtype}; serve it with --dtype bfloat16"
        )
    bad = ~(scale[:num_loaded].isfinite() & (scale[:num_loaded] > 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{prefix}.weight_scale: {int(bad.sum())} of {bad.numel()} are not positive and "
            f"finite; the first is {float(scale[row])} in row {row}; the file is damaged or has "
            "no scales"
        )
    del layer.weight_scale
    layer.register_parameter("scale", nn.Parameter(scale.contiguous(), requires_grad=False))
