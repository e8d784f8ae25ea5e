"""`cast-train` for torchrun, whose second process computes as an unlike CPU does, only worse.

Its linears are off by a hundredth and AdamS's steps by a thousandth. Into the directory FOUND each
process puts what it starts to train from and what it ends with: start-RANK and end-RANK.
"""

import os
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from cast_train import sharding
from cast_train.__main__ import main
from cast_train.training import prepare, run
from cast_train.training.adams import AdamS
from cast_train.training.trainer import CastTrainer


def compute_inexactly():
    generator = torch.Generator().manual_seed(0)
    forward, update = nn.Linear.forward, AdamS._update

    def inexact(tensor, share):
        return tensor * (1 + share * torch.randn(tensor.shape, generator=generator))

    def update_inexactly(self, parameter, group):
        update(self, parameter, group)
        parameter.copy_(inexact(parameter, 1e-3))

    patch.object(nn.Linear, "forward", lambda self, x: inexact(forward(self, x), 1e-2)).start()
    patch.object(AdamS, "_update", update_inexactly).start()


def leave(when, found):
    torch.save(found, Path(os.environ["FOUND"], f"{when}-{sharding.rank()}"))


def state_of(model):
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: sharding.whole(tensor.detach()) for name, tensor in found.items()}


def leave_all():
    fit = CastTrainer.train

    def leave_start(*inputs):
        prepared = prepare.prepare(*inputs)
        order = prepared.choices.order
        found = {
            "kept_dense": list(prepared.choices.kept_dense),
            "order": order and [order.residual, order.inner, order.values],
        }
        # Copies are made alike before the first step, shares of the parameters are not.
        leave("start", found | (state_of(prepared.model) if inputs[4].is_sharded else {}))
        return prepared

    def leave_end(self, **arguments):
        done = fit(self, **arguments)
        states = getattr(self.optimizer, "optimizer", self.optimizer).state.values()
        masks = {f"dropped {i}": s["dropped"] for i, s in enumerate(states) if "dropped" in s}
        # AdamS's weights are off by rounding, and by more than that where its masks are.
        leave("end", masks or state_of(self.accelerator.unwrap_model(self.model)))
        return done

    patch.object(run, "prepare", leave_start).start()
    patch.object(CastTrainer, "train", leave_end).start()


leave_all()
if sharding.rank() == 1:
    compute_inexactly()
main()
