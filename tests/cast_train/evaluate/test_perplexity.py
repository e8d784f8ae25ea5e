import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cast_serve.sparsity.pattern import TWO_FOUR
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.evaluate.perplexity import (
    Perplexity,
    mean_divergence,
    paired_difference,
    perplexity,
    soft_and_hard,
)
from cast_train.gates import gating
from cast_train.gates.schedules import Phase


class Fixed(nn.Module):
    """Predicts token 1 of four with one fixed logit, whatever it reads."""

    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 4)
        logits[..., 1] = self.logit
        return SimpleNamespace(logits=logits)


def test_perplexity_of_known_chances():
    blocks = torch.tensor([[0, 1, 1], [0, 1, 2], [2, 1, 1]])
    found = perplexity(Fixed(math.log(5.0)), blocks, batch_blocks=2)
    chances = [5 / 8] * 5 + [1 / 8]
    assert found.perplexity == pytest.approx(math.exp(-sum(map(math.log, chances)) / 6))
    assert (found.num_tokens, found.context_tokens) == (6, 3)


def test_a_damaged_model_is_refused():
    with pytest.raises(ValueError, match="its weights are damaged"):
        perplexity(Fixed(math.nan), torch.tensor([[0, 1]]))


def test_a_fixed_mask_is_measured_once(llama_dir, monkeypatch):
    model = load_dense(llama_dir, torch.float32)
    targets, _ = find_targets(model, TWO_FOUR)
    gate_map = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR), method="fixed")
    passes = []

    def measured(*_, name):
        passes.append(name)
        return name

    monkeypatch.setattr("cast_train.evaluate.perplexity.perplexity", measured)
    phase = Phase(1.0, 1.0, penalty_weight=0.0, is_hard=True)
    blocks = torch.zeros(1, 8, dtype=torch.int64)
    soft, hard = soft_and_hard(model, gate_map, phase, blocks)
    assert passes == ["hard"]
    assert soft is hard
    soft, hard = soft_and_hard(model, gate_map, replace(phase, is_quantized=True), blocks)
    assert passes == ["hard", "soft", "hard"]
    assert soft is not hard


def test_soft_and_hard_meet_where_tau_is_small_and_part_where_it_is_not(llama_dir):
    model = load_dense(llama_dir, torch.float32)
    targets, _ = find_targets(model, TWO_FOUR)
    gate_map = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR))
    for gate in gate_map.values():
        gate.logits.data.normal_(generator=torch.Generator().manual_seed(0))
    blocks = torch.arange(128).view(4, 32)
    cold, warm = (Phase(1.0, tau, 0.0, True) for tau in (1e-4, 10.0))
    soft, hard = soft_and_hard(model, gate_map, cold, blocks)
    assert soft.perplexity == pytest.approx(hard.perplexity, rel=1e-3)
    soft, same = soft_and_hard(model, gate_map, warm, blocks)
    assert same == hard
    assert abs(soft.perplexity / hard.perplexity - 1) > 1e-4


def test_the_divergence_from_itself_is_zero_and_from_another_is_not(llama_dir):
    model, other = (load_dense(llama_dir, torch.float32) for _ in range(2))
    blocks = torch.arange(128).view(4, 32)
    assert mean_divergence(model, other, blocks) == pytest.approx(0, abs=1e-6)
    other.model.layers[0].mlp.down_proj.weight.data.neg_()
    found = mean_divergence(model, other, blocks, batch_blocks=3)
    with torch.no_grad():
        ours, theirs = (m(blocks).logits.log_softmax(-1) for m in (model, other))
    assert found == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)


def test_paired_differences_by_hand():
    def of(*losses):
        return Perplexity(math.exp(statistics.fmean(losses)), 30, 11, losses)

    # Blocks differ by 1 nat, the two models by 0.1, 0.3 and 0.2.
    ours, theirs = of(3.1, 4.3, 5.2), of(3.0, 4.0, 5.0)
    difference, stderr = paired_difference(ours, theirs)
    assert difference == pytest.approx(0.2)
    assert stderr == pytest.approx(0.08185, rel=1e-3)  # test_intervals.py has it by hand
    assert (ours.stderr_nats or 0) > 5 * (stderr or 0)  # without the difficulty of the text
    assert paired_difference(of(1.0), of(2.0)) == (-1.0, None)
    with pytest.raises(ValueError, match="longer"):
        paired_difference(of(1.0), of(1.0, 2.0))


def test_blocks_of_one_article_are_not_independent():
    """Four blocks of each article, equally hard: the text says as little as its articles do."""
    articles = [3.0, 3.6, 2.8, 3.3, 3.9, 2.7, 3.1, 3.5]

    def of(losses):
        return Perplexity(math.exp(statistics.fmean(losses)), 30, 11, tuple(losses))

    text, shuffled = of([loss for loss in articles for _ in range(4)]), of(articles * 4)
    if_independent = statistics.stdev(text.block_losses) / math.sqrt(32)
    assert text.stderr_nats > 1.5 * if_independent > 1.5 * shuffled.stderr_nats
    difference, stderr = paired_difference(text, of([3.0] * 32))
    assert difference == pytest.approx(statistics.fmean(articles) - 3.0)
    assert stderr == pytest.approx(text.stderr_nats)
