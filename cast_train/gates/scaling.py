"""A scale per row and column part of a target weight -> W * scale, learnt and later folded in.

A target W [out_features, in_features] has a scale [out_features, num_parts], 1 at the start. Its
columns are cut in num_parts equal parts; W_ij is multiplied by scale[i, part of j]. As a part holds
whole groups of M, the scale changes no order inside a group, so mask and scale may be applied in
either order. Source: Huang et al., "CAST", arXiv 2509.25996, 2025, there with two parts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cast_serve.sparsity.pattern import PatternError


class ColumnScale(nn.Module):
    """The parametrization W -> W * scale of one linear.

    Attributes:
        scale: fp32 [out_features, num_parts].
    """

    def __init__(self, out_features: int, num_parts: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(out_features, num_parts))

    def stored(self) -> dict[str, Tensor]:
        return {"scale": self.scale.detach()}

    def forward(self, weight: Tensor) -> Tensor:
        """W * scale [out_features, in_features], computed in fp32, in the weight's dtype."""
        parts = weight.unflatten(1, (self.scale.shape[1], -1))
        return (parts.float() * self.scale.float().unsqueeze(-1)).to(weight.dtype).flatten(1)


def attach(targets: Mapping[str, nn.Module], num_parts: int, m: int) -> None:
    """Puts a scale on every target, after its gate.

    Raises:
        PatternError: as `check_parts` does.
    """
    weights = {name: linear.weight.detach() for name, linear in targets.items()}
    check_parts(weights, num_parts, m)
    for name, linear in targets.items():
        scale = ColumnScale(len(weights[name]), num_parts).to(weights[name].device)
        parametrize.register_parametrization(linear, "weight", scale)


def scales_of(targets: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The scales that `attach` put on the targets, if it did."""
    modules = (module for linear in targets.values() for module in linear.modules())
    return [module.scale for module in modules if isinstance(module, ColumnScale)]


def check_parts(weights: Mapping[str, Tensor], num_parts: int, m: int) -> None:
    """Refuses weights [out_features, in_features] that are not num_parts parts of whole groups.

    Raises:
        PatternError: naming the first.
    """
    for name, weight in weights.items():
        in_features = weight.shape[1]
        if in_features % (num_parts * m):
            raise PatternError(
                f"{name} has {in_features} columns, not {num_parts} parts of whole groups "
                f"of {m}; set scale_parts to a divisor of {in_features // m}, or to 0"
            )
