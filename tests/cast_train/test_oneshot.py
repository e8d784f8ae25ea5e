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


def test_obs_is_the_error_that_the_other_weights_cannot_repair(monkeypatch):
    """Against brute force: drop one weight, fit the others anew, and measure the row's output."""
    monkeypatch.setattr(oneshot, "MAX_HESSIAN_BYTES", 1)  # a calibration pass per target
    torch.manual_seed(0)
    model = Embedder()
    model.table = nn.Embedding(50, 4)
    model.table.weight.data[:, 1] += 0.8 * model.table.weight.data[:, 0]  # correlated inputs
    tokens = torch.arange(50).view(5, 10)
    targets = {"linear": model.linear, "same": model.linear}
    scores = oneshot.obs_scores(model, targets, tokens)
    x = model.table.weight.detach().double()
    damping = 0.01 * x.square().sum(0).mean()
    x = torch.cat((x, damping.sqrt() * torch.eye(4).double()))  # damping as four more inputs
    weight = model.linear.weight.detach().double()
    for j in range(4):
        others = [i for i in range(4) if i != j]
        wanted = x @ weight.T
        error = wanted - x[:, others] @ torch.linalg.lstsq(x[:, others], wanted).solution
        found = scores["linear"][:, j].double()
        torch.testing.assert_close(found, error.norm(dim=0), rtol=1e-4, atol=0)
    assert torch.equal(scores["linear"], scores["same"])


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
