"""Targets + calibration blocks + a share of zeros -> the linears that stay dense.

A model with fewer zeros than 2:4 has some linears left dense. Linears that read the same inputs (q,
k and v; gate and up) are served as one and are left dense together, as one unit. Which units, is
chosen in one of two ways; both start from the change W' - W that SparseGPT would make to each.

fisher  What pruning a linear costs is estimated to second order, with Fisher's matrix in place of
        the Hessian, one linear at a time:

            cost = 1/2 sum over tokens of (g . (W' - W) x)^2

        x are the linear's inputs at a token and g the gradient of the loss by its outputs there,
        for labels drawn from the model itself. The units that cost most for their size stay.
gates   A gate c from 0 to 1 beside each unit makes its weights W + (1 - c) (W' - W). All gates
        together learn to keep the model's predictions those of the dense one, under the constraint
        that sum(c * size) is the number of weights that may stay dense; the highest stay.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_train.gates.gating import is_transposed
from cast_train.losses import divergence
from cast_train.passes import evaluating, hooked
from cast_train.precision import autocast
from cast_train.pruning.scores import check_reached, weight_rows
from cast_train.pruning.sparsegpt import sparsegpt_scores

ALLOCATIONS = ("fisher", "gates")
# Of the gates; no others were tried.
STEPS = 24
STEP_BLOCKS = 4  # sequences
MOMENTUM = 0.8
LARGEST_STEP = 0.15


def keep_dense(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    pattern: Pattern,
    blocks: Tensor,
    zeros: float,
    allocation: str = "fisher",
) -> list[str]:
    """Chooses the linears that stay dense.

    Args:
        model: a transformers model that the targets belong to, dense, fp32; it is left as it was.
        targets: linears by name.
        pattern: of those that do not stay dense.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        zeros: share of zeros over all weights of all targets, above 0; it is reached or exceeded if
            the pattern has more, else nothing stays dense.
        allocation: ``fisher`` or ``gates``.

    Returns:
        names, in the targets' order.

    Raises:
        UsageError: if zeros is not above 0, there is no such allocation, or the calibration tokens
            never reach a target.
    """
    if not zeros > 0:
        raise UsageError(f"zeros is {zeros}, but a share of zeros must be above 0")
    if allocation not in ALLOCATIONS:
        known = " or ".join(ALLOCATIONS)
        raise UsageError(f"allocation {allocation!r} does not exist; choose {known}")
    if zeros >= pattern.zeros:
        return []
    changes = _changes(model, targets, pattern, blocks)
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with evaluating(model):
            units = _units(model, targets, blocks[:1])
            sizes = [sum(changes[name].numel() for name in unit) for unit in units]
            budget = (1 - zeros / pattern.zeros) * sum(sizes)
            if allocation == "gates":
                worth = _learn_gates(model, targets, units, changes, blocks, budget)
            else:
                costs = _costs(model, targets, changes, blocks)
                unit_costs = [sum(costs[name] for name in unit) for unit in units]
                worth = [cost / size for cost, size in zip(unit_costs, sizes, strict=True)]
    finally:
        for parameter, is_required in required.items():
            parameter.requires_grad_(is_required)
    kept: set[str] = set()
    for number in sorted(range(len(units)), key=lambda i: worth[i], reverse=True):
        if sizes[number] <= budget:
            budget -= sizes[number]
            kept.update(units[number])
    return [name for name in targets if name in kept]


@torch.no_grad()
def _changes(
    model: nn.Module, targets: Mapping[str, nn.Module], pattern: Pattern, blocks: Tensor
) -> dict[str, Tensor]:
    """W' - W by name, [out_features, in_features], W' as SparseGPT prunes; the model stays."""
    dense = {name: weight_rows(linear).clone() for name, linear in targets.items()}
    scores = sparsegpt_scores(model, targets, blocks, pattern)
    changes = {}
    for name, linear in targets.items():
        changes[name] = weight_rows(linear) * hard_mask(scores[name], pattern) - dense[name]
        linear.weight.copy_(dense[name].t() if is_transposed(linear) else dense[name])
    return changes


@torch.no_grad()
def _units(model: Any, targets: Mapping[str, nn.Module], blocks: Tensor) -> list[list[str]]:
    """The names of linears with the same inputs together."""
    readers: dict[int, list[str]] = {}  # of an input, by its id
    held: list[Tensor] = []  # else another tensor might get its id

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            held.append(inputs[0])
            readers.setdefault(id(inputs[0]), []).append(name)

        return hook

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in targets.items()]
    with hooked(hooks):
        model(input_ids=blocks.to(next(model.parameters()).device), use_cache=False)
    units = list(readers.values())
    check_reached(targets, {name: True for unit in units for name in unit})
    return units


def _learn_gates(
    model: Any,
    targets: Mapping[str, nn.Module],
    units: list[list[str]],
    changes: Mapping[str, Tensor],
    blocks: Tensor,
    budget: float,
) -> list[tuple[float, float]]:
    """The module's gate of each unit, and what decides between equal ones: its last direction.

    Gradients are taken for each weight of a unit, so that a large unit does not outweigh a small
    one; the largest step of a gate has the same length in every step.
    """
    device = next(model.parameters()).device
    sizes = torch.tensor([sum(changes[name].numel() for name in unit) for unit in units])
    gates = torch.full(sizes.shape, budget / float(sizes.sum()))
    direction = torch.zeros_like(gates)
    is_dense = False

    def apply_gate(name: str, number: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_: nn.Module, inputs: Any, outputs: Tensor) -> Tensor | None:
            if is_dense:
                return None
            return outputs + (1 - learnt[number]) * nn.functional.linear(inputs[0], changes[name])

        return hook

    hooks = [
        targets[name].register_forward_hook(apply_gate(name, number))
        for number, unit in enumerate(units)
        for name in unit
    ]
    with hooked(hooks):
        for step in tqdm(range(STEPS), desc="gates of linears", unit="step"):
            learnt = gates.clone().to(device).requires_grad_()
            for i in range(step * STEP_BLOCKS, (step + 1) * STEP_BLOCKS):
                asked = {"input_ids": blocks[i % len(blocks), None].to(device), "use_cache": False}
                with autocast("auto", device.type):
                    is_dense = True
                    with torch.no_grad():
                        wanted = model(**asked).logits
                    is_dense = False
                    distance = divergence(model(**asked).logits, wanted)
                distance.backward()
            assert learnt.grad is not None
            direction = MOMENTUM * direction - learnt.grad.cpu() / sizes
            step_length = LARGEST_STEP / direction.abs().max().clamp(min=1e-30)
            gates = _within_budget(gates + step_length * direction, sizes, budget)
    return list(zip(gates.tolist(), direction.tolist(), strict=True))


def _within_budget(gates: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """All gates moved by the same, and clipped to 0 to 1, so that sum(gates * sizes) is the budget.

    Args:
        gates: fp32 [num_units].
        sizes: int64 [num_units].
        budget: from 0 to the sizes' sum.
    """
    low, high = -float(gates.max()), 1 - float(gates.min())  # all gates 0, all gates 1
    for _ in range(50):
        middle = (low + high) / 2
        if float(((gates + middle).clamp(0, 1) * sizes).sum()) < budget:
            low = middle
        else:
            high = middle
    return (gates + high).clamp(0, 1)


def _costs(
    model: Any,
    targets: Mapping[str, nn.Module],
    changes: Mapping[str, Tensor],
    blocks: Tensor,
) -> dict[str, float]:
    """The module's cost by name."""
    costs = dict.fromkeys(targets, 0.0)

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, outputs: Tensor) -> None:
            tokens = inputs[0].detach()

            def add(grad: Tensor) -> None:
                moved = grad * (tokens @ changes[name].t())
                costs[name] += 0.5 * float(moved.flatten(0, -2).sum(-1).square().sum())

            outputs.register_hook(add)

        return hook

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in targets.items()]
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    with hooked(hooks):
        for block in tqdm(blocks, desc="cost of pruning", unit="block"):
            inputs = block[None].to(embeddings.weight.device)
            embedded = embeddings(inputs).requires_grad_()  # gradients by outputs need a beginning
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            chances = logits.detach().float().softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)
            loss = nn.functional.cross_entropy(
                logits.float(), labels[:, 0].to(logits.device), reduction="sum"
            )
            loss.backward()
    return costs
