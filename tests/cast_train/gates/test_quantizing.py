import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import linear as multiply

from cast_serve.sparsity.bitmask import decompress, pack_mask
from cast_serve.sparsity.pattern import TWO_FOUR
from cast_serve.sparsity.quantize import (
    dequantize,
    dequantize_int4,
    quantize_rows,
    quantize_values_int4,
    rounded,
)
from cast_train.gates import gating, quantizing
from cast_train.gates.schedules import Phase

QUANTIZED = Phase(blend=1.0, tau=1e-3, penalty_weight=0.0, is_hard=True, is_quantized=True)


@pytest.fixture
def linear():
    """160 inputs: two scale groups of 64 and one of 32, or one of 128 and one of 32."""
    torch.manual_seed(0)
    return nn.Linear(160, 12)


def attached(linear, scale_group, phase=QUANTIZED, scales=None):
    """The linear's gate; its quantiser, after it, has the scales that `convert` would choose."""
    gate = gating.attach({"q": linear}, {"q": TWO_FOUR}, {"q": unmasked(linear).abs()})["q"]
    gate.set_phase(phase)
    if scales is None:
        scales = {"q": searched(linear, gate, scale_group)[1]}
    quantizing.attach({"q": linear}, {"q": gate}, scale_group, scales)
    return gate


def searched(linear, gate, scale_group):
    """The integers and scales that `convert` would choose."""
    kept = unmasked(linear)[gate.mask()].view(12, 80).bfloat16()
    return quantize_rows(kept) if scale_group is None else quantize_values_int4(kept, scale_group)


def unmasked(linear):
    return gating.stored_weight(linear).detach()


def as_stored(linear, gate, scale_group):
    """What `convert` makes of the weight, dequantised: [out_features, in_features]."""
    integers, scale = searched(linear, gate, scale_group)
    if scale_group is None:
        kept = dequantize(integers, scale, torch.float32)
    else:
        kept = dequantize_int4(integers, scale, scale_group, torch.float32)
    return decompress(kept, pack_mask(gate.mask()), 160)


@pytest.mark.parametrize("scale_group", [None, 128, 64, 32])
def test_the_forward_is_that_of_what_is_stored(linear, scale_group):
    stored = gating.stored_weight(linear).data
    stored.copy_(stored.bfloat16())
    gate = attached(linear, scale_group)
    expected = as_stored(linear, gate, scale_group)
    torch.testing.assert_close(linear.weight, expected, rtol=1e-6, atol=0)
    x = torch.randn(2, 5, 160)
    torch.testing.assert_close(linear(x), multiply(rounded(x), expected, linear.bias))


def test_kept_weights_and_inputs_have_the_gradient_of_what_is_multiplied(linear):
    gate = attached(linear, 32)
    x, output_grad = torch.randn(5, 160, requires_grad=True), torch.randn(5, 12)
    linear(x).backward(output_grad)
    found = gating.stored_weight(linear).grad
    torch.testing.assert_close(found, output_grad.t() @ rounded(x.detach()) * gate.mask())
    torch.testing.assert_close(x.grad, output_grad @ linear.weight.detach())


@pytest.mark.parametrize("scale_group", [None, 64])
def test_written_integers_are_no_others_in_bf16(linear, scale_group):
    gate = attached(linear, scale_group)
    trained, before = linear.weight.detach().clone(), gating.stored_weight(linear).detach().clone()
    quantizing.write_integers({"q": linear}, {"q": gate})
    stored = gating.stored_weight(linear).data
    kept = gate.mask()
    assert torch.equal(stored[kept], trained[kept])
    assert torch.equal(stored[~kept], before[~kept])
    stored.copy_(stored.bfloat16())
    assert not torch.equal(stored[kept], trained[kept])
    assert torch.equal(linear.weight, trained)


@pytest.mark.parametrize("change", [{"is_hard": False, "blend": 0.0}, {"is_quantized": False}])
def test_nothing_is_rounded_before_the_phase(linear, change):
    zeros = {"q": torch.zeros(12, 3)}  # not chosen yet
    gate = attached(linear, 64, dataclasses.replace(QUANTIZED, **change), zeros)
    weight = unmasked(linear) * (gate.mask() if gate.phase.is_hard else 1)
    x = torch.randn(3, 160)
    torch.testing.assert_close(linear(x), multiply(x, weight, linear.bias))
    assert gating.detach({"q": linear}).keys() == {"q.gate"}


def test_scales_are_stored_with_the_gates_and_taken_as_they_are(linear):
    chosen = torch.full((12, 3), 0.5, dtype=torch.bfloat16)
    attached(linear, 64, scales={"q": chosen})
    assert (linear.weight % 0.5 == 0).all()
    stored = gating.detach({"q": linear})
    assert stored.keys() == {"q.gate", "q.weight_scale"}
    assert torch.equal(stored["q.weight_scale"], chosen)
    x = torch.randn(3, 160)
    torch.testing.assert_close(linear(x), multiply(x, unmasked(linear), linear.bias))


def test_scales_of_another_shape_are_refused(linear):
    with pytest.raises(ValueError, match=r"q.weight_scale is \[12, 2\], but \[12, 3\] belongs to"):
        attached(linear, 64, scales={"q": torch.ones(12, 2)})
