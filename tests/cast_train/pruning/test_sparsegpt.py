import pytest
import torch

from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.pruning.oneshot import prune
from cast_train.pruning.scores import wanda_scores
from cast_train.pruning.sparsegpt import DAMPING, inverse_factor, sparsegpt, sparsegpt_scores


def test_sparsegpt_moves_the_kept_weights_to_the_least_squares_fit():
    """If the first two of four columns go, the other two make up for them as well as can be."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 4) @ torch.randn(4, 4)
    weight = torch.tensor([[0.01, 0.02, 1.0, -2.0], [-0.02, 0.01, 3.0, 1.0]])
    moved, scores = sparsegpt(weight, inverse_factor(inputs.t() @ inputs), TWO_FOUR)
    assert hard_mask(scores, TWO_FOUR).tolist() == [[False, False, True, True]] * 2
    hessian = damped(inputs)
    makes_up = torch.linalg.solve(hessian[2:, 2:], hessian[2:, :2] @ weight[:, :2].t().double()).t()
    assert makes_up.abs().max() > 0.01
    torch.testing.assert_close(moved[:, 2:], weight[:, 2:] + makes_up.float())


def damped(inputs):
    """X^T X as SparseGPT inverts it, fp64."""
    hessian = inputs.double().t() @ inputs.double()
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def test_sparsegpt_scores_are_weight_over_the_inverse_hessians_factor():
    torch.manual_seed(1)
    inputs, weight = torch.randn(64, 8, dtype=torch.float64), torch.randn(3, 8)
    _, scores = sparsegpt(weight, inverse_factor((inputs.t() @ inputs).float()), TWO_FOUR)
    upper = torch.linalg.cholesky(damped(inputs).inverse(), upper=True)
    expected = weight[:, :4].abs() / upper.diagonal()[:4]  # the first group is not moved yet
    torch.testing.assert_close(scores[:, :4], expected.float())


@pytest.mark.parametrize("num_columns", [8, 300])
def test_sparsegpt_keeps_the_outputs_closer_than_its_mask_alone(num_columns):
    """300 columns are more than are worked on at once, and no multiple of that."""
    torch.manual_seed(2)
    rank = num_columns // 2  # inputs that tell of each other, as a model's do
    inputs = torch.randn(512, rank) @ torch.randn(rank, num_columns)
    inputs += 0.1 * torch.randn(512, num_columns)
    inputs[:, 1] = 0  # an input that says nothing
    weight = torch.randn(16, num_columns)
    moved, scores = sparsegpt(weight, inverse_factor(inputs.t() @ inputs), TWO_FOUR)
    mask = hard_mask(scores, TWO_FOUR)
    wanted = inputs @ weight.t()
    own = (inputs @ (moved * mask).t() - wanted).square().sum()
    unmoved = (inputs @ (weight * mask).t() - wanted).square().sum()
    assert own < 0.5 * unmoved


def column_by_column(weight, hessian, pattern):
    """SparseGPT without blocks: every column's error goes to all columns after it at once."""
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)
    weight, kept = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(weight.shape[1]):
        if i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            kept[:, group] = hard_mask(weight[:, group].abs() / upper.diagonal()[group], pattern)
        error = torch.where(kept[:, i], 0.0, weight[:, i]) / upper[i, i]
        weight[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return weight, kept


@pytest.mark.parametrize(
    "pattern", [TWO_FOUR, Pattern(2, 5), Pattern(3, 6), Pattern(60, 130)], ids=str
)
def test_sparsegpts_blocks_change_nothing(pattern):
    """5 and 6 do not divide the 128 columns that are worked on at once, and 130 is more."""
    generator = torch.Generator().manual_seed(0)
    num_columns = 3 * 130 if pattern.m == 130 else 300
    mix = torch.randn(num_columns // 2, num_columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * num_columns, num_columns // 2, generator=generator).double() @ mix
    inputs += 0.1 * torch.randn(inputs.shape, generator=generator)
    weight = torch.randn(16, num_columns, generator=generator, dtype=torch.float64)
    hessian = inputs.t() @ inputs
    moved, scores = sparsegpt(weight, inverse_factor(hessian), pattern)
    expected, kept = column_by_column(weight, hessian, pattern)
    torch.testing.assert_close(moved, expected)
    assert torch.equal(hard_mask(scores, pattern), kept)


def test_sparsegpt_keeps_a_models_outputs_closer_than_wanda(model_dir):
    blocks = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(4))
    dense, wanda, moved = (load_dense(model_dir, torch.float32) for _ in range(3))
    targets, _ = find_targets(wanda, TWO_FOUR)
    prune(targets, {n: hard_mask(s) for n, s in wanda_scores(wanda, targets, blocks).items()})
    targets, _ = find_targets(moved, TWO_FOUR)
    scores = sparsegpt_scores(moved, targets, blocks, dict.fromkeys(targets, TWO_FOUR))
    prune(targets, {name: hard_mask(found) for name, found in scores.items()})
    with torch.no_grad():
        wanted = dense.base_model(tokens).last_hidden_state
        errors = [
            float((model.base_model(tokens).last_hidden_state - wanted).square().sum())
            for model in (moved, wanda)
        ]
    assert errors[0] < 0.9 * errors[1]
