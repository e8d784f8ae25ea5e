import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.sparsity.pattern import Pattern
from cast_train.config import TrainConfig
from cast_train.gates import budget, gating
from cast_train.gates.selection import soft_topk
from cast_train.pruning import oneshot
from cast_train.training.run import train
from tests.cast_train.settings import changed


def threshold_mask(scores: torch.Tensor, kept: float, tau: float) -> torch.Tensor:
    """p of groups [..., 64] that sum to a real number, by bisection."""
    low, high = scores.amin(-1, keepdim=True) - 40 * tau, scores.amax(-1, keepdim=True) + 40 * tau
    for _ in range(80):
        theta = (low + high) / 2
        is_more = ((scores - theta) / tau).sigmoid().sum(-1, keepdim=True) > kept
        low, high = torch.where(is_more, theta, low), torch.where(is_more, high, theta)
    return ((scores - theta) / tau).sigmoid()


@pytest.mark.parametrize("n", [4, 32, 56])
def test_the_gradient_by_n_is_that_of_one_weight_more_in_every_group(n):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(5, 3, 64, generator=generator, dtype=torch.float64)
    by_p = torch.randn(5, 3, 64, generator=generator, dtype=torch.float64)
    kept = torch.tensor(float(n), requires_grad=True)
    p = soft_topk(scores.flatten(-2), n, 64, 0.3, kept)
    (p * by_p.flatten(-2)).sum().backward()
    more, less = (threshold_mask(scores, n + change, 0.3) for change in (1e-3, -1e-3))
    assert kept.grad is not None
    assert float(kept.grad) == pytest.approx(float(((more - less) * by_p).sum()) / 2e-3, rel=1e-4)


def test_units_exchange_weights_until_a_limit_and_the_sum_stays():
    sizes = [100, 300, 600]
    kept = [torch.tensor(32.0), torch.tensor(32.0), torch.tensor(32.0)]
    total = sum(size * float(n) for size, n in zip(sizes, kept, strict=True))
    for step in range(40):
        before = [float(n) for n in kept]
        budget.exchange(kept, sizes, torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64), 2.0)
        found = sum(size * float(n) for size, n in zip(sizes, kept, strict=True))
        assert found == pytest.approx(total, rel=1e-6)
        assert kept[0] >= before[0], step
        assert kept[2] <= before[2], step
    assert [float(n) for n in kept] == pytest.approx([56, 56, 16])  # 1,600 left for the last


def test_equal_benefits_move_nothing():
    kept = [torch.tensor(20.0), torch.tensor(40.0)]
    budget.exchange(kept, [1, 1], torch.tensor([0.5, 0.5], dtype=torch.float64), 2.0)
    assert [float(n) for n in kept] == [20, 40]


def gates_of(kept: list[float], rows: list[int]) -> dict[str, gating.Gate]:
    gates: dict[str, gating.Gate] = {
        str(number): gating.LogitGate(torch.zeros(num_rows, 64), Pattern(32, 64))
        for number, num_rows in enumerate(rows)
    }
    budget.attach(gates, [[name] for name in gates])
    for (n, _), found in zip(budget.learnt_units(gates), kept, strict=True):
        n.data.fill_(found)
    return gates


@pytest.mark.parametrize(
    ("kept", "rows", "wanted"),
    [
        ([30.0, 34.0], [10, 10], [32, 32]),
        ([31.9, 33.0], [10, 10], [32, 32]),
        ([35.0, 35.0, 35.0], [10, 10, 10], [36, 36, 32]),
        ([32.0, 40.0], [10, 20], [32, 40]),
        ([35.9, 32.1], [1000, 1], [32, 36]),  # 36 of the first is more than there is
        ([56.0, 4.0], [3, 3], [56, 4]),
    ],
)
def test_hardened_n_are_multiples_of_4_within_the_budget(kept, rows, wanted):
    gates = gates_of(kept, rows)
    budget.harden(gates)
    assert [n.item() for n, _ in budget.learnt_units(gates)] == wanted
    budget.harden(gates)  # as a run that is resumed there does
    assert [n.item() for n, _ in budget.learnt_units(gates)] == wanted


@pytest.fixture
def config(settings_file):
    settings = TrainConfig.from_toml(settings_file, method="gates").as_dict() | {
        "sparsity": "32:64",
        "zeros": 0.4,
        "steps": 8,
        "hard_fraction": 0.5,
        "tau_end_fraction": 0.5,
        "tau_start": 0.3,
        "budget_learning_rate": 4.0,
        "checkpoint_every": 2,
    }
    return TrainConfig.from_dict(settings)


def test_a_run_learns_n_converts_and_goes_on_after_a_stop(
    words_dir, text_file, config, tmp_path, train_until
):
    fixed = train(words_dir, [text_file], tmp_path / "as", changed(config, budget_learning_rate=0))
    record = train(words_dir, [text_file], tmp_path / "whole", config)
    kept = record["kept_of_64"]
    assert kept != fixed["kept_of_64"]
    assert all(n % 4 == 0 and 4 <= n <= 56 for n in kept.values())
    for layer in ("model.layers.0", "model.layers.1"):  # vLLM merges them
        assert len({kept[f"{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
    summary = convert(tmp_path / "whole", tmp_path / "sparse")
    assert summary["zeros"] >= convert(tmp_path / "as", tmp_path / "as-sparse")["zeros"] - 1e-9
    quality = record["quality"]
    assert quality["perplexity_soft"] == pytest.approx(quality["perplexity_hard"], rel=1e-3)

    # Stopped while N is learnt, and later.
    for step in (3, 5):
        out = tmp_path / f"stopped-{step}"
        train_until(step, words_dir, [text_file], out, config)
        again = train(words_dir, [text_file], out, config, is_resume=True)
        assert again["kept_of_64"] == kept
        assert again["quality"] == record["quality"]


def test_n_learnt_on_unmoved_weights_can_be_taken_as_a_mask(words_dir, text_file, config, tmp_path):
    still = changed(config, masks_first=True, learning_rate=0.0, channel_order="given")
    record = train(words_dir, [text_file], tmp_path / "out", still)
    assert len(set(record["kept_of_64"].values())) > 1
    again = oneshot.write_pruned(
        words_dir,
        [text_file],
        tmp_path / "mask",
        "mask",
        f"{record['n']}:64",
        mask_dir=tmp_path / "out",
    )
    assert again["kept_of_64"] == record["kept_of_64"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": "2:4"}, "needs zeros below 1 in N of 64, but sparsity is 2:4"),
        ({"zeros": 1.0}, "sparsity is 32:64 and zeros 1; for example, set"),
        ({"selector": "penalty"}, "does not work with selector penalty; choose soft_topk"),
        ({"is_sharded": True}, "cannot be combined with is_sharded"),
        (
            {"hard_fraction": 0.0, "tau_end_fraction": 0.0},
            "has no effect without a hard_fraction above 0",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **changes)
