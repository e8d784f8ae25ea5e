import json

import pytest

from cast_train.config import TrainConfig


def test_settings_survive_json():
    config = TrainConfig(sparsity="4:8", exclude=("down_proj",), steps=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('steps = 7\nstart = "ones"\n')
    config = TrainConfig.from_toml(file, steps=9, start=None)
    assert (config.steps, config.start) == (9, "ones")


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("stesp = 7\n")
    with pytest.raises(ValueError, match=r"unknown setting stesp; .*steps.*tau_end"):
        TrainConfig.from_toml(file)


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
        ({}, "sparsegpt"),
        ({"selector": "gumbel"}, "sparsegpt"),
        ({"selector": "penalty"}, "wanda"),
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
            {"keep_best": True, "evaluate_every": 8, "method": "adams"},
            "adams prunes after its last step",
        ),
        (
            {"method": "magic"},
            "method is 'magic', but must be 'gates', 'ste', 'adams' or 'dense'",
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
        ({"steps": 1.5}, r"steps is 1.5, but must be a valid integer \(default: 32\)"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a finite number"),
        ({"tau_end": 0.0}, "tau_end is 0.0, but must be greater than or equal to 0.0001"),
        ({"tau_end": 0.9}, "tau must fall"),
        ({"hard_fraction": 1.0}, "the last steps must see the exact mask"),
        ({"tau_end_fraction": 0.9}, "the last steps must see the exact mask"),
        ({"include": "q_proj"}, "include is 'q_proj', but must be a valid list of strings"),
        ({"include": ["q_proj", 1]}, "include is 1, but must be a valid string"),
        ({"exclude": ["*_proj"]}, "'*_proj' is no regular expression: nothing to repeat"),
        ({"steps": 0, "tau_end": 0.0}, "steps is 0, .*; tau_end is 0.0"),
    ],
)
def test_a_wrong_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)
