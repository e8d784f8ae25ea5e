"""Masks + calibration blocks -> the kept weights that change the outputs of the linears least.

For a row w of a weight, the columns K that its mask keeps and H = X^T X of the linear's inputs,
||X (w - w')||^2 is least at w'_K = H_KK^-1 (H w)_K. H is damped as SparseGPT damps it. Masks of any
origin can so be compared on equal terms: each with its best weights, from the same dense ones.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cast_train import sharding
from cast_train.gates.gating import stored_weight
from cast_train.pruning.scores import weight_rows
from cast_train.pruning.sparsegpt import damped, replace_weights

TOLERANCE = 1e-4  # leaves 0.3 % more error than the least at most (benchmarks/log.md)


def solve(
    model: nn.Module, targets: Mapping[str, nn.Module], masks: Mapping[str, Tensor], blocks: Tensor
) -> None:
    """Solves all targets in one pass; later linears see the outputs of solved ones.

    Targets that are zero already where they are dropped stay as they are: they fit themselves.

    Args:
        model: a transformers model that the targets belong to, dense, fp32.
        targets: linears by name; their weights are overwritten, zero where they are dropped.
        masks: bool [out_features, in_features] by name; of a sharded model this process's rows.
        blocks: calibration tokens, int64 [num_blocks, block_size].

    Raises:
        UsageError: if the calibration tokens never reach a target.
    """
    totals = _totals(targets)
    dropped = {name: _num_dropped(targets[name], mask) for name, mask in masks.items()}
    linears = _with_any(targets, dropped)
    if not linears:
        return
    replace_weights(
        model,
        linears,
        blocks,
        lambda name, weight, hessian: solve_kept(weight, masks[name], hessian, total=totals[name]),
    )


def _totals(targets: Mapping[str, nn.Module]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of each linear, what adds up the sums that the processes found in their rows."""
    return {
        name: partial(sharding.summed, like=stored_weight(linear))
        for name, linear in targets.items()
    }


def _num_dropped(linear: nn.Module, mask: Tensor) -> Tensor:
    """Weights other than 0 that the mask drops, in this process's rows."""
    return (weight_rows(linear).masked_fill(mask, 0) != 0).sum()


def _with_any(
    targets: Mapping[str, nn.Module], counts: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Those whose counts are not 0, all processes' together."""
    totals = _totals(targets)
    sums = torch.stack([totals[name](counts[name]) for name in targets]).tolist()
    return {name: targets[name] for name, count in zip(targets, sums, strict=True) if count}


def solve_again(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    dense: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    blocks: Tensor,
) -> None:
    """Moves trained weights by what solving changes with the mask, in the rows where it changed.

    A weight was solved for the mask before, or had the dense value where that dropped it, and was
    trained since. Now it is as if it had been solved for the new mask, and trained as far.

    Args:
        model: as for `solve`, computing with the new masks whatever its weights are.
        targets: linears by name; weights that the new mask drops stay as they are.
        dense: their dense weights, [out_features, in_features] by name; of a sharded model this
            process's rows, as of the masks.
        before: the mask that they were solved for, bool, the same shapes.
        masks: the new one.
        blocks: calibration tokens, int64 [num_blocks, block_size].
    """
    changed = {name: (before[name] != masks[name]).any(1) for name in targets}
    totals = _totals(targets)
    linears = _with_any(targets, {name: rows.sum() for name, rows in changed.items()})
    if not linears:
        return

    def moved(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        rows = changed[name]
        mask, was, start = masks[name][rows], before[name][rows], dense[name][rows].float()
        solved = solve_kept(start, mask, hessian, total=totals[name])
        start = torch.where(was, solve_kept(start, was, hessian, total=totals[name]), start)
        found = weight.clone()
        found[rows] += torch.where(mask, solved - start, 0)
        return found

    replace_weights(model, linears, blocks, moved)


@torch.no_grad()
def solve_kept(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    tolerance: float = TOLERANCE,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """One weight, solved: fp32 [out_features, in_features], zero where it is dropped.

    Conjugate gradients for all rows at once, starting at the kept weights, in columns scaled to a
    diagonal of H of ones. An iteration is one product of [out_features, in_features] and H; a
    Cholesky factor of H_KK for every row would take several times as long (benchmarks/log.md).

    Args:
        weight: dense, fp32 [out_features, in_features].
        mask: bool, the same shape.
        hessian: X^T X, fp32 [in_features, in_features].
        tolerance: stop once an iteration lowers the error, summed over all rows, by less than this
            share of it; or once that share of the first error is left, as of fewer tokens than
            columns, which can be fitted exactly.
        total: of sums over these rows makes those over all rows, where processes share them.
    """
    hessian = damped(hessian)
    scale = hessian.diagonal().rsqrt()
    hessian = hessian * scale[:, None] * scale
    scaled = weight / scale
    solved = scaled * mask
    dropped = scaled - solved
    residual = dropped @ hessian
    first = error = total((dropped * residual).sum())
    if error == 0:
        return weight * mask
    residual = residual * mask
    direction = residual
    squares = residual.square().sum(1, keepdim=True)
    for _ in range(weight.shape[1]):  # in exact arithmetic no more are needed
        curved = (direction @ hessian) * mask
        curvature = (direction * curved).sum(1, keepdim=True)
        # A row that is solved to the last bit has no direction left.
        step = torch.where(curvature > 0, squares / curvature, 0)
        solved = solved + step * direction
        residual = residual - step * curved
        lowered = total((step * squares).sum())
        error = error - lowered
        if lowered <= tolerance * error or error <= tolerance * first:
            break
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(before > 0, squares / before, 0) * direction
    return solved * scale
