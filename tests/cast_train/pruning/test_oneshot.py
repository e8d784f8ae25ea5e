import pytest

from cast_serve.checkpoint.record import CheckpointError, verify
from cast_serve.sparsity.pattern import TWO_FOUR, check_weight
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.pruning import oneshot


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_directory_has_exact_zeros(model_dir, text_file, tmp_path, monkeypatch, method):
    monkeypatch.setattr(
        oneshot, "TrainConfig", lambda: oneshot_settings(block_size=32, calibration_blocks=4)
    )
    record = oneshot.write_pruned(model_dir, [text_file], tmp_path / "out", method)
    assert (record["kind"], record["method"], record["n"], record["m"]) == ("pruned", method, 2, 4)
    assert verify(tmp_path / "out") == record
    model = load_dense(tmp_path / "out")
    targets, _ = find_targets(model, TWO_FOUR)
    assert record["targets"] == list(targets)
    for name, linear in targets.items():
        is_conv1d = type(linear).__name__ == "Conv1D"
        check_weight(linear.weight.t() if is_conv1d else linear.weight, TWO_FOUR, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def oneshot_settings(**settings):
    from cast_train.config import TrainConfig

    return TrainConfig(**settings)


def test_wrong_use_is_refused_and_leaves_nothing(llama_dir, tmp_path):
    with pytest.raises(
        ValueError, match="'random' does not exist; choose from magnitude, wanda, sparsegpt, mask"
    ):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "random")
    with pytest.raises(ValueError, match="no text file is given"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "wanda")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "magnitude")
