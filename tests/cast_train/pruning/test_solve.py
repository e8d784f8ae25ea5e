import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, PatternError, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.config import Fixed, TrainConfig
from cast_train.pruning import oneshot, solve
from cast_train.pruning.scores import weight_rows
from cast_train.pruning.sparsegpt import DAMPING, inverse_factor, sparsegpt
from cast_train.training.run import train


def random_problem(num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs that tell of each other, fp64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(num_columns // 2, num_columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * num_columns, num_columns // 2, generator=generator).double() @ mix
    inputs += 0.1 * torch.randn(inputs.shape, generator=generator)
    weight = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    return weight, inputs


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(3, 6)], ids=str)
def test_each_row_is_its_own_least_squares_fit(pattern):
    weight, inputs = random_problem(5, 48)
    mask = hard_mask(weight.abs(), pattern)
    hessian = inputs.t() @ inputs
    mask[4] = True  # nothing to solve
    solved = solve.solve_kept(weight, mask, hessian, tolerance=0)
    damping = (DAMPING * hessian.diagonal().mean()).sqrt() * torch.eye(48, dtype=torch.float64)
    rows = torch.cat([inputs, damping])  # whose own H is the damped one
    for row in range(5):
        columns = mask[row].nonzero()[:, 0]
        fit = torch.linalg.lstsq(rows[:, columns], rows @ weight[row]).solution
        torch.testing.assert_close(solved[row, columns], fit)
    assert (solved[~mask] == 0).all()


def test_no_weights_under_the_mask_are_better_than_solved_ones():
    weight, inputs = random_problem(16, 64)
    inputs[:, 1] = 0  # an input that says nothing
    hessian = inputs.t() @ inputs
    moved, scores = sparsegpt(weight, inverse_factor(hessian), TWO_FOUR)
    mask = hard_mask(scores, TWO_FOUR)

    def error(candidate: torch.Tensor) -> float:
        return float((inputs @ (candidate - weight).t()).square().sum())

    solved = error(solve.solve_kept(weight, mask, hessian))
    assert solved < 0.98 * error(moved * mask)
    assert solved < 0.5 * error(weight * mask)
    assert solved < 1.005 * error(solve.solve_kept(weight, mask, hessian, tolerance=0))


def test_weights_that_are_zero_where_they_are_dropped_stay_as_they_are(model_dir):
    model = load_dense(model_dir, torch.float32)
    targets, _ = find_targets(model, TWO_FOUR)
    masks = {name: hard_mask(weight_rows(each).abs()) for name, each in targets.items()}
    oneshot.prune({name: targets[name] for name in list(targets)[1:]}, masks)
    before = {name: weight_rows(each).clone() for name, each in targets.items()}
    solve.solve(model, targets, masks, torch.randint(0, 100, (2, 32)))
    (dense, *pruned) = targets
    assert (weight_rows(targets[dense])[~masks[dense]] == 0).all()
    assert not torch.equal(weight_rows(targets[dense]), before[dense] * masks[dense])
    assert all(torch.equal(weight_rows(targets[name]), before[name]) for name in pruned)


@pytest.fixture
def few_blocks(monkeypatch):
    settings = Fixed(block_size=32, calibration_blocks=4)
    monkeypatch.setattr(oneshot, "Fixed", lambda: settings)


@pytest.mark.parametrize("method", oneshot.METHODS)
def test_solving_keeps_the_methods_mask(few_blocks, model_dir, text_file, tmp_path, method):
    plain, solved = tmp_path / "plain", tmp_path / "solved"
    oneshot.write_pruned(model_dir, [text_file], plain, method)
    record = oneshot.write_pruned(model_dir, [text_file], solved, method, is_solved=True)
    assert record["solved"]
    before, after = load_dense(plain, torch.float32), load_dense(solved, torch.float32)
    targets, _ = find_targets(after, TWO_FOUR)
    for name, linear in targets.items():
        old, new = weight_rows(before.get_submodule(name)), weight_rows(linear)
        assert ((new != 0) & (old == 0)).sum() == 0
        assert not torch.equal(old, new)


def test_a_mask_can_be_that_of_any_sparse_directory(
    few_blocks, llama_dir, text_file, settings_file, tmp_path
):
    config = TrainConfig.from_toml(settings_file, steps=2)
    train(llama_dir, [text_file], tmp_path / "gated", config)
    convert(tmp_path / "gated", tmp_path / "compressed")
    for kind in ("gated", "compressed"):
        oneshot.write_pruned(
            llama_dir, [], tmp_path / f"of-{kind}", "mask", mask_dir=tmp_path / kind
        )
    dense = load_dense(llama_dir)
    targets, _ = find_targets(dense, TWO_FOUR)
    hardened = oneshot.read_masks(tmp_path / "gated", targets, dict.fromkeys(targets, TWO_FOUR))
    for kind in ("gated", "compressed"):
        found = load_dense(tmp_path / f"of-{kind}")
        for name, linear in targets.items():
            weight = weight_rows(found.get_submodule(name))
            assert torch.equal(weight, weight_rows(linear) * hardened[name]), (kind, name)


def test_wrong_masks_are_refused_and_leave_nothing(few_blocks, llama_dir, model_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PatternError, match=f"of {llama_dir}: .* groups do not have at most 2"):
        oneshot.write_pruned(llama_dir, [], out, "mask", mask_dir=llama_dir)
    with pytest.raises(ValueError, match="a directory to take the mask from"):
        oneshot.write_pruned(llama_dir, [], out, "mask")
    with pytest.raises(ValueError, match="a directory to take the mask from"):
        oneshot.write_pruned(llama_dir, [], out, "magnitude", mask_dir=model_dir)
    with pytest.raises(ValueError, match="no text file is given"):
        oneshot.write_pruned(llama_dir, [], out, "magnitude", is_solved=True)
    assert not list(tmp_path.iterdir())
