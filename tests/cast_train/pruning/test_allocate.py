import itertools

import pytest
import torch
from torch import nn

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.config import TrainConfig
from cast_train.evaluate.evaluation import evaluate
from cast_train.pruning import allocate
from cast_train.pruning.oneshot import read_masks, write_pruned
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
    both = {n: [torch.zeros_like(change[n]), change[n]] for n in targets}
    found = allocate._costs(model, targets, both, blocks[:1], "fp32")

    captured: dict[str, torch.Tensor] = {}
    model.requires_grad_(False)
    hook = targets[name].register_forward_hook(
        lambda _, inputs, outputs: captured.update(x=inputs[0], y=outputs.requires_grad_())
    )
    logits = model(input_ids=blocks[:1], use_cache=False).logits[0]
    hook.remove()
    labels = allocate._drawn(logits.detach(), torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, captured["y"])
    wanted = 0.0
    for token in range(blocks.shape[1]):
        by_weight = torch.outer(grad[0, token], captured["x"][0, token])
        wanted += 0.5 * float((by_weight * change[name]).sum() ** 2)
    assert found[name] == [0, pytest.approx(wanted, rel=1e-3)]


def test_costs_in_bf16_are_those_in_fp32_within_their_rounding(llama_dir, blocks):
    model, targets = loaded(llama_dir)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    changes = {
        name: [(0.05 * torch.randn(linear.weight.shape, generator=generator)).bfloat16()]
        for name, linear in targets.items()
    }
    exact, rounded = (
        allocate._costs(model, targets, changes, blocks, precision)
        for precision in ("fp32", "bf16")
    )
    for name in targets:
        assert rounded[name] == pytest.approx(exact[name], rel=0.1), name
    assert rounded != exact


def test_labels_are_drawn_from_the_models_own_distribution():
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = allocate._drawn(chances.log().expand(20_000, 4), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, chances, rtol=0, atol=0.015)  # four standard deviations
    assert shares[1] == 0


def test_the_cost_of_one_linear_is_about_what_its_pruning_costs(llama_dir, blocks):
    """The mean KL to the dense model, for a change so small that the second order is all of it."""
    model, targets = loaded(llama_dir)
    name = "model.layers.0.mlp.up_proj"
    weight = targets[name].weight
    change = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    many = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(2))
    estimated = allocate._costs(model, {name: targets[name]}, {name: [change]}, many, "fp32")
    with torch.no_grad():
        before = model(input_ids=many, use_cache=False).logits.log_softmax(-1)
        weight += change
        after = model(input_ids=many, use_cache=False).logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum())
    # Tokens are taken as independent: what one token's change does to later ones is added up.
    assert estimated[name] == [pytest.approx(kl, rel=0.35)]


def test_the_least_sum_of_costs_that_the_budget_pays_is_found():
    """Against all choices, of costs that fall less and less as prices rise."""
    generator = torch.Generator().manual_seed(0)
    prices = [1.0, 2.0, 3.0, 4.0]
    units = []
    for _ in range(6):
        falls = torch.rand(3, generator=generator).sort(descending=True).values.cumsum(0)
        units.append([(price, 3 - float(f)) for price, f in zip(prices, [0, *falls], strict=True)])
    for budget in range(6, 25):
        chosen = allocate.spend(units, budget)
        assert sum(units[i][option][0] for i, option in enumerate(chosen)) <= budget
        least = min(
            sum(units[i][option][1] for i, option in enumerate(options))
            for options in itertools.product(range(4), repeat=6)
            if sum(prices[option] for option in options) <= budget
        )
        found = sum(units[i][option][1] for i, option in enumerate(chosen))
        assert found == pytest.approx(least)


def test_what_is_left_below_a_dear_upgrade_buys_a_cheaper_one():
    units = [[(1.0, 9.0), (8.0, 0.0)], [(1.0, 2.0), (2.0, 1.5)]]
    assert allocate.spend(units, 4.0) == [0, 1]
    assert allocate.spend(units, 9.0) == [1, 0]
    assert allocate.spend(units, 2.0) == [0, 0]


@pytest.mark.parametrize("zeros", [1.0, 0.5, 0.4, 0.25, 0.1])
def test_the_share_of_zeros_is_reached_and_hardly_exceeded(model_dir, blocks, zeros):
    model, targets = loaded(model_dir)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = allocate.allocate(model, targets, TWO_FOUR, blocks, zeros)
    sizes = {name: linear.weight.numel() for name, linear in targets.items()}
    reached = sum(sizes[name] for name in found) / 2 / sum(sizes.values())
    assert (
        min(zeros, 0.5) <= reached < zeros + 0.15
    )  # a unit of so small a model is up to 1/6 of it
    assert set(found.values()) == {TWO_FOUR}
    assert (found.keys() == targets.keys()) == (zeros >= 0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("zeros", [0.125, 0.3, 0.5, 0.7, 0.9375])
def test_n_of_64_meets_the_share_of_zeros(words_dir, blocks, zeros):
    model, targets = loaded(words_dir)
    found = allocate.allocate(model, targets, Pattern(32, 64), blocks, zeros)
    assert list(found) == list(targets)
    assert all(pattern.m == 64 and pattern.n % 4 == 0 for pattern in found.values())
    sizes = {name: linear.weight.numel() for name, linear in targets.items()}
    reached = sum(found[name].zeros * size for name, size in sizes.items()) / sum(sizes.values())
    assert zeros <= reached < zeros + 0.01  # 4 of 64 of the smallest unit are less


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(32, 64)], ids=str)
def test_linears_with_the_same_inputs_get_the_same(words_dir, blocks, pattern):
    model, targets = loaded(words_dir)
    for zeros in (0.45, 0.35, 0.2):
        found = allocate.allocate(model, targets, pattern, blocks, zeros)
        for layer in range(2):
            for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                names = [n for n in targets if n.endswith(parts) and f".{layer}." in n]
                assert len(names) == len(parts)
                assert len({found.get(name) for name in names}) == 1


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(32, 64)], ids=str)
def test_what_hurts_more_keeps_more(words_dir, blocks, pattern):
    """A linear whose smaller half says nothing is pruned before all others."""
    model, targets = loaded(words_dir)
    harmless = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        weight = targets[harmless].weight
        weight *= hard_mask(weight.abs(), pattern)
    found = allocate.allocate(model, targets, pattern, blocks, 0.15)
    others = [found[name] for name in found if name != harmless]
    assert found[harmless] == pattern
    if pattern == TWO_FOUR:
        assert len(others) < len(targets) / 2
    else:
        assert min(other.n for other in others) > pattern.n


def test_between_measured_n_costs_follow_a_power_of_the_zeros():
    measured = [Pattern(n, 64) for n in allocate.MEASURED]
    costs = [3.0 * pattern.zeros**3.5 for pattern in measured]
    for n in range(4, 57, 4):
        found = allocate._cost_of(Pattern(n, 64), costs, measured)
        assert found == pytest.approx(3.0 * (1 - n / 64) ** 3.5)


@pytest.mark.parametrize("zeros", [0.0, -1.0, 0.6, 45.0, float("nan")])
def test_impossible_shares_are_refused(llama_dir, blocks, zeros):
    model, targets = loaded(llama_dir)
    with pytest.raises(ValueError, match=rf"zeros {zeros} is not a share above 0 and up to 0\.5"):
        allocate.allocate(model, targets, TWO_FOUR, blocks, zeros)
    with pytest.raises(ValueError, match=f"zeros {zeros} is no|zeros is {zeros}, but"):
        TrainConfig.from_dict({"zeros": zeros})
    if zeros != 0.6:  # which N of 64 can have
        with pytest.raises(ValueError, match=r"from 0\.125 up to 0\.9375"):
            Pattern(32, 64).check_zeros(zeros)


@pytest.mark.parametrize(
    ("bits", "quantization", "zeros", "least"),
    [
        (9, None, 0.5, 2),
        (5, Quantization("int8"), 0.5, 1.5),
        (3.125, Quantization("int4"), 0.5, 1.375),
        (4.5, Quantization("int4", 32), 0.25, 1.75),
    ],
)
def test_bits_are_a_share_of_zeros(bits, quantization, zeros, least):
    pattern = Pattern(32, 64)
    assert allocate.zeros_of_bits(bits, pattern, quantization) == pytest.approx(zeros)
    for wrong in (0.5, 17.0, float("nan")):
        with pytest.raises(ValueError, match=rf"bits {wrong:g} cannot .* takes {least} \(4:64\)"):
            allocate.zeros_of_bits(wrong, pattern, quantization)
    with pytest.raises(ValueError, match="sparsity is 2:4; set sparsity to 32:64"):
        allocate.zeros_of_bits(bits, TWO_FOUR, quantization)


@pytest.mark.parametrize("method", ["fixed", "gates", "ste", "adams"])
def test_a_run_with_n_of_its_own_for_each_linear_is_trained_and_converted(
    method, words_dir, text_file, settings_file, tmp_path, train_until, monkeypatch
):
    settings: dict[str, object] = {"sparsity": "32:64", "zeros": 0.4, "steps": 6}
    settings |= {"checkpoint_every": 2}
    if method == "adams":
        settings |= {"learning_rate": 0.05, "mask_every": 2}
    common = TrainConfig.from_toml(settings_file, method=method).as_dict()
    config = TrainConfig.from_dict(common | settings)
    record = train(words_dir, [text_file], tmp_path / "whole", config)
    kept = record["kept_of_64"]
    assert (record["n"], record["m"]) == (38, 64)
    assert kept.keys() == set(record["targets"])  # 38 is no multiple of 4
    assert len(set(kept.values())) > 1
    assert not record["kept_dense"]
    summary = convert(tmp_path / "whole", tmp_path / "sparse", quantization=Quantization("int8"))
    assert summary["zeros"] == pytest.approx(0.4, abs=0.01)
    assert summary["pattern"] == f"{min(kept.values())}-{max(kept.values())}:64"
    for name, mask in read_masks(
        tmp_path / "sparse",
        loaded(words_dir)[1],
        {name: Pattern(n, 64) for name, n in kept.items()},
    ).items():
        assert (mask.unflatten(-1, (-1, 64)).sum(-1) == kept[name]).all()
    found, _ = evaluate(tmp_path / "whole", [text_file], context=32, max_tokens=128)
    served, _ = evaluate(tmp_path / "sparse", [text_file], context=32, max_tokens=128)
    assert served["perplexity"] == pytest.approx(found["perplexity_hard"], rel=0.03)

    train_until(3, words_dir, [text_file], tmp_path / "out", config)
    monkeypatch.setattr("cast_train.training.prepare.allocate", None)  # not chosen again
    again = train(words_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert again["kept_of_64"] == kept
    assert again["quality"] == record["quality"]


def test_each_linears_n_is_kept_by_what_is_made_of_it(words_dir, text_file, tmp_path):
    """Trained further, and taken as another model's mask."""
    pruned = write_pruned(
        words_dir, [text_file], tmp_path / "pruned", "wanda", "32:64", zeros=0.4, is_solved=True
    )
    kept = pruned["kept_of_64"]
    again = write_pruned(
        words_dir, [], tmp_path / "again", "mask", "38:64", mask_dir=tmp_path / "pruned"
    )
    assert again["kept_of_64"] == kept
    settings: dict[str, object] = {"sparsity": "38:64", "distillation_weight": 0.0, "steps": 2}
    settings |= {"block_size": 32, "heldout_blocks": 4, "calibration_blocks": 4}
    config = TrainConfig.from_dict(settings)
    further = train(tmp_path / "pruned", [text_file], tmp_path / "further", config)
    assert further["kept_of_64"] == kept
    with pytest.raises(ValueError, match=r"zeros 0\.4 has no effect with method 'mask'"):
        write_pruned(
            *(words_dir, [text_file], tmp_path / "out", "mask", "38:64"),
            mask_dir=tmp_path / "pruned",
            zeros=0.4,
        )


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
    monkeypatch.setattr("cast_train.training.prepare.allocate", None)  # not chosen again
    again = train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert again["kept_dense"] == record["kept_dense"]
    assert again["quality"] == record["quality"]
