import logging
import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import transformers.integrations.integration_utils as integrations
from transformers import TrainerCallback

from cast_train.config import Fixed, TrainConfig
from cast_train.training import prepare, progress
from cast_train.training.progress import Progress, check_reporter, loss_in_words, quantized_in_words
from cast_train.training.run import train


@pytest.mark.parametrize(
    ("settings", "has_teacher", "words"),
    [
        (
            {"method": "gates"},
            True,
            "loss of a step: 0.1 x cross-entropy of the next token + 0.9 x KL divergence from the "
            "teacher's prediction to the model's + 10 x relative squared distance of the hidden "
            "states from the teacher's + up to 0.1 x sparsity penalty until the mask is exact",
        ),
        ({"method": "dense"}, False, "loss of a step: 1 x cross-entropy of the next token"),
        (
            {"method": "ste", "hidden_states_weight": 30.0},
            True,
            "loss of a step: 0.1 x cross-entropy of the next token + 0.9 x KL divergence from the "
            "teacher's prediction to the model's + 30 x relative squared distance of the hidden "
            "states from the teacher's",
        ),
        (
            {"method": "ste", "distillation_temperature": 2.0, "hidden_states_weight": 0.0},
            True,
            "loss of a step: 0.1 x cross-entropy of the next token + 0.9 x KL divergence from the "
            "teacher's prediction to the model's at temperature 2",
        ),
    ],
)
def test_the_loss_in_words(settings, has_teacher, words):
    assert loss_in_words(TrainConfig.from_dict(settings), has_teacher) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"quantize": "int8"}, "from step 6 of 10 on, weights are int8 and activations int8"),
        (
            {"quantize": "int4", "scale_group": 64, "quantized_fraction": 0.25},
            "from step 4 of 10 on, weights are int4 with scale groups of 64 and activations int8",
        ),
    ],
)
def test_the_quantised_steps_in_words(settings, words):
    assert quantized_in_words(TrainConfig.from_dict({"steps": 10, **settings})) == words


def test_the_bar_goes_on_where_the_run_does_and_says_tokens_and_loss(capsys, caplog):
    config = Fixed(steps=9, quantize="int4", quantized_fraction=0.5)
    bar = Progress(config, tokens=1000, loss="what it is")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=4)
    with caplog.at_level(logging.INFO):
        bar.on_train_begin(None, state, None)
    assert caplog.messages == ["what it is", quantized_in_words(config)]
    assert (bar.training_bar.initial, bar.training_bar.n) == (4, 4)
    for step in (5, 6):
        state.global_step = step
        bar.training_bar.last_print_t -= 1  # a step of a second or more
        bar.training_bar.start_t -= 1
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 1.23456})
    bar.on_log(None, state, None, logs={"heldout_perplexity": 3.0})
    bar.on_train_end(None, state, None)
    shown = capsys.readouterr().err
    assert "6/9" in shown
    assert "loss=1.235" in shown
    assert set(re.findall(r"(\d)/9[^\r\n]*weights=int4", shown)) == {"6"}  # 5 is not quantised
    rates = [int(rate.replace(",", "")) for rate in re.findall(r"tokens/s=([\d,]+)", shown)]
    assert rates
    assert max(rates) <= 1000  # the four steps before are not of this process


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_a_reporter_that_is_not_installed_is_named_before_the_model_loads(
    name, package, llama_dir, text_file, tmp_path, monkeypatch
):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(prepare, "load_any", None)
    message = f"report_to {name} needs the package {package}, .*; run pip install {package}"
    with pytest.raises(ValueError, match=message):
        train(llama_dir, [text_file], tmp_path / "out", Fixed(report_to=name))
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard"):
        check_reporter("tensorboard", "--tensorboard")
    assert list(tmp_path.iterdir()) == []


def test_a_reporter_gets_every_loss_and_its_parts(
    llama_dir, text_file, settings_file, tmp_path, monkeypatch
):
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((args.run_name, state.global_step, set(logs)))

    monkeypatch.setattr(progress, "check_reporter", lambda *_: None)
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "wandb", Reporter)
    config = TrainConfig.from_toml(settings_file, ["report_to=wandb"], steps=2)
    train(llama_dir, [text_file], tmp_path / "out", config)
    losses = [(name, step) for name, step, keys in told if {"loss", "task_loss"} <= keys]
    assert losses == [("out", 1), ("out", 2)]


@pytest.mark.parametrize("folder", ["out", "out/logs", "out.partial/logs"])
def test_figures_inside_the_output_are_refused(folder, llama_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match="choose a directory outside it"):
        train(
            *(llama_dir, [text_file], tmp_path / "out", Fixed()),
            tensorboard_dir=tmp_path / folder,
        )
    assert list(tmp_path.iterdir()) == []
