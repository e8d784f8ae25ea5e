"""Hardened weights + calibration blocks -> scales and integers that quantised steps start from.

They are those that `cast-train quantize` chooses (pruning/quantize.py): the integers of a row
compensate each other. A weight is then moved no further than it must be to round to its integer:

    W <- the nearest to W within scale * (integer +- MARGIN)

So what lay near the border of two integers still does, and a few steps can carry it over.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.sparsity.bitmask import pack_mask
from cast_train import sharding
from cast_train.gates import gating, quantizing
from cast_train.pruning.quantize import quantize_linear
from cast_train.pruning.scores import weight_rows
from cast_train.pruning.sparsegpt import replace_weights

MARGIN = 0.48


@torch.no_grad()
def start_quantized(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    gates: Mapping[str, gating.Gate],
    blocks: Tensor,
    quantization: Quantization,
) -> None:
    """Chooses the scales of all targets' quantisers and moves the kept weights, in one pass.

    Args:
        model: a transformers model that the targets belong to, fp32, its gates in a hard phase that
            is not quantised.
        targets: linears by name, with gates and quantisers.
        gates: theirs, by the same names.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        quantization: of the weights.

    Raises:
        UsageError: if the calibration tokens never reach a target, or a weight is Inf or NaN.
    """
    moved: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    masks = {name: gate.mask(sharding.local) for name, gate in gates.items()}

    def quantized(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        moved[name], mask = weight, masks[name]
        if not len(weight):  # fewer rows than processes
            return weight
        kept = weight[mask].view(len(weight), -1).to(quantizing.STORED_DTYPE)
        pattern = gates[name].pattern.stored
        linear = CompressedLinear(name, kept, pack_mask(mask), weight.shape[1], pattern=pattern)
        found = quantize_linear(linear, hessian, quantization)
        assert found.scale is not None
        scales[name] = scale = found.scale.float()
        columns = quantization.group or weight.shape[1]
        reach = MARGIN * scale.repeat_interleave(columns, dim=1)[:, : weight.shape[1]]
        integers = found.dense(torch.float32)
        near = torch.minimum(torch.maximum(weight, integers - reach), integers + reach)
        moved[name] = torch.where(mask, near, weight)
        return integers

    replace_weights(model, targets, blocks, quantized)
    for name, linear in targets.items():
        weight_rows(linear).copy_(moved[name])
        if name in scales:
            sharding.local(quantizing.quantizer_of(linear).scale).copy_(scales[name])
