"""`cast-train` for torchrun, whose second process computes as an unlike CPU does, only worse.

Its linears are off by a hundredth and AdamS's steps by a thousandth. Into the directory FOUND each
process puts what it starts to train from and what it ends with: start-RANK and end-RANK.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_train import sharding
from cast_train.__main__ import main
from cast_train.training import run
from cast_train.training.adams import AdamS
from cast_train.training.prepare import Prepared
from cast_train.training.trainer import CastTrainer


def compute_inexactly() -> None:
    generator = torch.Generator().manual_seed(0)
    forward, update = nn.Linear.forward, AdamS._update

    def inexact(tensor: Tensor, share: float) -> Tensor:
        return tensor * (1 + share * torch.randn(tensor.shape, generator=generator))

    def update_inexactly(self: AdamS, parameter: Tensor, group: dict[str, Any]) -> None:
        update(self, parameter, group)
        parameter.copy_(inexact(parameter, 1e-3))

    nn.Linear.forward = lambda self, x: inexact(forward(self, x), 1e-2)  # type: ignore[method-assign]
    AdamS._update = update_inexactly  # type: ignore[method-assign]


def leave(when: str, found: dict[str, Any]) -> None:
    torch.save(found, Path(os.environ["FOUND"], f"{when}-{sharding.rank()}"))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in found.items()}


def leave_start(*arguments: Any) -> Prepared:
    prepared = prepare(*arguments)
    order = prepared.choices.order
    choices = {
        "kept_dense": list(prepared.choices.kept_dense),
        "order": order and [order.residual, order.inner, order.values],
    }
    # Copies are made alike before the first step, shares of the parameters are not.
    leave("start", choices | (state_of(prepared.model) if arguments[3].is_sharded else {}))
    return prepared


def leave_end(self: CastTrainer, **arguments: Any) -> Any:
    done = fit(self, **arguments)
    assert self.optimizer is not None
    states = getattr(self.optimizer, "optimizer", self.optimizer).state.values()
    masks = {f"dropped {i}": s["dropped"] for i, s in enumerate(states) if "dropped" in s}
    if self.config.is_sharded:
        leave("end", sharding.whole_state(self.model))
    else:
        model = self.accelerator.unwrap_model(self.model)
        # AdamS's weights are off by rounding, and by more than that where its masks are.
        leave("end", masks or state_of(model))
    return done


prepare, fit = run.prepare, CastTrainer.train
run.prepare = leave_start
CastTrainer.train = leave_end  # type: ignore[method-assign]
if sharding.rank() == 1:
    compute_inexactly()
main()
