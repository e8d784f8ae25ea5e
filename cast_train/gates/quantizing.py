"""A hardened weight and its inputs -> both as they are served in 8 or 4 bits, straight through.

Once the phase is quantised, a target linear computes what a linear computes that
`cast-serve convert --quantize` stores:

    W'' = integers * scale     integers = W * mask / scale, rounded, within +-127 (int4: +-7)
    x'' = integers * scale     for each token and 128 columns (sparsity/quantize.py, `rounded`)

Rounding has no gradient of use: in backward W and x get that of W'' and x'', as if nothing had been
rounded, and the mask then leaves the kept weights theirs. Source of straight through: Bengio et
al., "Estimating or propagating gradients through stochastic neurons", arXiv 1308.3432, 2013.

The scales are chosen once, before the first of these steps (training/quantized_start.py), and then
kept: the search costs 21 times what rounding costs, and a scale that moved would move all integers
of its scale group at once. They are stored beside the gates, and the weights as integers * scale,
so that `convert` finds the integers that were trained.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cast_serve.errors import UsageError
from cast_serve.sparsity.quantize import MAX_INT4, MAX_INTEGER, rounded
from cast_train import sharding
from cast_train.gates.gating import Gate

STORED_DTYPE = torch.bfloat16  # of weights and scales on disk


class Quantizer(nn.Module):
    """The parametrization W * mask -> integers * scale of one linear; also rounds its inputs.

    Args:
        gate: the linear's, which has the phase.
        shape: out_features and in_features.
        scale_group: columns that share a scale in int4; None: int8, a scale for each row.

    Attributes:
        scale: fp32 [out_features, number of scale groups], each a number of bf16; 0 until it is
            chosen. A parameter, so that it can be sharded.
    """

    def __init__(self, gate: Gate, shape: tuple[int, int], scale_group: int | None) -> None:
        super().__init__()
        out_features, in_features = shape
        num_groups = math.ceil(in_features / scale_group) if scale_group else 1
        scale = torch.zeros(out_features, num_groups)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.scale_group = scale_group
        self._gate = [gate]  # in a list, so that torch does not register it as a submodule

    @property
    def is_on(self) -> bool:
        phase = self._gate[0].phase
        return phase.is_hard and phase.is_quantized

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.rounded) if self.is_on else weight

    def round_inputs(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook of the linear."""
        if not (self.is_on and parametrize.is_parametrized(linear, "weight")):
            return inputs
        return (_StraightThrough.apply(inputs[0], rounded), *inputs[1:])

    def stored(self) -> dict[str, Tensor]:
        """The scales, as `convert` writes them; nothing before they are chosen."""
        is_chosen = sharding.whole(self.scale).any()
        return {"weight_scale": self.scale.detach().to(STORED_DTYPE)} if is_chosen else {}

    def rounded(self, weight: Tensor) -> Tensor:
        """integers * scale, in the weight's dtype; of a sharded weight this process's rows."""
        values, scale = weight.float(), sharding.local(self.scale)
        largest = MAX_INTEGER
        if self.scale_group is not None:
            largest = MAX_INT4
            # The last scale group of a row may be short: all are cut in parts of one width.
            width = math.gcd(weight.shape[1], self.scale_group)
            scale = scale.repeat_interleave(self.scale_group // width, dim=1)
            scale = scale[:, : weight.shape[1] // width].unsqueeze(-1)
            values = values.unflatten(1, (-1, width))
        values = (values / scale).round_().clamp_(-largest, largest).mul_(scale)
        return values.flatten(1).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """function(x), whose gradient is passed on to x as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def attach(
    targets: Mapping[str, nn.Module],
    gates: Mapping[str, Gate],
    scale_group: int | None,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Puts a quantiser on every target, after its gate.

    Args:
        targets: linears by name.
        gates: theirs, by the same names.
        scale_group: columns that share a scale in int4; None: int8, a scale for each row.
        scales: as they were stored, by name; None: they are yet to be chosen.

    Raises:
        UsageError: if a stored scale is of another shape.
    """
    for name, linear in targets.items():
        out_features, in_features = gates[name].weight().shape
        quantizer = Quantizer(gates[name], (out_features, in_features), scale_group)
        if scales is not None:
            if scales[name].shape != quantizer.scale.shape:
                raise UsageError(
                    f"{name}.weight_scale is {list(scales[name].shape)}, but "
                    f"{list(quantizer.scale.shape)} belongs to its weight and cast.json; "
                    "the file is damaged: copy the directory again"
                )
            quantizer.scale.data.copy_(scales[name])
        parametrize.register_parametrization(linear, "weight", quantizer.to(linear.weight.device))
        linear.register_forward_pre_hook(quantizer.round_inputs)


def quantizer_of(linear: Any) -> Quantizer:
    """The quantiser that `attach` put on a target."""
    quantizer = linear.parametrizations.weight[-1]
    assert isinstance(quantizer, Quantizer)
    return quantizer


@torch.no_grad()
def write_integers(targets: Mapping[str, nn.Module], gates: Mapping[str, Gate]) -> None:
    """Sets kept weights to integers * scale, rounded to no other integer by bf16; gates are hard.

    Its error is below 2^-8 of the weight: of 127 less than half a scale, of 7 far less.
    """
    for name, linear in targets.items():
        weight = sharding.local(gates[name].weight().data)
        mask = gates[name].mask(sharding.local)
        integers = quantizer_of(linear).rounded(torch.where(mask, weight, 0.0))
        weight.copy_(torch.where(mask, integers, weight))
