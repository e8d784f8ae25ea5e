import pytest
import torch
from torch import nn

from cast_serve.nm import TWO_FOUR, CheckpointError, check_weight, find_targets
from cast_train import oneshot
from cast_train.checkpoint import load_dense, verify


class Embedder(nn.Module):
    """Looks its inputs up and multiplies: the smallest thing that Wanda can watch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.linear = nn.Linear(4, 2, bias=False)

    def forward(self, input_ids, use_cache):
        return self.linear(self.table(input_ids))


def test_wanda_is_weight_times_input_norm():
    model = Embedder()
    scores = oneshot.wanda_scores(
        model, {"linear": model.linear}, torch.tensor([[0, 1], [2, 2]]), batch_blocks=1
    )
    inputs = model.table(torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(scores["linear"], model.linear.weight.abs() * inputs.norm(dim=0))


def test_a_target_that_no_token_reaches_is_named():
    model = Embedder()
    with pytest.raises(ValueError, match="never reached lost"):
        oneshot.wanda_scores(model, {"lost": nn.Linear(4, 4)}, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
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
        ValueError, match="'sparsegpt' does not exist; choose from magnitude, wanda"
    ):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "sparsegpt")
    with pytest.raises(ValueError, match="no text file is given"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "wanda")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "magnitude")
