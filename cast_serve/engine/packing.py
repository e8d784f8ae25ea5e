"""What linear.py and head.py share in packing a loaded layer: kernels ready, scales checked."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import ChannelQuantScaleParameter, PerTensorScaleParameter

from cast_serve import kernels
from cast_serve.errors import UsageError

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


def weight_scales(num_linears: int, attributes: dict[str, Any]) -> PerTensorScaleParameter:
    """The parameter that a ``weight_scale`` [1] for each of the merged linears is loaded into."""
    return PerTensorScaleParameter(
        data=torch.zeros(num_linears, dtype=torch.float32),
        weight_loader=attributes["weight_loader"],
    )


def take_scales(
    layer: nn.Module,
    prefix: str,
    num_loaded: int | None = None,
    out_sizes: list[int] | None = None,
    scale_group: int | None = None,
) -> Tensor:
    """Removes a loaded ``weight_scale`` from its layer.

    Args:
        num_loaded: rows that the checkpoint has; None: all. Those after them are padding.
        out_sizes: out_features of each of the merged linears, if it has one scale for each.
        scale_group: the columns that share a scale; None: all of a row.

    Returns:
        fp32 [rows], or with scale groups [rows, num_groups].

    Raises:
        UsageError: if a scale is not positive and finite.
    """
    scale: Tensor = layer.weight_scale.data
    scale = scale.flatten() if scale_group is None else scale
    if out_sizes is not None:
        scale = scale.repeat_interleave(torch.tensor(out_sizes, device=scale.device))
    bad = ~(scale[:num_loaded].isfinite() & (scale[:num_loaded] > 0))
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        raise UsageError(
            f"{prefix}.weight_scale: {int(bad.sum())} of {bad.numel()} are not positive and "
            f"finite; the first is {float(scale[place])} in row {place[0]}; the file is damaged or "
            "has no scales: copy the directory again"
        )
    del layer.weight_scale
    return scale.contiguous()


def check_words(prefix: str, words: Tensor) -> None:
    """Refuses rows of ``weight_packed`` that no weights make, as where none were loaded.

    Raises:
        UsageError: naming the first row.
    """
    if (is_empty := ~words.any(1)).any():
        raise UsageError(
            f"{prefix}: row {int(is_empty.nonzero()[0])} of weight_packed is 0, which no "
            f"weights make; {int(is_empty.sum())} rows are wrong and the file is damaged or "
            "has none: copy the directory again"
        )


def shape_checked(prefix: str, in_features: int) -> nn.Parameter:
    """A parameter for the two numbers of a weight's shape on disk, which are only compared.

    Raises:
        UsageError: when it is loaded, if they name other in_features.
    """

    def check(param: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
        found = loaded.flatten().tolist()
        if len(found) != 2 or found[1] != in_features:
            raise UsageError(
                f"{prefix}: the checkpoint says shape {found}, but in_features is {in_features}"
            )

    shape = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    shape.weight_loader = check
    return shape


def keep_scales(layer: nn.Module, prefix: str, scale: Tensor) -> None:
    """Gives a layer its ``scale``, fp32 [rows], as the int8 kernels take it.

    Raises:
        UsageError: if the layer runs in fp32 on a GPU.
    """
    check_dtype(layer, prefix, scale.is_cuda)
    layer.register_parameter("scale", nn.Parameter(scale, requires_grad=False))


def check_dtype(layer: nn.Module, prefix: str, is_cuda: bool) -> None:
    """Refuses a dtype that the kernels of integer weights do not take.

    Raises:
        UsageError: if the layer runs in fp32 on a GPU.
    """
    if is_cuda and layer.params_dtype not in GPU_DTYPES:
        raise UsageError(
            f"{prefix} has integer weights, which a GPU multiplies in bf16 or fp16, but the model "
            f"runs in {layer.params_dtype}; serve it with --dtype bfloat16"
        )
