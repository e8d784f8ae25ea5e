"""Masks + calibration blocks -> the kept weights that change the outputs of the linears least.

For a row w of a weight, the columns K that its mask keeps and H = X^T X of the linear's inputs,
||X (w - w')||^2 is least at w'_K = H_KK^-1 (H w)_K. H is damped as SparseGPT damps it. So masks of
any origin can be compared on equal terms: each with the best weights for it, from the same dense
ones.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cast_train.pruning.sparsegpt import damped, replace_weights

CHUNK_BYTES = 256 << 20  # of the matrices H_KK that are factored at once


def solve(
    model: nn.Module, targets: Mapping[str, nn.Module], masks: Mapping[str, Tensor], blocks: Tensor
) -> None:
    """Solves all targets in one pass; later linears see the outputs of solved ones.

    Args:
        model: a transformers model that the targets belong to, dense, fp32.
        targets: linears by name; their weights are overwritten, zero where they are dropped.
        masks: bool [out_features, in_features] by name, as many kept in each row of a weight.
        blocks: calibration tokens, int64 [num_blocks, block_size].

    Raises:
        ValueError: if the calibration tokens never reach a target.
    """
    replace_weights(
        model,
        targets,
        blocks,
        lambda name, weight, hessian: solve_kept(weight, masks[name], hessian),
    )


@torch.no_grad()
def solve_kept(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """One weight, solved: fp32 [out_features, in_features], zero where it is dropped.

    Args:
        weight: dense, fp32 [out_features, in_features].
        mask: bool, the same shape, as many kept in each row.
        hessian: X^T X, fp32 [in_features, in_features].
    """
    hessian = damped(hessian)
    num_kept = int(mask[0].sum())
    wanted = weight @ hessian
    kept = mask.nonzero()[:, 1].view(len(weight), num_kept)  # columns, row by row
    solved = torch.zeros_like(weight)
    for rows in torch.arange(len(weight)).split(max(1, CHUNK_BYTES // (4 * num_kept**2))):
        columns = kept[rows]
        factors = torch.linalg.cholesky(hessian[columns[:, :, None], columns[:, None, :]])
        right = wanted[rows].gather(1, columns)[..., None]
        values = torch.cholesky_solve(right, factors)[..., 0]
        solved[rows] = solved[rows].scatter(1, columns, values)
    return solved
