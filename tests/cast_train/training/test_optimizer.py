import copy
import math

import pytest
import torch
from torch import nn

from cast_serve.sparsity.pattern import TWO_FOUR
from cast_train.config import Gates
from cast_train.gates import gating
from cast_train.training import optimizer


@pytest.fixture
def linear():
    return nn.Linear(4, 2, bias=True)


def made(linear, **settings):
    model = nn.Sequential(linear)
    gates = gating.attach(
        {"0": linear}, {"0": TWO_FOUR}, selector=settings.get("selector", "soft_topk")
    )
    config = Gates(**settings)
    return gates, optimizer.make(model, gates, {"0": linear}, config)


def test_a_logit_moves_in_proportion_to_its_gradient(linear):
    gates, optimiser = made(linear, gate_learning_rate=0.1)
    logits = gates["0"].logits
    before = logits.detach().clone()
    gradient = torch.tensor([[3.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.5, -2.0]])
    for _ in range(7):
        logits.grad = gradient.clone()
        optimiser.step()
    root = gradient.square().mean().sqrt()
    torch.testing.assert_close(logits.detach() - before, -0.7 * gradient / root)


def test_noise_moves_a_logit_less_than_a_signal_of_its_size(linear):
    torch.manual_seed(0)
    gates, optimiser = made(linear, gate_learning_rate=0.01)
    logits = gates["0"].logits
    before = logits.detach().clone()
    for _ in range(200):
        logits.grad = torch.randn(logits.shape)
        logits.grad[0, 0] = 1.0
        optimiser.step()
    moved = (logits.detach() - before).abs().flatten()
    assert moved[0] == pytest.approx(200 * 0.01, rel=0.1)
    assert moved[1:].max() < 4 * math.sqrt(200) * 0.01


def test_weights_are_stepped_by_adamw_and_decayed_only_where_they_are_targets(linear):
    config = {"learning_rate": 0.01, "weight_decay": 0.5}
    gates, optimiser = made(linear, **config)
    twin = [nn.Parameter(p.detach().clone()) for p in (gates["0"].weight(), linear.bias)]
    reference = torch.optim.AdamW(
        [
            {"params": [twin[0]], "weight_decay": 0.5},
            {"params": [twin[1]], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for _ in range(3):
        for parameter, other in zip((gates["0"].weight(), linear.bias), twin, strict=True):
            parameter.grad = torch.randn(parameter.shape)
            other.grad = parameter.grad.clone()
        optimiser.step()
        reference.step()
    torch.testing.assert_close(gates["0"].weight().detach(), twin[0].detach())
    torch.testing.assert_close(linear.bias.detach(), twin[1].detach())


def test_the_generators_network_is_stepped_by_adamw(linear):
    _, optimiser = made(linear, selector="generator")
    roles = [group["role"] for group in optimiser.param_groups]
    assert roles == [optimizer.WEIGHTS, optimizer.WEIGHTS, optimizer.GENERATOR]


def test_state_survives_saving(linear):
    gates, optimiser = made(linear)
    gates["0"].logits.grad = torch.ones(2, 4)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    gates_again, again = made(nn.Linear(4, 2))
    again.load_state_dict(state)
    for one, other in ((optimiser, gates), (again, gates_again)):
        other["0"].logits.data.zero_()
        other["0"].logits.grad = torch.full((2, 4), 2.0)
        one.step()
    torch.testing.assert_close(gates["0"].logits, gates_again["0"].logits)
