import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, check_weight, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.models import load_dense
from cast_train.gates import gating
from cast_train.gates.gating import sparsity_penalty
from cast_train.gates.schedules import Phase
from cast_train.pruning import oneshot
from cast_train.pruning.scores import magnitude_scores

HARD = Phase(blend=1.0, tau=1e-3, penalty_weight=0.0, is_hard=True)
SOFT = Phase(blend=1.0, tau=0.5, penalty_weight=0.1, is_hard=False)
COLD, HOT = (dataclasses.replace(SOFT, tau=tau) for tau in (1e-4, 1e3))
TOKENS = torch.arange(64).view(2, 32)


@pytest.fixture
def model(model_dir):
    return load_dense(model_dir, torch.float32)


def attached(model, pattern=TWO_FOUR, is_scored=True):
    targets, _ = find_targets(model, pattern)
    scores = magnitude_scores(targets) if is_scored else None
    return targets, gating.attach(targets, dict.fromkeys(targets, pattern), scores)


@pytest.mark.parametrize("is_scored", [True, False])
def test_at_step_0_the_model_computes_what_the_dense_one_does(model, is_scored):
    before = model(TOKENS).logits
    _, gate_map = attached(model, is_scored=is_scored)
    assert torch.equal(model(TOKENS).logits, before)
    assert min(float(gate.logits.detach().sigmoid().min()) for gate in gate_map.values()) > 0.9


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(4, 8)])
def test_hard_gates_make_every_group_exactly_n_of_m(model, pattern):
    targets, gate_map = attached(model, pattern)
    gating.set_phase(gate_map, HARD)
    for name, linear in targets.items():
        check_weight(linear.weight, pattern, name)
        num_kept = (linear.weight != 0).unflatten(-1, (-1, pattern.m)).sum(-1)
        assert (num_kept == pattern.n).all()


def test_hard_gates_from_magnitude_are_one_shot_pruning(model, model_dir):
    _, gate_map = attached(model)
    gating.set_phase(gate_map, HARD)
    pruned = load_dense(model_dir, torch.float32)
    targets, _ = find_targets(pruned, TWO_FOUR)
    oneshot.prune(targets, {n: hard_mask(s) for n, s in magnitude_scores(targets).items()})
    torch.testing.assert_close(model(TOKENS).logits, pruned(TOKENS).logits)


def test_the_loss_reaches_weights_and_gates(model):
    targets, gate_map = attached(model)
    gating.set_phase(gate_map, SOFT)
    (model(TOKENS, labels=TOKENS).loss + gating.penalty(gate_map)).backward()
    for name, gate in gate_map.items():
        assert gate.logits.grad.abs().max() > 0, name
        assert targets[name].parametrizations.weight.original.grad.abs().max() > 0, name


def test_the_mask_follows_logits_that_moved(model):
    _, gate_map = attached(model)
    name, gate = next(iter(gate_map.items()))
    gating.set_phase(gate_map, HARD)
    before = gate.mask().clone()
    gating.set_phase(gate_map, SOFT)
    gate.logits.data.neg_()
    gating.set_phase(gate_map, HARD)
    assert torch.equal(gate.mask(), ~before), name


@pytest.mark.parametrize("settings", [{"method": "ste"}, {"selector": "generator"}], ids=str)
def test_a_gate_that_is_hard_at_once_keeps_what_it_computed(model, settings):
    """The logits of such a gate are only what it was frozen with: not zeros, not the start's."""
    targets, _ = find_targets(model, TWO_FOUR)
    gate_map = gating.attach(
        targets, dict.fromkeys(targets, TWO_FOUR), magnitude_scores(targets), **settings
    )
    if "selector" in settings:
        next(iter(gate_map.values())).generator.outer.weight.data.normal_()
    computed = {name: gate.ranks().detach().clone() for name, gate in gate_map.items()}
    gating.set_phase(gate_map, HARD)
    for name, gate in gate_map.items():
        assert torch.equal(gate.ranks(), computed[name])
        assert torch.equal(gate.mask(), hard_mask(computed[name])), name
        assert not torch.equal(gate.mask(), hard_mask(torch.zeros(gate.mask().shape))), name
    for linear in targets.values():
        linear.parametrizations.weight.original.data.normal_()
    gating.set_phase(gate_map, SOFT)
    gating.set_phase(gate_map, HARD)
    assert all(torch.equal(gate.ranks(), computed[name]) for name, gate in gate_map.items())


def test_detach_gives_back_the_weights_and_the_logits(model, model_dir):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets, gate_map = attached(model)
    gating.set_phase(gate_map, HARD)
    tensors = gating.detach(targets)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tensors.keys() == {f"{name}.gate" for name in targets}
    for name in targets:
        assert tensors[f"{name}.gate"].shape == targets[name].weight.shape


def test_a_fixed_gate_is_the_starts_mask_and_nothing_more(model):
    """A byte a weight, the same mask as that of logits which start so."""
    targets, _ = find_targets(model, TWO_FOUR)
    scores = magnitude_scores(targets)
    gate_map = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR), scores, method="fixed")
    assert gating.logits_of(gate_map) == []
    for name, gate in gate_map.items():
        assert [tensor.dtype for tensor in gate.state_dict().values()] == [torch.bool]
        assert torch.equal(gate.mask(), hard_mask(scores[name])), name
        kept, weight = targets[name].weight, gate.weight()
        assert torch.equal(kept, weight * gate.mask()), name
    assert {t.dtype for t in gating.detach(targets).values()} == {torch.bool}


def test_a_fixed_gate_reads_the_logits_of_earlier_releases(model):
    targets, _ = find_targets(model, TWO_FOUR)
    scores = magnitude_scores(targets)
    gate_map = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR), method="fixed")
    for name, gate in gate_map.items():
        gate.take(scores[name])
        assert torch.equal(gate.mask(), hard_mask(scores[name])), name


@pytest.mark.parametrize(
    ("n", "m", "in_features"), [(2, 4, 128), (2, 4, 48), (8, 16, 64), (20, 64, 192)]
)
def test_kept_weights_alone_are_trained_as_all_are(n, m, in_features):
    pattern = Pattern(n, m)
    inputs = torch.randn(5, in_features)
    linears = [nn.Linear(in_features, 3) for _ in range(2)]
    linears[1].load_state_dict(linears[0].state_dict())
    scores = {"0": torch.rand(3, in_features)}
    alone, all_of_them = (
        gating.attach({"0": linear}, {"0": pattern}, scores, method="fixed") for linear in linears
    )
    gating.drop(alone)
    values = gating.stored_weight(linears[0])
    assert values.shape == (3, in_features * n // m)
    outputs = [linear(inputs) for linear in linears]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    mask, gradient = all_of_them["0"].mask(), gating.stored_weight(linears[1]).grad
    assert torch.equal(alone["0"].mask(), mask)
    assert torch.equal(values.grad.flatten(), gradient[mask])

    with gating.restored(alone):
        whole = gating.stored_weight(linears[0])
        assert torch.equal(whole, linears[1].weight)
        whole.data.mul_(2)
    assert gating.stored_weight(linears[0]) is values
    assert torch.equal(linears[0].weight, 2 * linears[1].weight)
    assert torch.equal(alone["0"].weight(), 2 * linears[1].weight)
    gating.restore(alone)
    assert torch.equal(gating.detach({"0": linears[0]})["0.gate"], mask)
    assert torch.equal(linears[0].weight, 2 * all_of_them["0"].weight() * mask)


def test_the_penalty_is_the_mean_of_the_smallest_gates_of_a_group():
    exact = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]])
    assert sparsity_penalty(exact, TWO_FOUR) == 0
    assert sparsity_penalty(torch.ones(3, 8), TWO_FOUR) == 2
    mixed = torch.tensor([[0.9, 0.1, 0.8, 0.2, 1.0, 0.0, 1.0, 0.5]])
    assert sparsity_penalty(mixed, TWO_FOUR).item() == pytest.approx((0.3 + 0.5) / 2)


@given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (4, 8), (8, 16)]),
    st.integers(0, 2**32 - 1),
    st.floats(1e-6, 1.0),
)
def test_the_penalty_is_zero_on_exact_patterns_and_nowhere_else(nm, seed, leak):
    pattern = Pattern(*nm)
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(4, 3 * pattern.m, generator=draw)
    mask = hard_mask(kept, pattern)
    exact = (0.1 + kept) * mask  # kept gates may have any value
    assert sparsity_penalty(exact, pattern) == 0
    leaking = exact.clone()
    row, column = (~mask).nonzero()[0]
    leaking[row, column] = leak
    assert sparsity_penalty(leaking, pattern) > 0


def test_statistics_count_undecided_gates_and_flips(model):
    _, gate_map = attached(model)
    start = {name: gate.mask() for name, gate in gate_map.items()}
    still = gating.statistics(gate_map, COLD, start)
    assert (still.flipped_share, still.undecided_share < 0.01) == (0, True)
    assert gating.statistics(gate_map, HOT, start).undecided_share == 1
    for gate in gate_map.values():
        gate.logits.data.neg_()
    gating.set_phase(gate_map, SOFT)
    assert gating.statistics(gate_map, COLD, start).flipped_share == 1
