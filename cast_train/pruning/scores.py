"""Linears (+ calibration blocks) -> importance scores, fp32 [out_features, in_features].

Of a sharded model each process gets those of its rows; every process must call.

Magnitude scores a weight by |W|; Wanda by |W_ij| * ||x_j||_2, x_j the linear's j-th input over all
calibration tokens. Source: Sun et al., "A simple and effective pruning approach for large language
models", 2023 (all activations come from one pass of the dense model here; the authors prune layer
after layer).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.errors import UsageError
from cast_train import sharding
from cast_train.gates.gating import stored_weight
from cast_train.passes import evaluating, few_logits, hooked


def magnitude_scores(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """|W| by name, fp32 [out_features, in_features]."""
    return {name: weight_rows(linear).abs() for name, linear in targets.items()}


def wanda_scores(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Tensor, batch_blocks: int = 4
) -> dict[str, Tensor]:
    """|W| * ||x||_2 by name, fp32 [out_features, in_features].

    Args:
        model: the model that the targets belong to; it is left as it was.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        batch_blocks: sequences per pass.

    Raises:
        UsageError: if the calibration tokens never reach a target.
    """
    squares: dict[str, Tensor] = {}

    def add_squares(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            found = inputs[0].detach().flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return hook

    hooks = [
        linear.register_forward_pre_hook(add_squares(name)) for name, linear in targets.items()
    ]
    with hooked(hooks), evaluating(model), torch.no_grad():
        device = next(model.parameters()).device
        for batch in tqdm(blocks.split(batch_blocks), desc="calibration", unit="batch"):
            model(input_ids=batch.to(device), use_cache=False, **few_logits(model))
    check_reached(targets, squares)
    return {
        name: weight_rows(linear).abs() * squares[name].sqrt() for name, linear in targets.items()
    }


def check_reached(targets: Mapping[str, nn.Module], reached: Mapping[str, Any]) -> None:
    """Refuses scores that lack a target.

    Args:
        targets: linears by name.
        reached: what was computed, by the names of the linears that received inputs.

    Raises:
        UsageError: naming the targets that are missing.
    """
    missed = sorted(set(targets) - set(reached))
    if missed:
        raise UsageError(f"the calibration text never reached {', '.join(missed)}; exclude them")


def weight_rows(linear: nn.Module) -> Tensor:
    """A linear's own weight, without its gate: fp32 [out_features, in_features].

    Where it is sharded, this process's rows; shares memory if it is fp32.
    """
    return sharding.local(stored_weight(linear).detach()).float()
