"""`cast-train run --model` of a directory that has its zeros: they and what is dense stay."""

import json
import shutil

import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_train.checkpoint import models
from cast_train.config import TrainConfig
from cast_train.pruning.oneshot import write_pruned
from cast_train.training.run import train
from tests.cast_train.settings import changed

DENSE = r"layers\.0\.mlp|h\.0\.mlp"  # of Llama's and of GPT-2's names


@pytest.fixture
def config(settings_file):
    """Of a run whose mask is exact from the first step on, in 4 bits."""
    return TrainConfig.from_toml(
        settings_file,
        method="fixed",
        steps=8,
        quantize="int4",
        scale_group=32,
        quantized_fraction=0.0,
    )


@pytest.fixture(params=["pruned", "compressed"])
def sparse_dir(request, model_dir, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    write_pruned(model_dir, [text_file], pruned, "magnitude", exclude=[DENSE])
    if request.param == "compressed":
        convert(pruned, tmp_path / "compressed")
    return tmp_path / request.param


def test_zeros_and_dense_linears_stay(sparse_dir, model_dir, text_file, config, tmp_path):
    record = train(sparse_dir, [text_file], tmp_path / "gated", config, teacher_dir=model_dir)
    assert record["kept_dense"]
    summary = convert(
        tmp_path / "gated", tmp_path / "int4", quantization=Quantization("int4", scale_group=32)
    )
    assert summary["num_sparse_layers"] == len(record["targets"])
    before = models.load_any(sparse_dir).state_dict()
    after = models.load_any(tmp_path / "int4").state_dict()
    for name in record["targets"]:
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert not new[old == 0].any()
        assert not torch.equal(old, new)
    for name in record["kept_dense"]:
        assert after[f"{name}.weight"].count_nonzero() > 0.9 * after[f"{name}.weight"].numel()


def test_solving_leaves_the_weights_of_a_pruned_model_as_they_are(
    sparse_dir, text_file, settings_file, tmp_path
):
    config = TrainConfig.from_toml(
        settings_file, method="fixed", steps=1, learning_rate=0.0, distillation_weight=0.0
    )
    record = train(sparse_dir, [text_file], tmp_path / "gated", config)
    before = models.load_any(sparse_dir).state_dict()
    convert(tmp_path / "gated", tmp_path / "out")
    after = models.load_any(tmp_path / "out").state_dict()
    for name in record["targets"]:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_wrong_use_is_refused_before_anything_is_written(
    sparse_dir, model_dir, text_file, config, tmp_path
):
    out = tmp_path / "gated"
    with pytest.raises(ValueError, match="so it cannot be the teacher; give --teacher"):
        train(sparse_dir, [text_file], out, config)
    fewer = changed(config, zeros=0.4)
    with pytest.raises(ValueError, match="zeros 0.4 chooses among the linears of a dense model"):
        train(sparse_dir, [text_file], out, fewer, teacher_dir=model_dir)
    convert(tmp_path / "pruned", tmp_path / "int8", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"int8 is quantised \(int8\); give the directory"):
        train(tmp_path / "int8", [text_file], out, config, teacher_dir=model_dir)
    assert not out.exists()
    train(model_dir, [text_file], out, config)
    with pytest.raises(CheckpointError, match="the output of cast-serve convert"):
        train(out, [text_file], tmp_path / "again", config, teacher_dir=model_dir)


def test_generation_settings_that_cannot_be_saved_are_refused(llama_dir, text_file, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(llama_dir, dense)
    (dense / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": false}')
    with pytest.raises(ValueError, match=r"generation_config.json contradicts itself"):
        write_pruned(dense, [text_file], tmp_path / "pruned", "magnitude")
    assert not (tmp_path / "pruned").exists()


def test_generation_settings_are_handed_on(llama_dir, text_file, config, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(llama_dir, dense)
    (dense / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    write_pruned(dense, [text_file], tmp_path / "pruned", "magnitude")
    convert(tmp_path / "pruned", tmp_path / "compressed")
    config = changed(config, steps=1)
    train(tmp_path / "compressed", [text_file], tmp_path / "out", config, teacher_dir=dense)
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (found["temperature"], found["do_sample"]) == (0.7, True)


def test_zeros_that_training_would_fill_or_move_are_refused(
    sparse_dir, text_file, config, tmp_path
):
    config = changed(config, distillation_weight=0.0)
    left_out = changed(config, exclude=("attn",))
    with pytest.raises(ValueError, match=r"exclude leave out .*attn.* has zeros already that"):
        train(sparse_dir, [text_file], tmp_path / "out", left_out)
    other = TrainConfig.from_dict({"sparsity": "4:8", "steps": 8, "block_size": 32})
    with pytest.raises(CheckpointError, match="is 2:4, and its zeros are the mask; set sparsity"):
        train(sparse_dir, [text_file], tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
