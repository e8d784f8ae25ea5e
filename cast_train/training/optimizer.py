"""A model with gates + TrainConfig -> its optimiser: AdamW for the weights, a rule for the logits.

Adam gives every parameter a step of about its learning rate, however weak the evidence: gates that
hardly matter then follow the noise of their gradients as far as the others follow a signal. A
tensor of gate logits has one scale in place of one per logit, so that a logit moves in proportion
to its mean gradient:

    mu = beta1 mu + (1 - beta1) g
    v  = beta2 v + (1 - beta2) mean(g^2)         one number, over all logits of the tensor
    L -= lr * mu / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

A logit whose gradient always has the tensor's root mean square and one sign moves by lr a step; lr
warms up with the mean (schedules.py).
N of N:64, where that is learnt, follows the mean mu of its gradients as budget.py says.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast_train import sharding
from cast_train.config import Adams, Decayed, Gates, TrainConfig
from cast_train.gates import budget, gating
from cast_train.training import adams

LOGITS = "logits"
BUDGET = "budget"  # N of N:64
GENERATOR = "generator"  # the network that computes logits
WEIGHTS = "weights"  # all else: weights, norms, biases, embeddings, scales


class AdamWithGates(torch.optim.AdamW):
    """AdamW; groups whose ``role`` is LOGITS follow the module's rule. State is fp32."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for logits in group["params"] if group["role"] == LOGITS else ():
                if logits.grad is not None:
                    self._update_logits(logits, group)
                    logits.grad = None  # AdamW passes by what has no gradient
            if group["role"] == BUDGET and group["params"][0].grad is not None:
                self._exchange(group)
        super().step()
        return loss

    def _update_logits(self, logits: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[logits]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mu"] = torch.zeros_like(logits)
            state["mean_square"] = torch.tensor(0.0)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean_square = sharding.whole(logits.grad.square().mean())
        state["mu"].lerp_(logits.grad, 1 - beta1)
        state["mean_square"].lerp_(mean_square.to(state["mean_square"]), 1 - beta2)
        root = (state["mean_square"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        logits.sub_(state["mu"], alpha=float(group["lr"] / (1 - beta1 ** state["step"]) / root))

    def _exchange(self, group: Mapping[str, Any]) -> None:
        benefits = []
        for n, size in zip(group["params"], group["sizes"], strict=True):
            state = self.state[n]
            if not state:
                state["step"] = torch.tensor(0.0)  # torch's optimisers want it
                state["mu"] = torch.zeros_like(n)
            benefits.append(-state["mu"].lerp_(n.grad, 1 - group["betas"][0]).item() / size)
            n.grad = None
        budget.exchange(
            group["params"],
            group["sizes"],
            torch.tensor(benefits, dtype=torch.float64),
            group["lr"],
        )


def make(
    model: nn.Module,
    gate_map: Mapping[str, gating.Gate],
    targets: Mapping[str, nn.Module],
    config: TrainConfig,
) -> torch.optim.Optimizer:
    """The optimiser of what is trained in a model; every group says its ``role``.

    Args:
        model: with gates, or without for ``dense``.
        gate_map: its gates by name.
        targets: the linears whose weights have `weight_decay`, by name.
        config: all settings.
    """
    gates = [p for gate in gate_map.values() for p in gate.parameters() if p.requires_grad]
    gate_ids = {id(parameter) for parameter in gates}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in gate_ids]
    if isinstance(config, Adams):
        return _adams(weights, gate_map, config)
    assert isinstance(config, Decayed)  # all methods but adams
    # As is usual, weight decay applies to matrices and not to norms, biases and embeddings. It does
    # not apply to the scales either, since that would decay the weights a second time.
    decayed = {id(gating.stored_weight(linear)) for linear in targets.values()}
    groups: list[dict[str, Any]] = [
        {
            "params": [w for w in weights if id(w) in decayed],
            "role": WEIGHTS,
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [w for w in weights if id(w) not in decayed],
            "role": WEIGHTS,
            "lr": config.learning_rate,
            "weight_decay": 0.0,
        },
    ]
    if isinstance(config, Gates):
        units = budget.learnt_units(gate_map)
        role_of = {id(p): LOGITS for p in gating.logits_of(gate_map)}
        role_of |= {id(n): BUDGET for n, _ in units}
        groups += [
            {
                "params": [p for p in gates if role_of.get(id(p), GENERATOR) == role],
                "role": role,
                "lr": rate,
                "weight_decay": 0.0,
            }
            for role, rate in (
                (LOGITS, config.gate_learning_rate),
                (GENERATOR, config.gate_learning_rate),
                (BUDGET, config.budget_learning_rate),
            )
        ]
        groups[-1]["sizes"] = [size for _, size in units]
    # fused: one pass over memory in place of ten
    return AdamWithGates([group for group in groups if group["params"]], fused=True)


def _adams(
    weights: list[nn.Parameter], gate_map: Mapping[str, gating.Gate], config: Adams
) -> torch.optim.Optimizer:
    patterns = {id(g.weight()): (g.pattern.n, g.pattern.m) for g in gate_map.values()}
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if id(w) not in patterns], "role": WEIGHTS}
    ]
    for pattern in sorted(set(patterns.values())):
        groups.append(
            {
                "params": [w for w in weights if patterns.get(id(w)) == pattern],
                "role": WEIGHTS,
                "pattern": pattern,
            }
        )
    return adams.AdamS(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        total_steps=config.steps,
        decay=config.decay,
        mask_every=config.mask_every,
    )
