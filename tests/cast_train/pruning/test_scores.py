import pytest
import torch
from torch import nn

from cast_train.pruning.scores import wanda_scores


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
    scores = wanda_scores(
        model, {"linear": model.linear}, torch.tensor([[0, 1], [2, 2]]), batch_blocks=1
    )
    inputs = model.table(torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(scores["linear"], model.linear.weight.abs() * inputs.norm(dim=0))


def test_a_target_that_no_token_reaches_is_named():
    model = Embedder()
    with pytest.raises(ValueError, match="never reached lost"):
        wanda_scores(model, {"lost": nn.Linear(4, 4)}, torch.tensor([[0, 1]]))
