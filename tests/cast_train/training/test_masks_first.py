"""`masks_first`: gates learn on unmoved weights, which are then solved for the mask and trained."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cast_serve.sparsity.pattern import hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import conv1d, models
from cast_train.config import Fixed, Gates, TrainConfig
from cast_train.gates.schedules import gate_rate_factor, learning_rate_factor
from cast_train.pruning import oneshot
from cast_train.pruning.scores import weight_rows
from cast_train.pruning.solve import solve
from cast_train.tokens import read_tokens, to_blocks
from cast_train.training.blocks import read_blocks, split_held_out
from cast_train.training.prepare import prepare
from cast_train.training.run import train
from tests.cast_train.settings import changed


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(
        settings_file,
        masks_first=True,
        steps=10,
        hard_fraction=0.5,
        tau_start=0.5,
        tau_end_fraction=0.4,
        gate_learning_rate=1.0,
        warmup_fraction=0.2,
    )


def assert_solved_from_dense(model_dir, text_file, config, written):
    """Whether the kept weights of what a run wrote are the dense ones, solved for its masks.

    Returns:
        the masks, bool [out_features, in_features] by name.
    """
    dense = models.load_dense(model_dir, torch.float32)
    targets, _ = find_targets(dense, config.pattern)
    written = conv1d.transposed(dense, written)
    masks = {name: hard_mask(written[f"{name}.gate"], config.pattern) for name in targets}
    blocks = to_blocks(
        read_tokens([text_file], models.load_tokenizer(model_dir)), config.block_size
    )
    train, _ = split_held_out(
        len(blocks), config.heldout_blocks, config.batch_blocks, config.block_size
    )
    solve(dense, targets, masks, blocks[train[: config.calibration_blocks]])
    for name, linear in targets.items():
        weight = written[f"{name}.weight"].float()
        torch.testing.assert_close(weight * masks[name], weight_rows(linear), rtol=2e-2, atol=2e-3)
    return masks


@pytest.mark.parametrize("hard_fraction", [0.0, 0.5], ids=["fixed", "learnt"])
def test_weights_that_do_not_learn_are_the_dense_ones_solved_for_the_mask(
    model_dir, text_file, config, tmp_path, hard_fraction
):
    config = changed(
        config,
        learning_rate=0.0,
        hard_fraction=hard_fraction,
        tau_end_fraction=min(config.tau_end_fraction, hard_fraction),
    )
    record = train(model_dir, [text_file], tmp_path / "out", config)
    assert (record["gates"]["flipped_share"] > 0) == (hard_fraction > 0)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_solved_from_dense(model_dir, text_file, config, written)


def test_solved_weights_are_trained_on(
    model_dir, text_file, heldout_file, config, tmp_path, untrained_perplexity
):
    config = changed(config, steps=30)
    record = train(model_dir, [text_file], tmp_path / "out", config, heldout_file=heldout_file)
    assert record["quality"]["perplexity_hard"] < 0.88 * untrained_perplexity


@pytest.mark.parametrize("stop_at", [3, 5, 7], ids=["gates", "border", "weights"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    stop_at, llama_dir, text_file, config, tmp_path, train_until, begun_at
):
    config = changed(config, checkpoint_every=1)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    train_until(stop_at, llama_dir, [text_file], tmp_path / "out", config)
    train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    # From the start it would end the same.
    assert begun_at == [None, None, f"checkpoint-{stop_at}"]
    whole, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_order_of_sparsegpt_leaves_the_weights(llama_dir, text_file, config, tmp_path):
    config = changed(
        config, start="sparsegpt", hard_fraction=0.99, learning_rate=0.0, gate_learning_rate=0.0
    )
    found = {}
    for start in ("sparsegpt", "wanda"):
        out = tmp_path / start
        train(llama_dir, [text_file], out, changed(config, start=start))
        written = load_file(out / "model.safetensors")
        found[start] = assert_solved_from_dense(llama_dir, text_file, config, written)
    assert any((found["sparsegpt"][name] != found["wanda"][name]).any() for name in found["wanda"])


@pytest.mark.parametrize("selector", ["soft_topk", "gumbel", "generator"])
@pytest.mark.parametrize("masks_first", [True, False])
def test_gates_without_reach_are_a_fixed_mask(
    masks_first, selector, llama_dir, text_file, settings_file, tmp_path
):
    """To the bit, after training: the start is the same."""
    no_soft_step = {"hard_fraction": 0.0, "tau_end_fraction": 0.0, "masks_first": masks_first}
    ways: dict[str, dict[str, Any]] = {
        "fixed": {"method": "fixed"},
        "gates": {"selector": selector, **no_soft_step},
    }
    for name, way in ways.items():
        config = TrainConfig.from_toml(settings_file, steps=5, **way)
        record = train(llama_dir, [text_file], tmp_path / name, config)
        assert (record["method"], record["gates"]["flipped_share"]) == (name, 0)
        assert "reach" not in record["gates"]
    fixed, gates = (load_file(tmp_path / name / "model.safetensors") for name in ways)
    masks = {key.removesuffix(".gate"): m for key, m in fixed.items() if key.endswith(".gate")}
    for key, value in fixed.items():
        found, mask = gates[key], masks.get(key.removesuffix(".weight"))
        if key.endswith(".gate"):
            found = hard_mask(found)
        elif mask is not None:
            found = found * mask  # gates keep what the mask drops
        assert torch.equal(value, found), key


def test_where_gates_moved_the_mask_kept_weights_are_solved_again(
    llama_dir, text_file, settings_file, tmp_path, monkeypatch
):
    """Nothing but gates learns, so a row that changed is solved as if its mask had been fixed."""
    config = TrainConfig.from_toml(settings_file, steps=8).as_dict()
    config |= {"hard_fraction": 0.5, "tau_end": 0.1, "gate_learning_rate": 0.3}
    config |= {"learning_rate": 0.0, "include": ["layers.0.self_attn.q_proj"]}
    record = train(llama_dir, [text_file], tmp_path / "gates", TrainConfig.from_dict(config))
    assert record["gates"]["flipped_share"] > 0.01
    written = load_file(tmp_path / "gates/model.safetensors")
    name = record["targets"][0]
    mask = hard_mask(written[f"{name}.gate"])
    same_blocks = Fixed(block_size=32, calibration_blocks=4)
    monkeypatch.setattr(oneshot, "Fixed", lambda: same_blocks)
    solved = oneshot.write_pruned(
        *(llama_dir, [text_file], tmp_path / "solved", "mask"),
        mask_dir=tmp_path / "gates",
        is_solved=True,
        exclude=[f"^(?!.*{name})"],
    )
    assert solved["targets"] == [name]
    wanted = load_file(tmp_path / "solved/model.safetensors")[f"{name}.weight"]
    found = (written[f"{name}.weight"] * mask).float()
    unsolved = load_file(llama_dir / "model.safetensors")[f"{name}.weight"] * mask
    assert (found - wanted).norm() < 0.2 * (unsolved - wanted).norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_weights_are_the_teachers_where_those_are_the_same(
    precision, llama_dir, text_file, settings_file
):
    config = TrainConfig.from_toml(settings_file, precision=precision)
    tokenizer = models.load_tokenizer(llama_dir)
    blocks = read_blocks([text_file], None, tokenizer, config)
    found = prepare(llama_dir, None, None, blocks, config)
    given = models.load_dense(llama_dir, torch.float32)
    for name, weight in found.dense.items():
        theirs = found.teacher.get_submodule(name).weight
        assert (weight.data_ptr() == theirs.data_ptr()) is (precision == "fp32")
        assert torch.equal(weight, given.get_submodule(name).weight)


def test_the_schedules_by_hand():
    config = Gates(steps=12, masks_first=True, hard_fraction=1 / 3, warmup_fraction=0.25)
    gates = [gate_rate_factor(step, config) for step in range(12)]
    weights = [learning_rate_factor(step, config) for step in range(12)]
    assert gates == pytest.approx([0.1, 0.19, 0.271, 0.3439] + [0.0] * 8)
    assert weights[:7] == [0.0] * 4 + [0.0, 0.5, 1.0]
    assert weights[9] == pytest.approx(0.5)  # half of the six steps of the cosine
    assert learning_rate_factor(12, config) == pytest.approx(0.0)
