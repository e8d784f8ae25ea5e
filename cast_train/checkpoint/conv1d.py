"""transformers' Conv1D <-> nn.Linear: GPT-2 stores its weights [in_features, out_features].

This package computes with weights [out_features, in_features] only: every Conv1D of a model becomes
a linear as the model is loaded, and its tensors are transposed back as a directory is written.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TRANSPOSED_PARTS = ("weight", "gate")  # a linear's scales are the same in both layouts


class LinearOfConv1D(nn.Linear):
    """A linear that is a Conv1D to transformers, so that its weight is transposed on disk."""


def to_linears(model: nn.Module) -> nn.Module:
    """Replaces every Conv1D of a model in place; what is tied or frozen stays so.

    Returns:
        the model.
    """
    linears: dict[Conv1D, LinearOfConv1D] = {}
    weights: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, Conv1D):
            continue
        if module not in linears:
            stored = module.weight
            if stored not in weights:
                rows = stored.detach().t().contiguous()
                weights[stored] = nn.Parameter(rows, stored.requires_grad)
            linear = LinearOfConv1D(module.nx, module.nf, device="meta")
            linear.weight, linear.bias = weights[stored], module.bias
            linears[module] = linear.train(module.training)
        model.set_submodule(name, linears[module])
    return model


def are_in(model: nn.Module) -> bool:
    """Whether a model has linears that are a Conv1D to transformers."""
    return any(isinstance(module, LinearOfConv1D) for module in model.modules())


def transposed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name -> the same as they are on disk, or from there back.

    Args:
        model: as `to_linears` returns it.
        tensors: weights and gates of its linears are transposed where the linear was a Conv1D; all
            else stays.
    """
    found = names_of_transposed(model)
    return {
        key: tensor.transpose(0, -1).contiguous() if key in found else tensor
        for key, tensor in tensors.items()
    }


def names_of_transposed(model: nn.Module) -> set[str]:
    """The tensors of a model, as `to_linears` returns it, that are transposed on disk."""
    return {
        f"{name}.{part}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LinearOfConv1D)
        for part in TRANSPOSED_PARTS
    }
