import math

import pytest
import torch
from torch import nn

from cast_train.config import Adams
from cast_train.training import adams


def optimizer_of(*parameters, pattern=(2, 4), **settings):
    groups = [{"params": list(parameters), "pattern": pattern}]
    options = {"lr": 0.1, "total_steps": 10, "decay": 0.5, "mask_every": 1} | settings
    return adams.AdamS(groups, **options)


def test_two_steps_by_hand():
    parameter = nn.Parameter(torch.tensor([[4.0, 3.0, 0.2, -0.1]]))
    optimizer = optimizer_of(parameter)
    parameter.grad = torch.tensor([[1.0, -2.0, 1.0, 1.0]])
    optimizer.step()
    # step 1 of 10: bias-corrected mu is g; dropped ones: 0.9 g + 0.1 * 0.5 sign(W); v is its square
    expected = torch.tensor([[3.9, 3.1, 0.1, -0.2]])
    torch.testing.assert_close(parameter.detach(), expected)
    parameter.grad = torch.zeros(1, 4)
    optimizer.step()
    mu = 0.9 * 0.1 / (1 - 0.9**2)
    v = (0.999 * 0.001 + 0.001 * mu**2) / (1 - 0.999**2)
    pulled = 0.8 * mu - 0.2 * 0.5  # the fourth weight: sign -1
    v_pulled = (0.999 * 0.001 * 0.85**2 + 0.001 * pulled**2) / (1 - 0.999**2)
    assert parameter[0, 0].item() == pytest.approx(3.9 - 0.1 * mu / math.sqrt(v), rel=1e-5)
    assert parameter[0, 3].item() == pytest.approx(
        -0.2 - 0.1 * pulled / math.sqrt(v_pulled), rel=1e-5
    )


def test_without_a_pattern_it_is_adam():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 8)) for _ in range(2))
    mine, adam = optimizer_of(ours, pattern=None), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        ours.grad = torch.randn(3, 8)
        theirs.grad = ours.grad.clone()
        mine.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_dropped_weights_walk_to_zero_and_kept_ones_stay():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(16, 32))
    groups = [{"params": [parameter], "pattern": (2, 4)}]
    optimizer = adams.AdamS(groups, lr=0.02, total_steps=300, decay=1e-3, mask_every=10)
    for _ in range(300):
        parameter.grad = torch.randn_like(parameter) * 1e-4
        optimizer.step()
    smallest = parameter.detach().abs().unflatten(-1, (-1, 4)).sort(-1).values
    assert smallest[..., :2].mean() < 0.05 * smallest[..., 2:].mean()


def test_a_plan_that_cannot_reach_is_refused(caplog):
    config = Adams(steps=100, learning_rate=1e-4, warmup_fraction=0.0)
    # cosine: sum of lr (1 + cos) / 2 * t / T = lr T (1/4 - 1 / pi^2), nearly
    assert adams.reach(config) == pytest.approx(1e-2 * (0.25 - 1 / math.pi**2), rel=0.05)
    with pytest.raises(
        ValueError, match="dropped weights are 0.4 on average.*raise steps or learning_rate"
    ):
        adams.check_reach(config, {"a": torch.tensor([[3.0, 4.0, 0.3, 0.5]])})
    adams.check_reach(config, {"a": torch.tensor([[3.0, 4.0, 1e-4, 3e-4]])})
    assert not caplog.messages
    adams.check_reach(config, {"a": torch.tensor([[3.0, 4.0, 5e-4, 15e-4]])})
    assert "by 0.0015, and dropped weights are 0.001 on average" in caplog.text
