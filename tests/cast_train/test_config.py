import json

import pytest

from cast_train.config import TrainConfig


def test_settings_survive_json():
    config = TrainConfig(sparsity="4:8", exclude=("down_proj",), steps=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('steps = 7\nstart = "wanda"\n')
    config = TrainConfig.from_toml(file, steps=9, start=None)
    assert (config.steps, config.start) == (9, "wanda")


def test_an_unknown_key_is_named_with_the_nearest(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("stesp = 7\n")
    with pytest.raises(ValueError, match="unknown setting stesp; the nearest is steps "):
        TrainConfig.from_toml(file)


def test_assignments_win_over_flags_and_file_and_are_typed_as_in_toml(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("steps = 7\nseed = 1\n")
    texts = ["steps=11", "start=wanda", "learning_rate=1e-4", 'include=["q_proj"]', "steps=12"]
    config = TrainConfig.from_toml(file, [*texts, "sparsity=4:8", "keep_best=false"], steps=9)
    assert (config.steps, config.seed, config.start) == (12, 1, "wanda")
    assert (config.learning_rate, config.include) == (1e-4, ("q_proj",))
    assert (config.sparsity, config.keep_best) == ("4:8", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "'steps' is not KEY=VALUE; write for instance steps=100"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("stesp=3", r"unknown setting stesp; the nearest is steps \(whole number above 0; .*64\)"),
        (
            "methd=ste",
            r"the nearest is method \(fixed, gates, ste, adams or dense; default: fixed\)",
        ),
        ("path=3", "unknown setting path; the settings are method, "),
        ("steps=many", r"steps is 'many', but must be a valid integer \(default: 64\)"),
        ("seed=", "seed is '', but must be a valid integer"),
        ("keep_best=True", "keep_best is 'True', but must be a valid boolean"),
        ("report_to=wandbb", "report_to is 'wandbb', but must be 'none', 'tensorboard', 'wandb'"),
    ],
)
def test_a_wrong_assignment_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_toml(None, [text])


@pytest.mark.parametrize("text", ["steps = ", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    file = tmp_path / "train.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"cannot read the settings .*train\.toml"):
        TrainConfig.from_toml(file)


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({}, "wanda"),
        ({"method": "gates"}, "sparsegpt"),
        ({"method": "gates", "selector": "gumbel"}, "sparsegpt"),
        ({"method": "gates", "selector": "penalty"}, "wanda"),
        ({"method": "ste"}, "wanda"),
        ({"method": "ste", "start": "magnitude"}, "magnitude"),
    ],
)
def test_the_automatic_start_is_what_the_method_can_use(settings, order):
    assert TrainConfig.from_dict(settings).first_order == order


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": True}, "keep_best needs evaluate_every above 0"),
        (
            {"keep_best": True, "evaluate_every": 3, "steps": 32},
            "steps 32 is no multiple of evaluate_every 3",
        ),
        (
            {"keep_best": True, "evaluate_every": 8, "checkpoint_every": 16},
            "checkpoint_every 16 must be 0 or evaluate_every 8",
        ),
        (
            {"keep_best": True, "evaluate_every": 8, "method": "adams"},
            "adams prunes after its last step",
        ),
        (
            {"method": "magic"},
            "method is 'magic', but must be 'fixed', 'gates', 'ste', 'adams' or 'dense'",
        ),
        (
            {"selector": "sort"},
            "selector is 'sort', but must be 'soft_topk', 'gumbel', 'penalty' or",
        ),
        (
            {"start": "zeros"},
            "start is 'zeros', but must be 'auto', 'ones', 'magnitude', 'wanda' or",
        ),
        ({"sparsity": "4:2"}, "is not N:M"),
        ({"steps": 0}, "steps is 0, but must be greater than 0"),
        ({"steps": 1.5}, r"steps is 1.5, but must be a valid integer \(default: 64\)"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a finite number"),
        ({"tau_end": 0.0}, "tau_end is 0.0, but must be greater than or equal to 0.0001"),
        ({"method": "gates", "tau_end": 0.9}, "tau must fall"),
        ({"method": "gates", "hard_fraction": 1.0}, "the last steps must see the exact mask"),
        ({"method": "gates", "tau_end_fraction": 0.9}, "the last steps must see the exact mask"),
        ({"selector": "gumbel"}, "selector gumbel goes with method gates, .*: set method to gates"),
        ({"hard_fraction": 0.4}, "hard_fraction 0.4 goes with method gates"),
        ({"masks_first": True}, "masks_first True goes with method gates"),
        ({"start": "ones"}, "start ones has no order to keep a mask of; choose magnitude, wanda"),
        ({"is_sharded": True}, "method fixed cannot go with is_sharded, .* choose method gates"),
        ({"include": "q_proj"}, "include is 'q_proj', but must be a valid list of strings"),
        ({"include": ["q_proj", 1]}, "include is 1, but must be a valid string"),
        ({"exclude": ["*_proj"]}, "'*_proj' is no regular expression: nothing to repeat"),
        ({"steps": 0, "tau_end": 0.0}, "steps is 0, .*; tau_end is 0.0"),
    ],
)
def test_a_wrong_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)
