import copy
import math
import shutil
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import TWO_FOUR
from cast_train.config import Fixed, Gates
from cast_train.gates import gating
from cast_train.training import optimizer
from cast_train.training.run import train
from tests.cast_train.settings import of_file


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


def test_what_8_bits_need_is_named(monkeypatch):
    optimizer.check(Gates())

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    config = Fixed(optimizer="adamw8bit")
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "distribution", missing)
        with pytest.raises(UsageError, match=r"torchao.*run pip install 'cast-serve\[adamw8bit\]'"):
            optimizer.check(config)
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "some-compiler")
    with pytest.raises(UsageError, match="there is no some-compiler here; install it"):
        optimizer.check(config)


@pytest.mark.filterwarnings("ignore")  # torchao's and torch.compile's own
@pytest.mark.parametrize("method", ["fixed", "gates"])
def test_a_run_with_8_bit_moments_goes_on_to_the_same_weights(
    method, words_dir, text_file, settings_file, tmp_path, train_until, begun_at, monkeypatch
):
    """Its step is not compiled here, which takes most of a minute."""
    changes = {"method": method, "steps": 10, "checkpoint_every": 4, "hard_fraction": 0.7}
    config = of_file(settings_file, **changes, optimizer="adamw8bit")
    in_8_bits, made = optimizer._in_8_bits, []

    def remembered(groups):
        made.append(in_8_bits(groups))
        return made[-1]

    monkeypatch.setattr(optimizer, "_in_8_bits", remembered)
    with torch.compiler.set_stance("force_eager"):
        record = train(words_dir, [text_file], tmp_path / "whole", config)
        train_until(6, words_dir, [text_file], tmp_path / "out", config)
        train(words_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert begun_at == [None, None, "checkpoint-4"]
    large = [
        state
        for weight, state in made[0].state.items()
        if weight.numel() >= 4096 and "exp_avg" in state
    ]
    assert large
    assert all(state["exp_avg"].codes.dtype == torch.uint8 for state in large)
    whole, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = train(words_dir, [text_file], tmp_path / "plain", of_file(settings_file, **changes))
    quality = [each["quality"]["perplexity_hard"] for each in (record, other)]
    assert quality[0] != quality[1]
    assert quality[0] == pytest.approx(quality[1], rel=0.05)
