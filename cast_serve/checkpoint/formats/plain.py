"""Weights that are not quantised, of a dense, pruned or gated directory -> kept values.

Hardening keeps the N largest gates of each group and writes zeros for the rest.
"""

import torch
from torch import Tensor

from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.formats.integers import SCALE_DTYPES
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.checkpoint.stored import StoredModel
from cast_serve.sparsity.pattern import PatternError, check_weight, hard_mask


class Dense(Form):
    """``weight``, in a directory that nobody has pruned on record; it may have the zeros."""

    kind = "dense"

    def read(self, name: str) -> CompressedLinear:
        weight = hardened(self.source, name, is_gated=self.kind == "gated")
        return CompressedLinear.from_weight(name, weight, self.source.pattern_of(name))


class Pruned(Dense):
    """``weight`` with its zeros."""

    kind = "pruned"


class Gated(Dense):
    """``weight`` without zeros; ``gate``, logits or a mask (none for adams); maybe ``scale``."""

    kind = "gated"


def hardened(source: StoredModel, name: str, *, is_gated: bool) -> Tensor:
    """A target's weight [out_features, in_features] with exact zeros where it was dropped.

    Raises:
        CheckpointError: if its gates or scales do not fit.
        PatternError: if it has another pattern.
    """
    weight = source.turned(name, source.get(f"{name}.weight"))
    pattern = source.pattern_of(name)
    if not is_gated:
        check_weight(weight, pattern, name)
        return weight
    if source.record.get("method") == "adams":  # it has no gates: |W| ranks the weights
        gate = weight.float().abs()
    else:
        gate = source.turned(name, source.get(f"{name}.gate"))
        if gate.shape != weight.shape or gate.dtype not in (torch.bool, *SCALE_DTYPES):
            raise CheckpointError(
                f"{name}.gate is {gate.dtype} {list(gate.shape)}, but a logit for each weight of "
                f"{list(weight.shape)} in bf16, fp16 or fp32, or a bool mask, is needed; the "
                "checkpoint is damaged"
            )
    try:
        mask = hard_mask(gate, pattern)
    except PatternError as error:
        raise PatternError(f"{name}.gate: {error}") from None
    if gate.dtype == torch.bool and not torch.equal(mask, gate):
        raise PatternError(
            f"{name}.gate is a mask that does not keep {pattern.n} of every {pattern.m} weights; "
            "the checkpoint is damaged"
        )
    weight = torch.where(mask, weight, torch.zeros_like(weight))
    if f"{name}.scale" not in source.files:
        return weight
    scale = source.get(f"{name}.scale").float()  # [out_features, column parts]
    is_fitting = scale.dim() == 2 and scale.shape[0] == weight.shape[0] and scale.numel()
    if not is_fitting or weight.shape[1] % scale.shape[1]:
        raise CheckpointError(
            f"{name}.scale is {list(scale.shape)}, which does not divide {list(weight.shape)}; "
            "the checkpoint is damaged"
        )
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return (weight.float() * scale).to(weight.dtype)
