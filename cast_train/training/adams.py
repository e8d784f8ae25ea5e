"""AdamS: Adam that decays, more and more, those weights that an N:M mask would drop.

For a target weight, at step t of T, with its mask = the N largest |W| of each group:

    mu   = beta1 mu + (1 - beta1) g                      the decay never enters it
    mu~  = mu / (1 - beta1^t)                            of kept weights
    mu~  = (1 - a) mu / (1 - beta1^t) + a lambda sign(W)   of dropped ones, a = t / T
    v    = beta2 v + (1 - beta2) mu~^2
    W   -= lr * mu~ / (sqrt(v / (1 - beta2^t)) + eps)

Towards the end a dropped weight thus moves to 0 by about lr a step, whatever lambda is; how far it
can move in all is `reach`. The forward stays dense until the mask is applied after the last step.
Other parameters are updated by plain Adam. Source: Huang et al., "CAST", arXiv 2509.25996, 2025.
Ours: mu is bias-corrected before it is squared, else the first step is 1 / (1 - beta1) times lr.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, hard_mask, masked
from cast_train import sharding
from cast_train.config import Adams
from cast_train.gates.schedules import learning_rate_factor

logger = logging.getLogger(__name__)


class AdamS(torch.optim.Optimizer):
    """The module's algorithm. Groups with ``pattern`` None are plain Adam; state is fp32.

    Args:
        params: param groups, each with ``pattern``: (n, m) or None.
        lr: step size.
        total_steps: T.
        decay: lambda.
        mask_every: steps between two refreshes of the mask.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        total_steps: int,
        decay: float,
        mask_every: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "total_steps": total_steps,
            "decay": decay,
            "mask_every": mask_every,
            "betas": betas,
            "eps": eps,
            "pattern": None,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mu"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["v"] = torch.zeros_like(parameter, dtype=torch.float32)
        pattern: tuple[int, int] | None = group["pattern"]  # a Pattern is not safe to unpickle
        if pattern is not None and state["step"] % group["mask_every"] == 0:
            weight = sharding.local(parameter)
            if "dropped" not in state:
                state["dropped"] = torch.zeros_like(parameter, dtype=torch.bool)
            sharding.local(state["dropped"]).copy_(~hard_mask(weight.abs(), Pattern(*pattern)))
            if weight is parameter:  # else its rows are in no other process
                sharding.take_first([state["dropped"]])
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mu, v = sharding.local(state["mu"]), sharding.local(state["v"])
        weight, gradient = sharding.local(parameter), sharding.local(parameter.grad).float()
        mu.lerp_(gradient, 1 - beta1)
        direction = mu / (1 - beta1 ** state["step"])
        if pattern is not None:
            share = min(state["step"] / group["total_steps"], 1.0)
            pulled = direction * (1 - share) + share * group["decay"] * weight.sign()
            dropped = sharding.local(state["dropped"]).bool()
            direction = masked(direction, ~dropped) + masked(pulled, dropped)
            v.lerp_(direction.square(), 1 - beta2)
        else:
            v.lerp_(gradient.square(), 1 - beta2)
        scale = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.addcdiv_(direction.to(weight.dtype), scale.to(weight.dtype), value=-group["lr"])


def reach(config: Adams) -> float:
    """How far a dropped weight can be moved towards 0 by the decay, in all: sum of lr_t * t / T."""
    return sum(
        config.learning_rate * learning_rate_factor(step, config) * (step + 1) / config.steps
        for step in range(config.steps)
    )


def check_reach(config: Adams, weights: Mapping[str, Tensor]) -> None:
    """Refuses settings whose final pruning would set weights to 0 that are still large.

    Warns where they are near that.

    Args:
        config: all settings.
        weights: the targets' [out_features, in_features] by name.

    Raises:
        UsageError: if the reach is below the mean |W| of what a magnitude mask drops now.
    """
    moved = reach(config)
    total = num_weights = 0.0
    for weight in weights.values():
        dropped = ~hard_mask(weight.abs(), config.pattern)
        total += float((weight.abs() * dropped).sum())
        num_weights += float(dropped.sum())
    mean = total / max(num_weights, 1)
    if moved < mean:
        raise UsageError(
            f"with learning_rate {config.learning_rate} and {config.steps} steps AdamS can move a "
            f"dropped weight by {moved:.2g}, but dropped weights are {mean:.2g} on average, so "
            "the final pruning would cut them off; raise steps or learning_rate at least "
            f"{math.ceil(mean / max(moved, 1e-12) * 3)}-fold, or choose method gates"
        )
    if moved < 3 * mean:
        logger.warning(
            "AdamS can move a dropped weight by %.2g, and dropped weights are %.2g on average: "
            "more steps or a higher learning_rate would leave less to cut off at the end",
            moved,
            mean,
        )
