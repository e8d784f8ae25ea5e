"""Target linears + calibration blocks + TrainConfig -> their gates, as training starts them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_train import sharding
from cast_train.config import Adams, Gates, Pruned, Ste, TrainConfig
from cast_train.gates import gating, quantizing, scaling
from cast_train.pruning.oneshot import prune
from cast_train.pruning.scores import magnitude_scores, wanda_scores
from cast_train.pruning.sparsegpt import sparsegpt_scores


def start_gates(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    calibration: Tensor,
    patterns: Mapping[str, Pattern],
    config: TrainConfig,
) -> dict[str, gating.Gate]:
    """Puts gates on the targets, the same in every process; `ste` may change the weights.

    Args:
        model: fp32.
        targets: its linears to prune, by name.
        calibration: token blocks, int64 [num_blocks, block_size].
        patterns: the targets', by name.
        config: all settings.

    Returns:
        the gates by the targets' names; none with ``dense``.
    """
    torch.manual_seed(config.seed)  # of the first weights of `generator`
    gate_map = {}
    if isinstance(config, Pruned):
        scores = None
        if sharding.rank() == 0:
            scores = _scores(model, targets, calibration, patterns, config)
        gate_map = with_gates(targets, patterns, scores, config)
    sharding.take_first(sharding.state_of(model))
    return gate_map


def _scores(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    calibration: Tensor,
    patterns: Mapping[str, Pattern],
    config: Pruned,
) -> Mapping[str, Tensor] | None:
    """What the gates start from, as `gating.attach` takes it; SparseGPT may move the weights."""
    scores = None
    if isinstance(config, Adams) or config.first_order == "magnitude":
        scores = magnitude_scores(targets)
    elif config.first_order == "wanda":
        scores = wanda_scores(model, targets, calibration)
    elif config.first_order == "sparsegpt":
        dense = {}
        if config.is_solved:
            dense = {name: linear.weight.detach().clone() for name, linear in targets.items()}
        scores = sparsegpt_scores(model, targets, calibration, patterns)
        _restore(targets, dense)  # what is solved takes the order alone
        if isinstance(config, Ste):  # ranks by |W|: what SparseGPT drops starts at 0
            prune(targets, {n: hard_mask(found, patterns[n]) for n, found in scores.items()})
            scores = None
    return scores


@torch.no_grad()
def _restore(targets: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        targets[name].weight.copy_(weight)


def with_gates(
    targets: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    scores: Mapping[str, Tensor] | None,
    config: Pruned,
) -> dict[str, gating.Gate]:
    """Gates, and scales or quantisers if asked for; all but config as for `gating.attach`."""
    gate_map = gating.attach(
        targets,
        patterns,
        scores,
        method=config.method,
        selector=config.selector if isinstance(config, Gates) else "soft_topk",
        # The gradients of a step's passes are summed.
        decay=config.decay / config.accumulation if isinstance(config, Ste) else 0.0,
    )
    if config.scale_parts:
        scaling.attach(targets, config.scale_parts, config.pattern.m)
    if config.quantization is not None:
        quantizing.attach(targets, gate_map, config.quantization.group)
    return gate_map
