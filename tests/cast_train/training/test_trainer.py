import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cast_serve.checkpoint.record import CheckpointError, verify
from cast_serve.sparsity.pattern import TWO_FOUR, hard_mask
from cast_train.checkpoint import conv1d, models
from cast_train.config import TrainConfig
from cast_train.errors import DivergedError
from cast_train.training import optimizer, prepare
from cast_train.training.blocks import read_blocks
from cast_train.training.run import Run, train
from cast_train.training.trainer import CastTrainer
from tests.cast_train.settings import changed


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(settings_file, steps=10)


def test_a_run_learns_and_writes_a_gated_checkpoint(
    model_dir, text_file, heldout_file, config, tmp_path, untrained_perplexity
):
    config = changed(config, steps=40, checkpoint_every=40)
    record = train(model_dir, [text_file], tmp_path / "out", config, heldout_file=heldout_file)
    assert verify(tmp_path / "out") == record
    assert (record["kind"], record["n"], record["m"]) == ("gated", TWO_FOUR.n, TWO_FOUR.m)
    assert TrainConfig.from_dict(record["config"]) == config
    assert record["tokens_seen"] == 40 * 4 * 32
    quality = record["quality"]
    assert quality["perplexity_hard"] < 0.8 * untrained_perplexity
    assert quality["perplexity_soft"] == pytest.approx(quality["perplexity_hard"], rel=5e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stopped_run_goes_on_to_the_same_weights(
    llama_dir, text_file, config, tmp_path, train_until, begun_at
):
    train(llama_dir, [text_file], tmp_path / "whole", config)

    train_until(6, llama_dir, [text_file], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()

    with pytest.raises(CheckpointError, match="continue it with --resume"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    other = changed(config, steps=11)
    with pytest.raises(CheckpointError, match="steps is 10, not 11"):
        train(llama_dir, [text_file], tmp_path / "out", other, is_resume=True)

    train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert begun_at == [None, None, "checkpoint-4"]
    whole, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


HARD_AT_ONCE = {"hard_fraction": 0.0, "tau_end_fraction": 0.0}


@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 2, **HARD_AT_ONCE}], ids=str)
@pytest.mark.parametrize("way", [{"method": "ste"}, {"selector": "generator"}], ids=str)
def test_a_mask_that_is_exact_from_the_first_step_is_the_starts(
    way, settings, model_dir, text_file, config, tmp_path
):
    """By magnitude; ties, as of logits that nobody has written, would keep columns 0 and 1."""
    config = changed(config, start="magnitude", learning_rate=1e-5, **settings, **way)
    record = train(model_dir, [text_file], tmp_path / "out", config)
    assert record["gates"]["flipped_share"] == 0
    dense = models.load_dense(model_dir, torch.float32)
    written = conv1d.transposed(dense, load_file(tmp_path / "out" / "model.safetensors"))
    for name in record["targets"]:
        weight = dense.get_submodule(name).weight.detach()
        assert torch.equal(hard_mask(written[f"{name}.gate"]), hard_mask(weight.abs())), name


@pytest.mark.parametrize(
    "way",
    [{"method": "dense"}, {"start": "ones", "scale_parts": 2}, {"method": "ste", "start": "ones"}],
    ids=str,
)
def test_weight_decay_is_of_the_targets_weights_only(way, model_dir, text_file, config, tmp_path):
    """One step with and one without: what differs is rate * decay of the targets' weights."""
    rate, decay = 1e-3, 100.0
    changes = {"steps": 1, "learning_rate": rate, "warmup_fraction": 0.0, "train_embeddings": True}
    results = []
    for weight_decay in (0.0, decay):
        varied = changed(config, **changes, weight_decay=weight_decay, **way)
        record = train(model_dir, [text_file], tmp_path / str(weight_decay), varied)
        results.append(load_file(tmp_path / str(weight_decay) / "model.safetensors"))
    plain, decayed = results
    differ = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    assert differ == {f"{name}.weight" for name in record["targets"]}
    before = load_file(model_dir / "model.safetensors")
    for name in differ:
        torch.testing.assert_close(
            (plain[name].float() - decayed[name].float()),
            rate * decay * before[name],
            rtol=0.05,
            atol=5e-4,  # both are stored in bf16
        )


def test_a_finished_run_is_not_run_again(llama_dir, text_file, config, tmp_path, monkeypatch):
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    monkeypatch.setattr(CastTrainer, "train", None)
    # Earlier releases recorded the settings of all methods.
    record["config"] |= {"decay": 2e-4, "mask_every": 10}
    (tmp_path / "out/cast.json").write_text(json.dumps(record))
    assert train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True) == record
    other = changed(config, seed=1)
    with pytest.raises(CheckpointError, match="is another run .*seed is 0, not 1"):
        train(llama_dir, [text_file], tmp_path / "out", other)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="is not a run's result"):
        train(llama_dir, [text_file], tmp_path / "out", config)


def test_a_loss_that_is_not_finite_stops_the_run(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    def poisoned(directory, dtype, is_sharded):
        model = models.load_dense(directory, dtype)
        model.lm_head.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(prepare, "load_any", poisoned)
    config = changed(config, start="ones")
    with pytest.raises(DivergedError, match="at step 0; lower learning_rate"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_damaged_by_the_last_step_has_diverged(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    def destroy(self):
        fit(self)
        targets = self.prepared.targets.values()
        next(iter(targets)).bias = torch.nn.Parameter(torch.tensor(torch.nan))

    fit = Run.fit
    monkeypatch.setattr(Run, "fit", destroy)
    with pytest.raises(DivergedError, match=r"likelihood .* is nan.*; lower learning_rate"):
        train(llama_dir, [text_file], tmp_path / "out", changed(config, steps=2))
    assert not (tmp_path / "out").exists()


def test_a_run_belongs_to_its_sequences_of_a_step(
    llama_dir, text_file, config, tmp_path, monkeypatch, train_until
):
    train_until(6, llama_dir, [text_file], tmp_path / "out", config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        CheckpointError, match=r"another run \(batch_blocks x accumulation x processes is 4, not 8"
    ):
        train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)


def test_steps_that_accumulate_are_whole_in_every_epoch(llama_dir, text_file, config):
    tokenizer = models.load_tokenizer(llama_dir)
    whole = read_blocks([text_file], None, tokenizer, config).train
    settings = changed(config, batch_blocks=3, accumulation=4)
    cut = read_blocks([text_file], None, tokenizer, settings).train
    assert len(cut) == len(whole) // 12 * 12 < len(whole)
    too_many = changed(config, accumulation=len(whole))
    with pytest.raises(ValueError, match="are needed"):
        read_blocks([text_file], None, tokenizer, too_many)


def test_keep_best_measures_all_that_is_held_out(llama_dir, text_file, config, tmp_path):
    settings = changed(
        config, batch_blocks=6, steps=12, evaluate_every=4, keep_best=True, hard_fraction=0.5
    )
    record = train(llama_dir, [text_file], tmp_path / "out", settings)  # 4 blocks are held out
    assert record["best_step"] in (8, 12)


def test_embeddings_stay_as_they_were_unless_asked(llama_dir, text_file, config, tmp_path):
    before = models.load_dense(llama_dir).get_input_embeddings().weight
    for name, is_trained in (("frozen", False), ("trained", True)):
        settings = changed(config, train_embeddings=is_trained)
        train(llama_dir, [text_file], tmp_path / name, settings)
        after = models.load_unmasked(tmp_path / name).get_input_embeddings().weight
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
    config = changed(
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


def test_every_step_is_of_whole_batches(llama_dir, text_file, config, tmp_path, monkeypatch):
    """Of fifteen training blocks twelve are the three batches of 4 of a step; the other three are
    left out in every epoch, or more tokens would be counted than are read."""
    shapes, losses = [], []
    compute = CastTrainer.compute_loss

    def listen(self, model, inputs, *args, **kwargs):
        shapes.append(inputs["input_ids"].shape[0])
        return compute(self, model, inputs, *args, **kwargs)

    log = CastTrainer.log

    def remember(self, logs, *args, **kwargs):
        losses.extend([logs["loss"]] if "loss" in logs else [])
        log(self, logs, *args, **kwargs)

    monkeypatch.setattr(CastTrainer, "compute_loss", listen)
    monkeypatch.setattr(CastTrainer, "log", remember)
    text = tmp_path / "short.txt"
    text.write_text(text_file.read_text()[: 19 * 32])
    config = changed(
        config, steps=2, accumulation=3, learning_rate=0.0, distillation_weight=0.0, method="dense"
    )
    record = train(llama_dir, [text], tmp_path / "out", config)
    assert shapes == [4] * 6
    assert record["tokens_seen"] == sum(shapes) * config.block_size
    assert losses[0] == pytest.approx(math.log(256), rel=0.2)  # an untrained model of bytes
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_accumulation_changes_nothing_of_a_step(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    """Nor how hard dropped weights are pulled. The plain steps taken here show gradients' sizes."""

    def plain(self, model=None):
        weights = {"params": list(self.model.parameters()), "role": optimizer.WEIGHTS}
        self.optimizer = torch.optim.SGD([weights], lr=1e-3)
        return self.optimizer

    monkeypatch.setattr(CastTrainer, "create_optimizer", plain)
    config = changed(
        *(config,),
        steps=1,
        method="ste",
        decay=50.0,
        warmup_fraction=0.0,
        distillation_weight=0.0,
        max_grad_norm=math.inf,
    )
    weights = []
    for accumulation in (1, 4):
        out = tmp_path / str(accumulation)
        varied = changed(config, accumulation=accumulation, batch_blocks=4 // accumulation)
        train(llama_dir, [text_file], out, varied)
        weights.append(load_file(out / "model.safetensors"))
    first, second = weights
    dense = load_file(llama_dir / "model.safetensors")
    for name in dense:
        torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-5)
    assert any(not torch.equal(first[name], dense[name].bfloat16()) for name in dense)


def test_a_best_checkpoint_is_found_where_the_run_was_moved(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    config = changed(
        config, method="fixed", steps=4, evaluate_every=2, checkpoint_every=0, keep_best=True
    )
    evaluate = CastTrainer.evaluate

    def pretend(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    def fill_the_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(CastTrainer, "evaluate", pretend)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        patch.setattr(models, "write", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            train(llama_dir, [text_file], tmp_path / "full", config)
    (tmp_path / "full.partial").rename(tmp_path / "moved.partial")
    record = train(llama_dir, [text_file], tmp_path / "moved", config, is_resume=True)
    assert record["best_step"] == 2
    whole, moved = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "moved"))
    assert all(torch.equal(whole[name], moved[name]) for name in whole)


def test_scores_that_hold_nan_have_diverged(llama_dir, text_file, config, tmp_path, monkeypatch):
    def poison(self, *args, **kwargs):
        found = compute(self, *args, **kwargs)
        next(iter(self.gate_map.values())).weight().data.fill_(math.nan)
        return found

    compute = CastTrainer.compute_loss
    monkeypatch.setattr(CastTrainer, "compute_loss", poison)
    config = changed(config, method="ste", start="magnitude", evaluate_every=1)
    with pytest.raises(DivergedError, match=r"hold NaN.*; lower learning_rate"):
        train(llama_dir, [text_file], tmp_path / "out", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": (".*",)}, "include names lm_head, the output layer"),
        ({"scale_parts": 3}, "has 32 columns, not 3 parts of whole groups of 4"),
        ({"method": "adams", "learning_rate": 1e-6}, "AdamS can move a dropped weight by"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_search(
    changes, message, llama_dir, text_file, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "permute", None)
    config = changed(config, channel_order="auto", **changes)
    with pytest.raises(ValueError, match=message):
        train(llama_dir, [text_file], tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_a_model_that_learnt_its_positions_takes_no_longer_blocks(
    gpt2_dir, text_file, config, tmp_path
):
    config = changed(config, block_size=129)
    with pytest.raises(ValueError, match="block_size 129 is more than the 128 places that GPT2LM"):
        train(gpt2_dir, [text_file], tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_embeddings_of_positions_stay_too(gpt2_dir, text_file, config, tmp_path):
    train(gpt2_dir, [text_file], tmp_path / "out", config)
    before, after = models.load_dense(gpt2_dir), models.load_unmasked(tmp_path / "out")
    assert torch.equal(before.transformer.wpe.weight, after.transformer.wpe.weight)
    assert torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
