import contextlib

import pytest
import torch
from torch import nn

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import inspect
from cast_serve.sparsity.pattern import TWO_FOUR, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.config import TrainConfig
from cast_train.pruning import allocate
from cast_train.pruning.oneshot import write_pruned
from cast_train.training.run import train


def loaded(directory):
    model = load_dense(directory, torch.float32)
    return model, find_targets(model, TWO_FOUR)[0]


@pytest.fixture
def blocks():
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


def test_a_cost_is_fishers_along_the_change(llama_dir, blocks):
    """Against gradients by the weights themselves, a token at a time."""
    model, targets = loaded(llama_dir)
    name = "model.layers.1.mlp.down_proj"
    change = {n: 0.01 * torch.randn(linear.weight.shape) for n, linear in targets.items()}
    found = allocate._costs(model, targets, change, blocks[:1])

    captured: dict[str, torch.Tensor] = {}
    model.requires_grad_(False)
    hook = targets[name].register_forward_hook(
        lambda _, inputs, outputs: captured.update(x=inputs[0], y=outputs.requires_grad_())
    )
    logits = model(input_ids=blocks[:1], use_cache=False).logits[0]
    hook.remove()
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum")
    (grad,) = torch.autograd.grad(loss, captured["y"])
    wanted = 0.0
    for token in range(blocks.shape[1]):
        by_weight = torch.outer(grad[0, token], captured["x"][0, token])
        wanted += 0.5 * float((by_weight * change[name]).sum() ** 2)
    assert found[name] == pytest.approx(wanted, rel=1e-3)


def test_the_cost_of_one_linear_is_about_what_its_pruning_costs(llama_dir, blocks):
    """The mean KL to the dense model, for a change so small that the second order is all of it."""
    model, targets = loaded(llama_dir)
    name = "model.layers.0.mlp.up_proj"
    weight = targets[name].weight
    change = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    many = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(2))
    estimated = allocate._costs(model, {name: targets[name]}, {name: change}, many)
    with torch.no_grad():
        before = model(input_ids=many, use_cache=False).logits.log_softmax(-1)
        weight += change
        after = model(input_ids=many, use_cache=False).logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum())
    # Tokens are taken as independent: what one token's change does to later ones is added up.
    assert estimated[name] == pytest.approx(kl, rel=0.35)


def test_a_gate_follows_the_distance_to_the_dense_model(llama_dir, blocks, monkeypatch):
    """Its first direction, against differences of the KL of models whose weights were changed."""
    monkeypatch.setattr(allocate, "STEPS", 1)
    monkeypatch.setattr(allocate, "autocast", lambda *_: contextlib.nullcontext())
    model, targets = loaded(llama_dir)
    model.requires_grad_(False)
    dense = {name: linear.weight.clone() for name, linear in targets.items()}
    change = {name: 0.05 * torch.randn(weight.shape) for name, weight in dense.items()}
    units = allocate._units(model, targets, blocks[:1])
    sizes = [sum(dense[name].numel() for name in unit) for unit in units]
    found = allocate._learn_gates(model, targets, units, change, blocks, 0.25 * sum(sizes))
    wanted = model(input_ids=blocks).logits.double().log_softmax(-1)

    def distance(gates):
        for unit, gate in zip(units, gates, strict=True):
            for name in unit:
                targets[name].weight.copy_(dense[name] + (1 - gate) * change[name])
        got = model(input_ids=blocks).logits.double().log_softmax(-1)
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    step = 0.05
    for number, size in enumerate(sizes):
        lower, upper = [0.25] * len(units), [0.25] * len(units)
        lower[number] -= step
        upper[number] += step
        slope = (distance(upper) - distance(lower)) / (2 * step)
        # The loss of a step is the sum over its blocks, each the mean over the block's tokens.
        assert found[number][1] == pytest.approx(-slope * len(blocks) / size, rel=0.02)


@pytest.mark.parametrize("budget", [0, 1, 7.5, 59, 60])
def test_gates_meet_the_budget(budget):
    generator = torch.Generator().manual_seed(0)
    gates, sizes = torch.randn(6, generator=generator), torch.tensor([10, 20, 5, 5, 10, 10])
    found = allocate._within_budget(gates, sizes, budget)
    assert float((found * sizes).sum()) == pytest.approx(budget, abs=1e-4)
    assert ((found >= 0) & (found <= 1)).all()
    inside = (found > 0) & (found < 1)
    shifts = (found - gates)[inside]
    assert torch.allclose(shifts, shifts[:1].expand_as(shifts), atol=1e-5)


@pytest.mark.parametrize("allocation", allocate.ALLOCATIONS)
@pytest.mark.parametrize("zeros", [1.0, 0.5, 0.4, 0.25, 0.1])
def test_the_share_of_zeros_is_reached_and_hardly_exceeded(model_dir, blocks, zeros, allocation):
    model, targets = loaded(model_dir)
    before = {name: p.clone() for name, p in model.named_parameters()}
    kept = allocate.keep_dense(model, targets, TWO_FOUR, blocks, zeros, allocation)
    sizes = {name: linear.weight.numel() for name, linear in targets.items()}
    pruned = sum(size for name, size in sizes.items() if name not in kept)
    reached = pruned / 2 / sum(sizes.values())
    assert (
        min(zeros, 0.5) <= reached < zeros + 0.15
    )  # a unit of so small a model is up to 1/6 of it
    assert bool(kept) == (zeros < 0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_linears_with_the_same_inputs_stay_together(llama_dir, blocks):
    model, targets = loaded(llama_dir)
    for zeros in (0.45, 0.35, 0.2):
        kept = allocate.keep_dense(model, targets, TWO_FOUR, blocks, zeros)
        for layer in range(2):
            for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                are_kept = {any(k.endswith(p) and f".{layer}." in k for k in kept) for p in parts}
                assert len(are_kept) == 1


@pytest.mark.parametrize("allocation", allocate.ALLOCATIONS)
def test_what_hurts_more_stays_dense(llama_dir, blocks, allocation):
    """A linear whose pruned half says nothing is pruned before all others."""
    model, targets = loaded(llama_dir)
    harmless = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        weight = targets[harmless].weight
        weight *= hard_mask(weight.abs())
    kept = allocate.keep_dense(model, targets, TWO_FOUR, blocks, 0.15, allocation)
    assert harmless not in kept
    assert len(kept) > len(targets) / 2


@pytest.mark.parametrize("zeros", [0.0, -1.0, float("nan")])
def test_impossible_shares_are_refused(llama_dir, blocks, zeros):
    model, targets = loaded(llama_dir)
    with pytest.raises(ValueError, match=f"zeros is {zeros}, but a share of zeros must be above 0"):
        allocate.keep_dense(model, targets, TWO_FOUR, blocks, zeros)
    with pytest.raises(ValueError, match=f"zeros is {zeros}, but"):
        TrainConfig.from_dict({"zeros": zeros})


def test_an_unknown_allocation_is_refused(llama_dir, blocks):
    model, targets = loaded(llama_dir)
    with pytest.raises(ValueError, match="'best' does not exist; choose fisher or gates"):
        allocate.keep_dense(model, targets, TWO_FOUR, blocks, 0.4, "best")


def test_a_run_trains_prunes_and_resumes_with_some_linears_dense(
    llama_dir, text_file, settings_file, tmp_path, train_until, monkeypatch
):
    config = TrainConfig.from_toml(settings_file, steps=6, zeros=0.4, checkpoint_every=2)
    record = train(llama_dir, [text_file], tmp_path / "whole", config)
    assert record["kept_dense"]
    assert not set(record["kept_dense"]) & set(record["targets"])
    pruned = write_pruned(llama_dir, [text_file], tmp_path / "pruned", "wanda", zeros=0.4)
    assert pruned["kept_dense"]
    model = load_dense(tmp_path / "pruned")
    for name in pruned["kept_dense"]:
        assert (model.get_submodule(name).weight != 0).all()

    convert(tmp_path / "whole", tmp_path / "compressed")
    sizes = {name: linear.weight.numel() for name, linear in loaded(llama_dir)[1].items()}
    share = sum(sizes[name] for name in record["kept_dense"]) / sum(sizes.values())
    for folder, bits in (("whole", 16), ("compressed", 9 + 7 * share)):
        summary = inspect(tmp_path / folder)
        assert summary["zeros"] == pytest.approx(0.5 * (1 - share), abs=1e-4)
        assert summary["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
        assert summary["dense_linear_weight_bytes"] == 2 * sum(sizes.values())
    assert inspect(llama_dir)["zeros"] is None

    train_until(3, llama_dir, [text_file], tmp_path / "out", config)
    monkeypatch.setattr("cast_train.training.prepare.keep_dense", None)  # not chosen again
    again = train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert again["kept_dense"] == record["kept_dense"]
    assert again["quality"] == record["quality"]
