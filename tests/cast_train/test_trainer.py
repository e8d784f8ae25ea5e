import dataclasses
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cast_serve.nm import TWO_FOUR, CheckpointError
from cast_train import checkpoint, run
from cast_train.config import TrainConfig
from cast_train.run import train
from cast_train.trainer import CastTrainer, DivergedError


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(settings_file, steps=10)


def test_a_run_learns_and_writes_a_gated_checkpoint(model_dir, text_file, config, tmp_path):
    config = dataclasses.replace(config, steps=40, checkpoint_every=40)
    record = train(model_dir, [text_file], tmp_path / "out", config)
    assert checkpoint.verify(tmp_path / "out") == record
    assert (record["kind"], record["n"], record["m"]) == ("gated", TWO_FOUR.n, TWO_FOUR.m)
    assert TrainConfig.from_dict(record["config"]) == config
    assert record["tokens_seen"] == 40 * 4 * 32
    quality = record["quality"]
    assert quality["perplexity_hard"] < 200  # 256 tokens, so about 256 before training
    assert quality["perplexity_soft"] == pytest.approx(quality["perplexity_hard"], rel=5e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stopped_run_goes_on_to_the_same_weights(
    llama_dir, text_file, config, tmp_path, monkeypatch, train_until
):
    train(llama_dir, [text_file], tmp_path / "whole", config)

    train_until(6, llama_dir, [text_file], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()

    with pytest.raises(CheckpointError, match="go on with --resume"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    other = dataclasses.replace(config, steps=11)
    with pytest.raises(CheckpointError, match="steps is 10, not 11"):
        train(llama_dir, [text_file], tmp_path / "out", other, is_resume=True)

    begun_at = []
    begin = CastTrainer.train

    def remember(self, resume_from_checkpoint):
        begun_at.append(resume_from_checkpoint)
        return begin(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(CastTrainer, "train", remember)
    train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert begun_at == [str(tmp_path / "out.partial" / "checkpoint-4")]
    whole, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_is_not_run_again(llama_dir, text_file, config, tmp_path, monkeypatch):
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    monkeypatch.setattr(CastTrainer, "train", None)
    assert train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True) == record
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(CheckpointError, match="is another run .*seed is 0, not 1"):
        train(llama_dir, [text_file], tmp_path / "out", other)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint's record"):
        train(llama_dir, [text_file], tmp_path / "out", config)


def test_a_loss_that_is_not_finite_stops_the_run(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    def poisoned(directory, dtype):
        model = checkpoint.load_dense(directory, dtype)
        model.lm_head.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(run, "load_dense", poisoned)
    config = dataclasses.replace(config, start="ones")
    with pytest.raises(DivergedError, match="at step 0; lower learning_rate"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_embeddings_stay_as_they_were_unless_asked(llama_dir, text_file, config, tmp_path):
    before = checkpoint.load_dense(llama_dir).get_input_embeddings().weight
    for name, is_trained in (("frozen", False), ("trained", True)):
        settings = dataclasses.replace(config, train_embeddings=is_trained)
        train(llama_dir, [text_file], tmp_path / name, settings)
        after = checkpoint.load_dense(tmp_path / name).get_input_embeddings().weight
        assert torch.equal(before, after) != is_trained


def test_the_best_exact_mask_is_kept(llama_dir, text_file, config, tmp_path, monkeypatch):
    """Step 2 is soft; of the losses made up for 4, 6 and 8 that of 6 is the least."""
    measured, weights = {}, {}
    evaluate = CastTrainer.evaluate

    def evaluate_and_pretend(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        step = self.state.global_step
        measured[step] = metrics["eval_loss"]
        weights[step] = self.model.model.embed_tokens.weight.detach().clone()
        return metrics | {"eval_loss": {2: metrics["eval_loss"], 4: 3.0, 6: 1.0, 8: 2.0}[step]}

    monkeypatch.setattr(CastTrainer, "evaluate", evaluate_and_pretend)
    config = dataclasses.replace(
        config,
        steps=8,
        evaluate_every=2,
        checkpoint_every=2,
        keep_best=True,
        train_embeddings=True,
        method="ste",
        tau_end_fraction=0.3,
        hard_fraction=0.3,
    )
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    assert math.isinf(measured[2])
    assert all(1 < measured[step] < 10 for step in (4, 6, 8))
    assert record["best_step"] == 6
    written = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(written, weights[6].to(torch.bfloat16))
    assert not torch.equal(written, weights[8].to(torch.bfloat16))
