"""`channel_order = "auto"`: a run reorders the channels of model and teacher before it begins."""

import json
import logging
import shutil

import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.record import CheckpointError, verify
from cast_train.checkpoint import channel_order, models
from cast_train.checkpoint.channel_order import ORDER_FILE
from cast_train.config import TrainConfig
from cast_train.pruning import permute, reorder
from cast_train.pruning.oneshot import read_masks, write_pruned
from cast_train.training import prepare
from cast_train.training.blocks import read_blocks
from cast_train.training.run import train
from tests.cast_train.settings import changed

TOKENS = torch.arange(64).view(2, 32)


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(
        settings_file, method="fixed", channel_order="auto", hidden_states_weight=1.0, steps=8
    )


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the order was searched for")

    return lambda: monkeypatch.setattr(prepare, "permute", refuse)


def prepared(model_dir, text_file, config, teacher_dir=None):
    tokenizer = models.load_tokenizer(model_dir)
    blocks = read_blocks([text_file], None, tokenizer, config)
    sparse = models.sparse_targets(model_dir, config.pattern)
    return prepare.prepare(model_dir, sparse, teacher_dir, blocks, config)


def hidden_states(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, output_hidden_states=True).hidden_states


def test_model_and_teacher_have_the_same_order(large_weights_dir, text_file, config):
    unsolved = changed(config, method="gates", start="ones")
    found = prepared(large_weights_dir, text_file, unsolved)
    order = found.choices.order
    assert order.residual != sorted(order.residual)
    dense = models.load_dense(large_weights_dir, torch.float32)
    given = hidden_states(dense)[1]
    reorder.reorder(dense, order)
    for name, linear in found.targets.items():
        weight = linear.parametrizations.weight.original
        assert torch.equal(weight, dense.get_submodule(name).weight)
    ours, wanted = hidden_states(found.teacher.float()), hidden_states(dense)
    for layer in range(len(wanted)):
        torch.testing.assert_close(ours[layer], wanted[layer], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[1], given[..., order.residual], rtol=1e-3, atol=1e-3)


def test_what_is_made_of_it_says_the_order(large_weights_dir, text_file, config, tmp_path):
    train(large_weights_dir, [text_file], tmp_path / "gated", config)
    convert(tmp_path / "gated", tmp_path / "out")
    order = channel_order.read(tmp_path / "gated")
    assert channel_order.read(tmp_path / "out") == order

    pruned = tmp_path / "pruned"
    write_pruned(large_weights_dir, [], pruned, "mask", mask_dir=tmp_path / "gated")
    assert channel_order.read(pruned) == order
    dense = models.load_dense(large_weights_dir)
    reorder.reorder(dense, order)
    weights = models.load_dense(pruned).state_dict()
    targets = {name: dense.get_submodule(name) for name in verify(pruned)["targets"]}
    for name, mask in read_masks(
        tmp_path / "out", targets, dict.fromkeys(targets, config.pattern)
    ).items():
        assert torch.equal(weights[f"{name}.weight"], targets[name].weight * mask)

    found = prepared(tmp_path / "out", text_file, config, large_weights_dir)
    reordered = hidden_states(dense.float())
    torch.testing.assert_close(
        hidden_states(found.teacher.float())[1], reordered[1], rtol=1e-3, atol=1e-3
    )
    train(tmp_path / "out", [text_file], tmp_path / "on", config, teacher_dir=large_weights_dir)
    assert channel_order.read(tmp_path / "on") == order


def test_a_run_that_is_gone_on_with_keeps_its_order(
    large_weights_dir, text_file, config, tmp_path, train_until, no_search
):
    train(large_weights_dir, [text_file], tmp_path / "whole", config)
    train_until(6, large_weights_dir, [text_file], tmp_path / "out", config)
    no_search()
    train(large_weights_dir, [text_file], tmp_path / "out", config, is_resume=True)
    whole, resumed = verify(tmp_path / "whole"), verify(tmp_path / "out")
    assert resumed["sha256"] == whole["sha256"]
    assert resumed["gates"] == whole["gates"]
    assert channel_order.read(tmp_path / "out") == channel_order.read(tmp_path / "whole")


def test_what_permute_wrote_is_not_reordered_again(
    llama_dir, text_file, config, tmp_path, no_search
):
    permuted = tmp_path / "permuted"
    permute.write_permuted(llama_dir, [text_file], permuted)
    order = channel_order.read(permuted)
    with pytest.raises(ValueError, match="were reordered before; give the dense model"):
        permute.write_permuted(permuted, [text_file], tmp_path / "again")
    no_search()
    assert prepared(permuted, text_file, config).choices.order == order
    # Its teacher has the same order, whichever of the two it is read from.
    for teacher_dir in (None, permuted, llama_dir):
        found = prepared(permuted, text_file, config, teacher_dir)
        ours, theirs = hidden_states(models.load_dense(permuted)), hidden_states(found.teacher)
        torch.testing.assert_close(theirs[1].float(), ours[1].float(), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="the teacher .*permuted differs .* that both were"):
        prepared(llama_dir, text_file, config, permuted)

    write_pruned(permuted, [], tmp_path / "pruned", "magnitude")
    assert channel_order.read(tmp_path / "pruned") == order
    for model_dir, mask_dir in ((permuted, "pruned"), (llama_dir, "pruned")):
        out = tmp_path / f"by-{model_dir.name}"
        write_pruned(model_dir, [], out, "mask", mask_dir=tmp_path / mask_dir)
        assert channel_order.read(out) == order
    write_pruned(llama_dir, [], tmp_path / "given", "magnitude")
    with pytest.raises(ValueError, match="channel order of .* differs from that of"):
        write_pruned(permuted, [], tmp_path / "no", "mask", mask_dir=tmp_path / "given")


def test_another_layout_keeps_its_order(gpt2_dir, text_file, config, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(gpt2_dir, [text_file], tmp_path / "out", config)
    assert "keeping the given channel order: GPT2LMHeadModel" in caplog.text
    assert not (tmp_path / "out" / ORDER_FILE).exists()


def test_a_model_that_would_compute_something_else_is_trained_as_it_is(
    llama_dir, text_file, config, monkeypatch, caplog
):
    monkeypatch.setattr(reorder, "residual_readers", lambda layer: [layer.self_attn.q_proj])
    with caplog.at_level(logging.WARNING):
        found = prepared(llama_dir, text_file, changed(config, method="gates", start="ones"))
    assert "keeping the given channel order: LlamaForCausalLM computes" in caplog.text
    assert found.choices.order is None
    dense = models.load_dense(llama_dir, torch.float32)
    for name, linear in found.targets.items():
        weight = linear.parametrizations.weight.original
        assert torch.equal(weight, dense.get_submodule(name).weight)


def test_a_teacher_of_another_layout_is_refused(llama_dir, gpt2_dir, text_file, config, tmp_path):
    with pytest.raises(ValueError, match="cannot be reordered .* hidden_states_weight to 0"):
        train(llama_dir, [text_file], tmp_path / "out", config, teacher_dir=gpt2_dir)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"residual": [0, 1]}, "does not hold a channel order: KeyError"),
        ({"residual": [0, 0], "inner": [[0]], "values": [[[0]]]}, "not name every channel once"),
        ({"residual": [0, 1], "inner": [[0]], "values": []}, "not name every channel once"),
        ({"residual": [0, 1], "inner": [3], "values": [[[0]]]}, "does not hold a channel order"),
        ([0, 1], "holds list, not a JSON object"),
    ],
)
def test_a_damaged_order_is_refused(content, message, llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "model")
    (tmp_path / "model" / ORDER_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        channel_order.read(tmp_path / "model")
