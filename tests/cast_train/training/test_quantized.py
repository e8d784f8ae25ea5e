"""`quantize`: the last steps train what `convert --quantize` stores."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import SCALES_TRAINED, CheckpointError
from cast_serve.sparsity.bitmask import decompress
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask
from cast_serve.sparsity.quantize import SCALE_GROUP, SCALES_CHOSEN
from cast_train.checkpoint import conv1d, models
from cast_train.config import TrainConfig
from cast_train.evaluate.evaluation import evaluate
from cast_train.gates.schedules import phase_at
from cast_train.pruning.quantize import write_quantized
from cast_train.training.run import train
from cast_train.training.trainer import CastTrainer
from tests.cast_train.settings import changed


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(
        settings_file, steps=10, quantize="int4", scale_group=32, quantized_fraction=0.5
    )


def of_bits(quantize):
    return {"quantize": quantize, "scale_group": 32 if quantize == "int4" else 128}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def integers_of(written, name, pattern=TWO_FOUR):
    """A hardened weight over its scales: fp32 [out_features, in_features]."""
    gate, weight = written[f"{name}.gate"], written[f"{name}.weight"].float()
    scale = written[f"{name}.weight_scale"].float()
    columns = weight.shape[1] // scale.shape[1]
    return weight * hard_mask(gate, pattern) / scale.repeat_interleave(columns, dim=1)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_run_learns_as_it_is_served(
    quantize, model_dir, text_file, heldout_file, config, tmp_path, untrained_perplexity
):
    config = changed(config, **of_bits(quantize), steps=40, checkpoint_every=40)
    record = train(model_dir, [text_file], tmp_path / "out", config, heldout_file=heldout_file)
    scale_group = 32 if quantize == "int4" else None
    expected = {"quantize": quantize, "scale_group": scale_group, "num_steps": 20}
    assert record["trained_as"] == expected
    assert record["schedules_end"]["is_quantized"] is True
    found = record["quality"]
    assert found["perplexity_hard"] < 0.85 * untrained_perplexity
    assert found["perplexity_hard"] != pytest.approx(found["perplexity_soft"], rel=1e-6)
    again, _ = evaluate(tmp_path / "out", [text_file], context=32, max_tokens=128)
    assert again["perplexity_hard"] == pytest.approx(found["perplexity_hard"], rel=2e-3)
    written = conv1d.transposed(models.load_dense(model_dir), weights_of(tmp_path / "out"))
    largest = 7 if quantize == "int4" else 127
    for name in record["targets"]:
        assert written[f"{name}.weight_scale"].dtype == torch.bfloat16
        integers = integers_of(written, name)
        assert (integers.round().abs().max() / largest).item() == pytest.approx(1, abs=0.1)
        assert (integers - integers.round()).abs().max() <= largest * 2**-8


@pytest.mark.parametrize("sparsity", ["2:4", "40:64"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_is_converted_is_what_was_trained(
    quantize, sparsity, model_dir, text_file, heldout_file, config, tmp_path
):
    config = changed(config, **of_bits(quantize), steps=6, sparsity=sparsity)
    pattern = Pattern.parse(sparsity)
    record = train(model_dir, [text_file], tmp_path / "out", config, heldout_file=heldout_file)
    summary = convert(
        tmp_path / "out",
        tmp_path / "sparse",
        quantization=Quantization(quantize, scale_group=32 if quantize == "int4" else SCALE_GROUP),
    )
    assert summary["quality"] == record["quality"]  # what training measured is what is served
    cast = json.loads((tmp_path / "sparse/cast.json").read_text())
    assert cast["quantization"]["scales"] == SCALES_TRAINED
    written = conv1d.transposed(models.load_dense(model_dir), weights_of(tmp_path / "out"))
    directory = ModelDirectory(tmp_path / "sparse")
    for name in record["targets"]:
        found = CompressedLinear.from_parts(name, directory.parts(name), pattern)
        # As whole rows: of a group whose integers are 0 `convert` may keep other columns.
        stored = found.pattern
        integers = decompress(found.values, found.bitmask, found.in_features, pattern=stored)
        expected = integers_of(written, name, pattern).round()
        assert torch.equal(integers.float(), expected)
        assert torch.equal(found.scale, written[f"{name}.weight_scale"])
    served, _ = evaluate(tmp_path / "sparse", [text_file], context=32, max_tokens=128)
    assert served["perplexity"] == pytest.approx(record["quality"]["perplexity_hard"], rel=2e-3)


def test_a_conversion_to_something_else_is_warned_of(
    llama_dir, text_file, config, tmp_path, caplog
):
    train(llama_dir, [text_file], tmp_path / "out", changed(config, steps=2))
    wanted = "from the gated checkpoint with --quantize int4 --scale-group 32, but here"
    asked = [None, Quantization("int8"), Quantization("int4", scale_group=64)]
    for number, quantization in enumerate(asked):
        caplog.clear()
        convert(tmp_path / "out", tmp_path / str(number), quantization=quantization)
        assert wanted in caplog.text
        how = "with newly chosen scales" if quantization else "here it is not quantised"
        assert how in caplog.text
    caplog.clear()
    asked_for = Quantization("int4", 32)
    write_quantized(tmp_path / "out", [text_file], tmp_path / "calibrated", asked_for, 4)
    assert wanted in caplog.text
    assert "with newly chosen scales" in caplog.text
    cast = json.loads((tmp_path / "1/cast.json").read_text())
    assert cast["quantization"]["scales"] == SCALES_CHOSEN


def test_masks_first_solves_the_weights_before_they_are_quantised(
    llama_dir, text_file, config, tmp_path
):
    """Both at one step, weights that do not learn: integers lie within some steps of the solved."""
    config = changed(config, steps=4, learning_rate=0.0, masks_first=True, hard_fraction=0.5)
    assert phase_at(2, config).is_quantized
    assert not phase_at(1, config).is_hard
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    plain = changed(config, **of_bits("none"))
    train(llama_dir, [text_file], tmp_path / "plain", plain)
    written, solved = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    dense = models.load_dense(llama_dir).state_dict()
    for name in record["targets"]:
        mask = hard_mask(written[f"{name}.gate"])
        kept = [tensors[f"{name}.weight"][mask].float() for tensors in (written, solved, dense)]
        assert (kept[0] - kept[1]).norm() < 0.5 * (kept[0] - kept[2]).norm()


@pytest.mark.parametrize("stop_at", [4, 5, 7], ids=["before", "border", "quantised"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    stop_at, llama_dir, text_file, config, tmp_path, train_until, begun_at
):
    config = changed(config, checkpoint_every=1)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    train_until(stop_at, llama_dir, [text_file], tmp_path / "out", config)
    train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert begun_at == [None, None, f"checkpoint-{stop_at}"]
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_best_is_one_that_was_quantised(llama_dir, text_file, config, tmp_path, monkeypatch):
    measured = {}
    measure = CastTrainer.evaluate

    def remember(self, *args, **kwargs):
        metrics = measure(self, *args, **kwargs)
        measured[self.state.global_step] = metrics["eval_loss"]
        return metrics

    monkeypatch.setattr(CastTrainer, "evaluate", remember)
    config = changed(config, steps=8, evaluate_every=2, checkpoint_every=2, keep_best=True)
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    assert [step for step, loss in measured.items() if loss == float("inf")] == [2, 4]
    assert record["best_step"] in (6, 8)


def test_a_gated_checkpoint_without_its_scales_is_refused(llama_dir, text_file, config, tmp_path):
    config = changed(config, steps=2, **of_bits("none"))
    train(llama_dir, [text_file], tmp_path / "out", config)
    file = tmp_path / "out/cast.json"
    record = json.loads(file.read_text())
    assert record["trained_as"] is None
    trained_as = {"quantize": "int4", "scale_group": 32, "num_steps": 1}
    file.write_text(json.dumps(record | {"trained_as": trained_as}))
    with pytest.raises(CheckpointError, match="has no weight_scale for model.layers.0"):
        models.load_gated(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"quantize": "none"}, None),
        ({}, 6),
        ({"quantized_fraction": 0.75}, 9),
        ({"quantized_fraction": 0.99}, 11),  # the last step
        ({"method": "gates", "hard_fraction": 0.5, "quantized_fraction": 0.5}, 6),
        ({"method": "fixed", "quantized_fraction": 0.0}, 0),
    ],
)
def test_the_first_quantised_step_by_hand(settings, first):
    config = TrainConfig.from_dict({"steps": 12, "quantize": "int8", **settings})
    assert config.first_quantized_step == first
    found = [phase_at(step, config).is_quantized for step in range(13)]
    assert found == [first is not None and step >= first for step in range(13)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adams"}, "method adams has no setting quantize"),
        ({"method": "dense"}, "method dense has no setting quantize"),
        ({"scale_parts": 2}, "cannot be combined with scale_parts 2; leave one of them"),
        (
            {"method": "gates", "quantized_fraction": 0.02},
            "0.02 must not be below hard_fraction 0.05",
        ),
        ({"quantized_fraction": 1.0}, "quantized_fraction is 1.0, but must be less than 1"),
        ({"scale_group": 48}, "scale_group is 48, but must be 128, 64 or 32"),
        ({"quantize": "int2"}, "quantize is 'int2', but must be 'none', 'int8' or 'int4'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"quantize": "int4", **settings})
