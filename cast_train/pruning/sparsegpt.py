"""A model + calibration blocks -> SparseGPT's scores, and weights that compensate for the pruning.

SparseGPT scores a weight by |W_ij| / U_jj, U the upper Cholesky factor of the inverse of
H = X^T X, and it moves the kept weights so that they compensate for the dropped ones. Source:
Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot",
2023.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.quantize import one_thread
from cast_train import sharding
from cast_train.gates.gating import stored_weight
from cast_train.passes import evaluating, few_logits, hooked
from cast_train.pruning.scores import check_reached, weight_rows

DAMPING = 0.01  # of H's mean diagonal, added to its diagonal: SparseGPT's own default
COLUMNS = 128  # of a block, at most: errors reach the columns after it once the block is done


@torch.no_grad()
def sparsegpt_scores(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    blocks: Tensor,
    patterns: Mapping[str, Pattern],
) -> dict[str, Tensor]:
    """SparseGPT's scores by name, fp32 [out_features, in_features]; the weights are moved.

    One pass over all blocks at once: each target is pruned as its inputs arrive, and its outputs
    are those of the pruned linear, so later layers compensate for earlier ones. At the end the
    weights with the N highest scores of a group compensate for the others; the others have the
    value that they were dropped with.

    Args:
        model: a transformers model that the targets belong to, fp32: they move by less than bf16
            can hold.
        targets: linears by name; their weights are overwritten.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        patterns: N:M by name.

    Raises:
        UsageError: if the calibration tokens never reach a target.
    """
    moved: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}

    def pruned(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        upper = inverse_factor(hessian)
        moved[name], scores[name] = sparsegpt(weight, upper, patterns[name])
        return moved[name] * hard_mask(scores[name], patterns[name])

    replace_weights(model, targets, blocks, pruned)
    for name, linear in targets.items():
        weight_rows(linear).copy_(moved[name])
    return scores


@torch.no_grad()
def replace_weights(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    blocks: Tensor,
    replace: Callable[[str, Tensor, Tensor], Tensor],
) -> None:
    """Replaces each target's weight as its inputs arrive, in one pass over all blocks at once.

    Its outputs are those of the new weight, so later layers see what earlier ones became.

    Args:
        model: a transformers model that the targets belong to, fp32.
        targets: linears by name; their weights are overwritten.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        replace: (name, weight [out_features, in_features], H = X^T X of its inputs) -> new weight.
            Of a sharded model each process is given its own rows; every process must call.

    Raises:
        UsageError: if the calibration tokens never reach a target.
    """
    last: list[Tensor] = [torch.empty(0)] * 2  # inputs and their H, which q, k and v share
    replaced: dict[str, bool] = {}
    stored = {name: stored_weight(linear) for name, linear in targets.items()}

    def replace_on_input(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(linear: Any, inputs: Any) -> None:
            if inputs[0] is not last[0]:
                tokens = inputs[0].flatten(0, -2).float()
                last[:] = inputs[0], tokens.t() @ tokens
            rows = sharding.local(stored[name])
            rows.copy_(replace(name, rows.detach().float(), last[1]))
            if rows is not stored[name]:  # what this forward computes with is another tensor
                stored_weight(linear).copy_(sharding.whole_of(rows, stored[name]))
            replaced[name] = True
            progress.update()

        return hook

    hooks = [
        linear.register_forward_pre_hook(replace_on_input(name)) for name, linear in targets.items()
    ]
    device = next(model.parameters()).device
    progress = tqdm(total=len(targets), desc="calibration", unit="linear")
    with progress, hooked(hooks), evaluating(model):
        model(input_ids=blocks.to(device), use_cache=False, **few_logits(model))
    check_reached(targets, replaced)


def damped(hessian: Tensor, share: float = DAMPING) -> Tensor:
    """X^T X with a share of its mean diagonal on its diagonal, so that it can be inverted."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0
    diagonal += share * diagonal.mean()
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped X^T X, in its shape and dtype.

    With rows and columns in reverse order it is the inverse of H's lower factor, so the inverse
    itself, which costs LAPACK several times as long, is not needed.
    """
    lower = torch.linalg.cholesky(damped(hessian).flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def sparsegpt(weight: Tensor, upper: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One linear's moved weights and scores, [out_features, in_features].

    Args:
        weight: fp32 [out_features, in_features].
        upper: `inverse_factor` of its inputs' X^T X, fp32 [in_features, in_features].
    """
    # A column of the weight is a row here; a copy, as it is moved.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    scores = torch.empty_like(columns)
    kept = torch.empty_like(columns, dtype=torch.bool)
    m, num_columns = pattern.m, len(columns)
    # Blocks are whole groups: a group's columns are ranked together, so the errors of all columns
    # before the group must have reached each of them.
    block = max(COLUMNS // m * m, m)
    for begin in range(0, num_columns, block):
        end = min(begin + block, num_columns)
        errors = torch.empty_like(columns[begin:end])
        with one_thread():
            for i in range(begin, end):
                if i % m == 0:
                    group = slice(i, i + m)
                    scores[group] = columns[group].abs() / upper.diagonal()[group, None]
                    kept[group] = hard_mask(scores[group].t(), pattern).t()
                errors[i - begin] = columns[i].masked_fill(kept[i], 0) / upper[i, i]
                columns[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - begin], alpha=-1)
        columns[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    return columns.t().contiguous(), scores.t().contiguous()
