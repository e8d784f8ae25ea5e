import copy
import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig

from cast_serve.checkpoint.record import CheckpointError, verify
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, PatternError
from cast_train.checkpoint.models import kind_of, load_dense
from cast_train.config import Fixed
from cast_train.pruning import oneshot, permute, reorder
from tests.cast_train.training.test_architectures import COMMON, FAMILIES

OTHER_LAYOUTS = ("gpt2", "opt")
LIKE_LLAMA = {name: config for name, (config, _) in FAMILIES.items() if name not in OTHER_LAYOUTS}
LIKE_LLAMA["llama, with biases"] = LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)
LIKE_LLAMA["llama, tied"] = LlamaConfig(**COMMON, tie_word_embeddings=True)
TOKENS = torch.arange(64).view(2, 32)


def kept_share(scores, order, pattern):
    grouped = scores[:, order].unflatten(1, (-1, pattern.m))
    return float(grouped.topk(pattern.n, dim=-1).values.sum() / scores.sum())


@pytest.mark.parametrize("pattern", [Pattern(1, 4), TWO_FOUR, Pattern(4, 8)], ids=str)
def test_the_order_found_keeps_what_is_said_and_more_than_the_given(pattern):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(16, 32, generator=generator).square()
    order, before, after = permute.search(scores, pattern, generator)
    assert order.sort().values.tolist() == list(range(32))
    assert before == pytest.approx(kept_share(scores, torch.arange(32), pattern))
    assert after == pytest.approx(kept_share(scores, order, pattern))
    assert after > before * 1.02


def test_of_two_groups_the_best_order_is_found():
    """All 70 ways to fill the first group are tried."""
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    ways = (
        (*left, *(k for k in range(8) if k not in left))
        for left in itertools.combinations(range(8), 4)
    )
    best = max(kept_share(scores, list(way), TWO_FOUR) for way in ways)
    found = permute.search(scores, TWO_FOUR, torch.Generator().manual_seed(0))[2]
    assert found == pytest.approx(best, abs=0.01)


def test_channels_that_crowd_together_are_spread():
    """Half of the channels are zero and fill whole groups: an order keeps everything."""
    scores = torch.cat([torch.rand(5, 16), torch.zeros(5, 16)], dim=1)
    order, before, after = permute.search(scores, TWO_FOUR, torch.Generator())
    assert before < 0.9
    assert after == pytest.approx(1)
    assert (order.view(-1, 4) < 16).sum(1).tolist() == [2] * 8


@pytest.mark.parametrize("config", LIKE_LLAMA.values(), ids=LIKE_LLAMA)
def test_a_model_computes_the_same_and_pruning_keeps_more(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # norms and biases too tell the channels apart
        parameter.data.normal_(std=0.3)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(TOKENS).logits
    given = copy.deepcopy(model)
    order, shares = permute.permute(model, TOKENS, TWO_FOUR)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-3, atol=1e-4)
    assert set(shares) == {"residual", "inner", "values"}
    assert all(after > first for first, after in shares.values())
    reorder.reorder(given, order)
    assert all(map(torch.equal, given.parameters(), model.parameters()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    still = {name for name in weights if name not in moved}
    assert all(
        "q_norm" in name or "k_norm" in name or "q_proj.bias" in name or "k_proj.bias" in name
        for name in still
    )


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_another_layout_is_refused_unchanged(family):
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0])
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="is not a decoder of Llama's layout"):
        permute.permute(model, TOKENS, TWO_FOUR)
    assert all(map(torch.equal, weights, model.parameters()))


def test_channels_without_whole_groups_are_refused(llama_dir):
    with pytest.raises(PatternError, match="hidden_size 32 .* multiple of 5"):
        permute.permute(load_dense(llama_dir, torch.float32), TOKENS, Pattern(2, 5))


def test_wide_groups_are_not_searched(llama_dir):
    with pytest.raises(PatternError, match=r"16:32 has groups of 32 channels.*up to 8"):
        permute.permute(load_dense(llama_dir, torch.float32), TOKENS, Pattern(16, 32))


def test_a_model_that_computes_something_else_is_refused(
    llama_dir, text_file, tmp_path, monkeypatch
):
    """As one would whose channels are read somewhere that we do not know of."""
    monkeypatch.setattr(reorder, "residual_readers", lambda layer: [layer.self_attn.q_proj])
    with pytest.raises(ValueError, match="; train it without reordering"):
        permute.write_permuted(llama_dir, [text_file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_order_of_another_shape_is_refused(llama_dir):
    model = load_dense(llama_dir, torch.float32)
    weights = [parameter.clone() for parameter in model.parameters()]
    order, _ = permute.permute(copy.deepcopy(model), TOKENS, TWO_FOUR)
    narrow = dataclasses.replace(order, residual=list(range(16)))
    with pytest.raises(ValueError, match="of 16 places were ordered, but .* has hidden_size 32"):
        reorder.reorder(model, narrow)
    shallow = dataclasses.replace(order, inner=order.inner[:1], values=order.values[:1])
    with pytest.raises(
        ValueError, match=r"has 2 layers, the first with 64 inner .* are 1 with 64 and \[16\]"
    ):
        reorder.reorder(model, shallow)
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_directory_is_written_whole(large_weights_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(oneshot, "Fixed", lambda: Fixed(block_size=32, calibration_blocks=4))
    record = permute.write_permuted(large_weights_dir, [text_file], tmp_path / "out")
    assert verify(tmp_path / "out") == record
    assert record["kept_share"].keys() == {"residual", "inner", "values"}
    assert kind_of(tmp_path / "out") == "dense"
    given, written = (
        load_file(folder / "model.safetensors") for folder in (large_weights_dir, tmp_path / "out")
    )
    assert written.keys() == given.keys()
    for name, weight in written.items():
        assert not torch.equal(weight.float(), given[name]), name
        assert torch.equal(*(w.float().flatten().sort().values for w in (weight, given[name])))
        for dim in range(weight.ndim):  # whole rows and whole columns were moved
            sums = (w.double().sum(dim).sort().values for w in (weight, given[name]))
            torch.testing.assert_close(*sums)
    before, after = (
        load_dense(folder, torch.float32)(TOKENS).logits
        for folder in (large_weights_dir, tmp_path / "out")
    )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="out exists"):
        permute.write_permuted(large_weights_dir, [text_file], tmp_path / "out")


def test_only_the_groups_of_targets_count(llama_dir):
    """Queries, keys and values that stay dense would want another order."""
    model = load_dense(llama_dir, torch.float32)
    model.model.layers[0].self_attn.q_proj.weight.data[:, :16] *= 100
    orders = []
    for exclude in ([], ["self_attn"]):
        given = copy.deepcopy(model)
        order, shares = permute.permute(given, TOKENS, TWO_FOUR, exclude=exclude)
        torch.testing.assert_close(given(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-4)
        orders.append(order)
    assert orders[0].residual != orders[1].residual
    assert orders[1].values == [[list(range(16))]] * 2
    assert shares.keys() == {"residual", "inner"}


def test_norms_without_weights_have_no_order():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoConfig(**COMMON)).float().eval()
    before = model(TOKENS).logits
    permute.permute(model, TOKENS, TWO_FOUR)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-3, atol=1e-4)
