import pytest
import torch

from cast_serve.checkpoint.quantization import Quantization
from cast_serve.sparsity.pattern import TWO_FOUR
from cast_serve.sparsity.quantize import SCALE_GROUP
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import models
from cast_train.gates import gating, quantizing
from cast_train.gates.schedules import Phase
from cast_train.pruning.scores import magnitude_scores, weight_rows
from cast_train.training.quantized_start import MARGIN, start_quantized

HARD = Phase(blend=1.0, tau=1e-3, penalty_weight=0.0, is_hard=True)
QUANTIZED = Phase(blend=1.0, tau=1e-3, penalty_weight=0.0, is_hard=True, is_quantized=True)


@pytest.fixture(params=["int8", "int4"])
def started(request, model_dir):
    """A model, its targets, gates and weights before; how far rounding to the nearest goes."""
    group = 32 if request.param == "int4" else SCALE_GROUP
    quantization = Quantization(request.param, group)
    model = models.load_dense(model_dir, torch.float32)
    targets, _ = find_targets(model, TWO_FOUR)
    gates = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR), magnitude_scores(targets))
    quantizing.attach(targets, gates, quantization.group)
    gating.set_phase(gates, HARD)
    blocks = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    before = {name: weight_rows(linear).clone() for name, linear in targets.items()}
    hard = logits(model, blocks)
    start_quantized(model, targets, gates, blocks, quantization)
    return model, targets, gates, blocks, before, hard


@torch.no_grad()
def logits(model, blocks):
    return model.eval()(input_ids=blocks, use_cache=False).logits


def test_weights_move_no_further_than_to_round_to_their_integers(started):
    _, targets, gates, _, before, _ = started
    gating.set_phase(gates, QUANTIZED)
    num_moved = 0
    for name, linear in targets.items():
        quantizer = quantizing.quantizer_of(linear)
        assert (quantizer.scale > 0).all()
        scale = quantizer.scale.repeat_interleave(
            before[name].shape[1] // quantizer.scale.shape[1], dim=1
        )
        mask, weight = gates[name].mask(), weight_rows(linear)
        multiplied = linear.weight
        moved = weight != before[name]
        assert not (moved & ~mask).any()
        # What moved went to the margin of its integer, and from beyond it.
        distance = (weight - multiplied).abs() / scale
        torch.testing.assert_close(distance[moved], torch.full_like(distance[moved], MARGIN))
        assert ((before[name] - multiplied).abs() > MARGIN * scale)[moved].all()
        assert (distance[mask] <= MARGIN * 1.001).all()
        num_moved += int(moved.sum())
    assert num_moved


def test_integers_that_compensate_each_other_change_less_than_the_nearest(started):
    model, targets, gates, blocks, before, hard = started
    gating.set_phase(gates, QUANTIZED)
    error = (logits(model, blocks) - hard).square().mean()
    for name, linear in targets.items():
        gating.stored_weight(linear).data.copy_(before[name])
    assert error < (logits(model, blocks) - hard).square().mean()
