"""Target linears + calibration blocks + TrainConfig -> their gates and weights, as training starts.

Every method with a start goes the same way: scores, by them a mask, and the weights that it keeps
solved for it (solve.py). The others become 0, from where `ste` may bring them back; beside a gate
they keep the dense model's value, so that it brings back what it dropped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.sparsity.pattern import Pattern
from cast_train import sharding
from cast_train.checkpoint import rows
from cast_train.config import Gates, Masked, Pruned, Ste, TrainConfig
from cast_train.gates import budget, gating, quantizing, scaling
from cast_train.pruning.allocate import units_of
from cast_train.pruning.scores import magnitude_scores, wanda_scores, weight_rows
from cast_train.pruning.solve import solve
from cast_train.pruning.sparsegpt import sparsegpt_scores


def start_gates(
    model: nn.Module,
    targets: dict[str, nn.Module],
    calibration: Tensor,
    patterns: Mapping[str, Pattern],
    config: TrainConfig,
    is_resumed: bool = False,
) -> tuple[Any, dict[str, nn.Module], dict[str, gating.Gate]]:
    """Puts gates on the targets and solves their weights, the same in every process.

    Args:
        model: fp32; where it is sharded, another takes its place.
        targets: its linears to prune, by name.
        calibration: token blocks, int64 [num_blocks, block_size].
        patterns: the targets', by name.
        config: all settings.
        is_resumed: whether a checkpoint has the weights.

    Returns:
        the model; its targets; the gates by the targets' names, none with ``dense``.
    """
    torch.manual_seed(config.seed)  # of the first weights of `generator`
    gate_map = {}
    has_rows = config.is_sharded or sharding.rank() == 0  # to score and to solve
    if isinstance(config, Pruned):
        scores = _scores(model, targets, calibration, patterns, config) if has_rows else None
        if config.is_sharded:
            model, targets, gate_map = _sharded_with_gates(model, targets, patterns, scores, config)
        else:
            gate_map = with_gates(targets, patterns, scores, config)
        is_solved_first = config.is_solved and not config.waits and not is_resumed
        if has_rows and is_solved_first:
            masks = {name: gate.mask(sharding.local) for name, gate in gate_map.items()}
            _solve(model, targets, masks, calibration, keeps_dropped=isinstance(config, Gates))
    if isinstance(config, Gates) and config.budget_learning_rate:
        budget.attach(gate_map, units_of(model, targets, calibration[:1]))
    if not config.is_sharded:
        sharding.take_first(sharding.state_of(model))
    return model, targets, gate_map


@torch.no_grad()
def _sharded_with_gates(
    model: Any,
    targets: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    scores: Mapping[str, Tensor] | None,
    config: Pruned,
) -> tuple[Any, dict[str, nn.Module], dict[str, gating.Gate]]:
    """As `with_gates`, on a model that is cut with them: FSDP takes no parameters afterwards.

    Returns:
        the new model, its targets and gates. The old one's parameters have gone there.
    """
    gated = rows.another(model)
    found = {name: gated.get_submodule(name) for name in targets}
    gate_map = with_gates(found, patterns, None, config)
    sharding.shard(gated)
    rows.allocate(gated)
    rows.move(model, gated)
    for name, gate in gate_map.items():
        gate.begin(None if scores is None else scores[name])
        if isinstance(gate, gating.LogitGate):
            gate.is_sharded = True
    for scale in scaling.scales_of(found):
        sharding.local(scale).fill_(1)
    if isinstance(config, Masked) and config.quantization is not None:
        for linear in found.values():
            sharding.local(quantizing.quantizer_of(linear).scale).zero_()
    return gated, found, gate_map


def _scores(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    calibration: Tensor,
    patterns: Mapping[str, Pattern],
    config: Pruned,
) -> Mapping[str, Tensor] | None:
    """What the gates start from, as `gating.attach` takes it."""
    start = config.start if isinstance(config, Masked) else "magnitude"
    if start == "ones":
        return None
    if start == "magnitude":
        return magnitude_scores(targets)
    if start == "wanda":
        return wanda_scores(model, targets, calibration)
    dense = {name: weight_rows(linear).clone() for name, linear in targets.items()}
    scores = sparsegpt_scores(model, targets, calibration, patterns)
    for name, weight in dense.items():  # which SparseGPT has moved
        weight_rows(targets[name]).copy_(weight)
    return scores


@torch.no_grad()
def _solve(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    calibration: Tensor,
    *,
    keeps_dropped: bool,
) -> None:
    """Solves the weights that the masks keep; the others become 0, or keep their dense value."""
    dense = {}
    if keeps_dropped:
        dense = {name: weight_rows(linear).clone() for name, linear in targets.items()}
    solve(model, targets, masks, calibration)
    for name, weight in dense.items():
        solved = weight_rows(targets[name])
        solved.copy_(torch.where(masks[name], solved, weight))


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
