import logging

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from cast_serve.sparsity.pattern import TWO_FOUR
from cast_train.config import Fixed, Gates, TrainConfig
from cast_train.gates import gating
from cast_train.gates.reach import measure_reach
from cast_train.gates.schedules import learning_rate_factor
from cast_train.training.run import train


def gates_of(*rows: list[float]) -> dict[str, gating.Gate]:
    return {"a": gating.LogitGate(torch.tensor(rows), TWO_FOUR)}


def test_by_hand():
    config = Gates(steps=10, hard_fraction=0.3, gate_learning_rate=0.3, warmup_fraction=0.0)
    gates = gates_of([4.0, 3.0, 2.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 9.0, 1.0, 8.0])
    found = measure_reach(gates, config)
    assert found.mean_gap == pytest.approx((0.5 + 0.0 + 7.0) / 3)
    assert found.reach == pytest.approx(0.3 * (0.1 + 0.19 + 0.271))  # steps 0, 1 and 2 are soft
    assert found.changeable_share == pytest.approx(1 / 3)  # 0.5 > 2 * 0.17


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.2, 1.0])
def test_the_factor_is_that_of_transformers(warmup_fraction: float):
    config = Fixed(steps=20, warmup_fraction=warmup_fraction)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(20 * warmup_fraction), 20)
    for step in range(20):
        assert learning_rate_factor(step, config) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("is_far", [False, True])
def test_a_run_flips_no_more_than_it_can_and_warns_where_that_is_little(
    llama_dir, text_file, settings_file, tmp_path, caplog, is_far
):
    rate = f"gate_learning_rate={3.0 if is_far else 0.01}"
    settings = {"steps": 10, "start": "magnitude", "hard_fraction": 0.5}
    config = TrainConfig.from_toml(settings_file, [rate], **settings)
    with caplog.at_level(logging.WARNING):
        record = train(llama_dir, [text_file], tmp_path / "out", config)
    found = record["gates"]
    assert 0 < found["flipped_share"] <= found["changeable_share"]
    assert ("gate logits move by about" in caplog.text) is not is_far
    if is_far:
        assert found["reach"] > 3 * found["mean_gap"]
    else:
        assert found["changeable_share"] < 0.2
        assert f"about {100 * found['changeable_share']:.1f}% of the groups" in caplog.text


FIXED_MASK = {"start": "magnitude", "hard_fraction": 0.0, "tau_end_fraction": 0.0}


@pytest.mark.parametrize("settings", [{"method": "ste"}, FIXED_MASK], ids=["ste", "fixed mask"])
def test_what_learns_no_logits_has_no_reach(
    llama_dir, text_file, settings_file, tmp_path, caplog, settings
):
    config = TrainConfig.from_toml(settings_file, steps=2, **settings)
    record = train(llama_dir, [text_file], tmp_path / "out", config)
    assert "reach" not in record["gates"]
    assert "gate logits move by about" not in caplog.text
