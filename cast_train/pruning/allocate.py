"""Targets + calibration blocks + a share of zeros -> the linears that stay dense.

A model with fewer zeros than 2:4 has some linears left dense: those whose pruning would hurt most
for the weights that they have. What pruning a linear costs is estimated to second order, with
Fisher's matrix in place of the Hessian, along the very change that SparseGPT would make:

    cost = 1/2 sum over tokens of (g . (W' - W) x)^2

x are the linear's inputs at a token and g the gradient of the loss by its outputs there, for labels
drawn from the model itself. Linears that read the same inputs (q, k and v; gate and up) are served
as one and are left dense together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_train.gates.gating import is_transposed
from cast_train.pruning.scores import check_reached, weight_rows
from cast_train.pruning.sparsegpt import sparsegpt_scores


def keep_dense(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    pattern: Pattern,
    blocks: Tensor,
    zeros: float,
) -> list[str]:
    """Chooses the linears that stay dense.

    Args:
        model: a transformers model that the targets belong to, dense, fp32; it is left as it was.
        targets: linears by name.
        pattern: of those that do not stay dense.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        zeros: share of zeros over all weights of all targets, above 0; it is reached or exceeded if
            the pattern has more, else nothing stays dense.

    Returns:
        names, in the targets' order.

    Raises:
        ValueError: if zeros is not above 0, or the calibration tokens never reach a target.
    """
    if not zeros > 0:
        raise ValueError(f"zeros is {zeros}, but a share of zeros must be above 0")
    if zeros >= pattern.zeros:
        return []
    costs, units = _costs(model, targets, _changes(model, targets, pattern, blocks), blocks)
    sizes = [sum(weight_rows(targets[name]).numel() for name in unit) for unit in units]
    unit_costs = [sum(costs[name] for name in unit) for unit in units]
    budget = (1 - zeros / pattern.zeros) * sum(sizes)
    kept: set[str] = set()
    for number in sorted(range(len(units)), key=lambda i: -unit_costs[i] / sizes[i]):
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


def _costs(
    model: Any,
    targets: Mapping[str, nn.Module],
    changes: Mapping[str, Tensor],
    blocks: Tensor,
) -> tuple[dict[str, float], list[list[str]]]:
    """The module's cost by name, and the names of linears with the same inputs together."""
    costs = dict.fromkeys(targets, 0.0)
    readers: dict[int, list[str]] = {}  # of an input, by its id, in one pass

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, outputs: Tensor) -> None:
            tokens = inputs[0].detach()
            held.append(inputs[0])  # else another tensor might get its id
            readers.setdefault(id(inputs[0]), []).append(name)

            def add(grad: Tensor) -> None:
                moved = grad * (tokens @ changes[name].t())
                costs[name] += 0.5 * float(moved.flatten(0, -2).sum(-1).square().sum())

            outputs.register_hook(add)

        return hook

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in targets.items()]
    was_training = model.training
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    try:
        for block in tqdm(blocks, desc="cost of pruning", unit="block"):
            held: list[Tensor] = []
            readers.clear()
            inputs = block[None].to(embeddings.weight.device)
            embedded = embeddings(inputs).requires_grad_()  # gradients by outputs need a beginning
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            chances = logits.detach().float().softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)
            loss = nn.functional.cross_entropy(
                logits.float(), labels[:, 0].to(logits.device), reduction="sum"
            )
            loss.backward()
    finally:
        model.train(was_training)
        for parameter, is_required in required.items():
            parameter.requires_grad_(is_required)
        for hook in hooks:
            hook.remove()
    units = list(readers.values())
    check_reached(targets, {name: True for unit in units for name in unit})
    return costs, units
