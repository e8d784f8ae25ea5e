import json

import pytest

from cast_train.config import METHODS, Gates, TrainConfig, of_method


@pytest.mark.parametrize("method", METHODS)
def test_settings_survive_json(method):
    config = TrainConfig.from_dict({"method": method, "exclude": ["down_proj"], "steps": 7})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('steps = 7\nstart = "wanda"\n')
    config = TrainConfig.from_toml(file, steps=9, start=None)
    assert config == Gates(steps=9, start="wanda")


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
    assert config == Gates(
        steps=12,
        seed=1,
        start="wanda",
        learning_rate=1e-4,
        include=("q_proj",),
        sparsity="4:8",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "'steps' is not KEY=VALUE; write, for example, steps=100"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("stesp=3", r"unknown setting stesp; the nearest is steps \(integer > 0; .*64\)"),
        (
            "methd=ste",
            r"the nearest is method \(gates, fixed, ste, adams or dense\)",
        ),
        ("path=3", "unknown setting path; method gates has method, "),
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
    ("settings", "message"),
    [
        ({"keep_best": True}, "keep_best needs evaluate_every > 0"),
        (
            {"keep_best": True, "evaluate_every": 3, "steps": 32},
            "keep_best needs steps 32 to be a multiple of evaluate_every 3",
        ),
        (
            {"keep_best": True, "evaluate_every": 8, "checkpoint_every": 16},
            "checkpoint_every 16 must be 0 or evaluate_every's 8",
        ),
        (
            {"keep_best": True, "evaluate_every": 8, "method": "adams"},
            "keep_best is True, but must be False with method adams",
        ),
        (
            {"method": "magic"},
            "method is 'magic', but must be gates, fixed, ste, adams or dense",
        ),
        (
            {"method": "gates", "selector": "sort"},
            "selector is 'sort', but must be 'soft_topk', 'gumbel', 'penalty' or",
        ),
        (
            {"start": "zeros"},
            "start is 'zeros', but must be 'ones', 'magnitude', 'wanda' or",
        ),
        ({"sparsity": "4:2"}, "is not N:M"),
        ({"sparsity": "64:64"}, "keeps every weight.*cast-train quantize --sparsity 64:64"),
        ({"steps": 0}, "steps is 0, but must be greater than 0"),
        ({"steps": 1.5}, r"steps is 1.5, but must be a valid integer \(default: 64\)"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a finite number"),
        (
            {"method": "gates", "tau_end": 0.0},
            "tau_end is 0.0, but must be greater than or equal to 0.0001",
        ),
        ({"method": "gates", "tau_end": 0.9}, "tau must fall"),
        ({"method": "gates", "hard_fraction": 1.0}, "hard_fraction is 1.0, but must be less"),
        ({"method": "gates", "tau_end_fraction": 0.9}, "the last steps must see the exact mask"),
        (
            {"method": "fixed", "start": "ones"},
            "start is 'ones', but must be 'magnitude', 'wanda' or .* method fixed",
        ),
        (
            {"method": "gates", "selector": "generator", "is_sharded": True},
            "is_sharded cannot be combined with selector generator",
        ),
        (
            {"method": "gates", "is_sharded": True, "keep_best": True, "evaluate_every": 1},
            "is_sharded and keep_best cannot both be true",
        ),
        ({"include": "q_proj"}, "include is 'q_proj', but must be a valid list of strings"),
        ({"include": ["q_proj", 1]}, "include is 1, but must be a valid string"),
        ({"exclude": ["*_proj"]}, "'*_proj' is not a regular expression: nothing to repeat"),
        ({"steps": 0, "seed": -1}, "steps is 0, .*; seed is -1"),
    ],
)
def test_a_wrong_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("method", "name", "having"),
    [
        ("fixed", "selector", "only gates has"),
        ("fixed", "hard_fraction", "only gates or ste has"),
        ("fixed", "decay", "only ste or adams has"),
        ("ste", "masks_first", "only gates has"),
        ("gates", "mask_every", "only adams has"),
        ("adams", "start", "only gates, fixed or ste has"),
        ("adams", "weight_decay", "only gates, fixed, ste or dense has"),
        ("dense", "sparsity", "only gates, fixed, ste or adams has"),
    ],
)
def test_a_setting_of_another_method_is_refused_and_a_record_of_it_is_read(method, name, having):
    settings = {"method": method, name: 1, "steps": 3}
    with pytest.raises(ValueError, match=f"method {method} has no setting {name}, {having}"):
        TrainConfig.from_dict(settings)
    recorded = {**settings, "stesp": 2, "allocation": "fisher"}
    assert of_method(recorded) == {"method": method, "steps": 3, "stesp": 2}


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"scale_group": 64, "quantize": "int8"}, "quantize int4"),
        ({"quantized_fraction": 0.2}, "quantize"),
        ({"distillation_weight": 0.0, "distillation_temperature": 2.0}, "a teacher"),
        ({"method": "gates", "gumbel_noise": 0.1}, "selector gumbel"),
        ({"checkpoint_async": True}, "is_sharded"),
    ],
)
def test_a_setting_that_another_makes_irrelevant_is_refused(settings, needs):
    with pytest.raises(ValueError, match=f"has no effect without {needs}; leave it out"):
        TrainConfig.from_dict(settings)
