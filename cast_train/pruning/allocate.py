"""Targets + calibration blocks + a share of zeros -> the pattern of each target.

Zeros cost more in some linears than in others, so a share of zeros over all targets is spent where
the sum of their costs is least. With N of 64 each linear gets an N of its own. With any other
pattern it gets that pattern or stays dense. Linears that read the same inputs (q, k and v; gate and
up) are served as one, so they are one unit and get the same.

What pruning a linear costs is estimated to second order, with Fisher's matrix in place of the
Hessian, each linear by itself in the dense model:

    cost = 1/2 sum over tokens of (g . (W' - W) x)^2

x are the linear's inputs at a token, g the gradient of the loss by its outputs there, for labels
drawn from the model itself, and W' the weight as SparseGPT prunes it. It is measured at three N of
64; between and beyond them the logarithm of the cost is a line in the logarithm of the zeros.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.checkpoint.quantization import Quantization
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import KEPT_STEP, LEAST_KEPT, MOST_KEPT, WORD, Pattern, hard_mask
from cast_train import sharding
from cast_train.gates.gating import stored_weight
from cast_train.passes import evaluating, hooked
from cast_train.precision import arithmetic, autocast
from cast_train.pruning.scores import check_reached
from cast_train.pruning.sparsegpt import inverse_factor, replace_weights, sparsegpt

MEASURED = (16, 32, 48)  # N of 64
LEAST_COST = 1e-30  # so that it has a logarithm


def allocate(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    pattern: Pattern,
    blocks: Tensor,
    zeros: float,
    precision: str = "auto",
) -> dict[str, Pattern]:
    """Chooses the pattern of each target.

    Args:
        model: a transformers model that the targets belong to, dense, fp32; it is left as it was.
        targets: linears by name.
        pattern: of every linear that is pruned; with N:64 only its M counts, unless zeros is 1.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        zeros: share of zeros over all weights of all targets, reached or slightly exceeded; 1: the
            pattern everywhere.
        precision: in which costs are measured, as of `arithmetic`; weights are pruned in fp32.

    Returns:
        patterns by name, in the targets' order; what is left out stays dense.

    Raises:
        PatternError: if no choice gives that share.
        UsageError: if the calibration tokens never reach a target.
    """
    pattern.check_zeros(zeros)
    if zeros == 1 or (pattern.m != WORD and zeros == pattern.zeros):
        return dict.fromkeys(targets, pattern)
    measured = [Pattern(n, WORD) for n in MEASURED] if pattern.m == WORD else [pattern]
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with evaluating(model):
            units = units_of(model, targets, blocks[:1])
            changes = _changes(model, targets, measured, blocks)
            costs = _costs(model, targets, changes, blocks, precision)
    finally:
        for parameter, is_required in required.items():
            parameter.requires_grad_(is_required)

    sizes = [sum(stored_weight(targets[name]).numel() for name in unit) for unit in units]
    options: list[Pattern | None] = [pattern, None]  # None: dense
    if pattern.m == WORD:
        options = [Pattern(n, WORD) for n in range(LEAST_KEPT, MOST_KEPT + 1, KEPT_STEP)]
    points = [
        [(size * _kept(option), _cost_of(option, unit_costs, measured)) for option in options]
        for size, unit_costs in zip(sizes, _by_unit(units, costs), strict=True)
    ]
    chosen = spend(points, (1 - zeros) * sum(sizes))
    of_name = {
        name: options[number] for unit, number in zip(units, chosen, strict=True) for name in unit
    }
    return {name: found for name in targets if (found := of_name[name]) is not None}


def kept_of_64(patterns: Mapping[str, Pattern], most: Pattern) -> dict[str, int]:
    """N of N:64 by name, of the linears that have another pattern than most."""
    return {name: pattern.n for name, pattern in patterns.items() if pattern != most}


def zeros_of_bits(bits: float, pattern: Pattern, quantization: Quantization | None) -> float:
    """The share of zeros at which N of 64, bitmask included, takes that many bits per weight.

    Args:
        bits: stored bits per weight, averaged over all targets; the scales of rows not counted.
        pattern: must be N:64.
        quantization: how the kept values are stored; None: in bf16.

    Raises:
        UsageError: if no N of 64 has so many bits, or the pattern is another.
    """
    if pattern.m != WORD:
        raise UsageError(
            f"bits {bits:g} is a budget for N of 64, but sparsity is {pattern}; set sparsity to "
            "32:64, or give zeros instead"
        )
    value_bits, overhead = 16, 1.0  # overhead: the bitmask's bit, and a share of a group's scale
    if quantization is not None:
        value_bits = {"int8": 8, "int4": 4}[quantization.values]
        overhead += 16 / quantization.group if quantization.group else 0
    least, most = (value_bits * n / WORD + overhead for n in (LEAST_KEPT, MOST_KEPT))
    if not least <= bits <= most:
        raise UsageError(
            f"bits {bits:g} cannot be met: with {value_bits}-bit values N of 64 takes {least:g} "
            f"({LEAST_KEPT}:64) to {most:g} ({MOST_KEPT}:64) bits per weight"
        )
    return 1 - (bits - overhead) / value_bits


def spend(units: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """The options with the least sum of costs among those whose prices the budget pays.

    Starts with each unit's cheapest option and keeps taking the upgrade that lowers the cost most
    for its price. Only the last upgrades may fall short of the optimum, where the rest of the
    budget does not pay for the best one.

    Args:
        units: of each, (price, cost) of its options, by rising price.
        budget: at least the sum of the first prices.

    Returns:
        the number of each unit's option.
    """
    chosen = [0] * len(units)
    left = budget - sum(options[0][0] for options in units)
    upgrades: list[tuple[float, int, int]] = []  # (-cost saved per price, unit, option)

    def offer(unit: int) -> None:
        """Queues the unit's best upgrade."""
        price, cost = units[unit][chosen[unit]]
        rates = [
            (-(cost - better) / (dearer - price), unit, option)
            for option, (dearer, better) in enumerate(units[unit])
            if option > chosen[unit] and better < cost
        ]
        if rates:
            heapq.heappush(upgrades, min(rates))

    for number in range(len(units)):
        offer(number)
    while upgrades:
        _, unit, option = heapq.heappop(upgrades)
        price = units[unit][option][0] - units[unit][chosen[unit]][0]
        if price <= left:
            left -= price
            chosen[unit] = option
            offer(unit)
    return chosen


def _kept(option: Pattern | None) -> float:
    return 1.0 if option is None else 1 - option.zeros


def _by_unit(units: list[list[str]], costs: Mapping[str, list[float]]) -> list[list[float]]:
    """The sums of the linears' costs."""
    return [[sum(each) for each in zip(*(costs[n] for n in unit), strict=True)] for unit in units]


def _cost_of(option: Pattern | None, costs: list[float], measured: list[Pattern]) -> float:
    """A unit's cost, by those at the measured patterns, which fall with their zeros."""
    if option is None:
        return 0.0
    if option in measured:
        return costs[measured.index(option)]
    x = [math.log(pattern.zeros) for pattern in measured]
    y = [math.log(max(cost, LEAST_COST)) for cost in costs]
    wanted = math.log(option.zeros)
    # The line through the two nearest measured points on either side, or at the end.
    right = next((i for i in range(1, len(x) - 1) if x[i] <= wanted), len(x) - 1)
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    return math.exp(min(y[right] + slope * (wanted - x[right]), 700.0))  # below float's largest


def _changes(
    model: nn.Module, targets: Mapping[str, nn.Module], patterns: Sequence[Pattern], blocks: Tensor
) -> dict[str, list[Tensor]]:
    """W' - W of each pattern by name, bf16 [out_features, in_features]; the model stays.

    Of a sharded model, this process's rows.
    """
    changes: dict[str, list[Tensor]] = {}

    def observe(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        changes[name] = []
        upper = inverse_factor(hessian)
        for pattern in patterns:
            moved, scores = sparsegpt(weight, upper, pattern)
            pruned = moved * hard_mask(scores, pattern)
            changes[name].append((pruned - weight).to(torch.bfloat16))
        return weight

    replace_weights(model, targets, blocks, observe)
    return changes


@torch.no_grad()
def units_of(model: Any, targets: Mapping[str, nn.Module], blocks: Tensor) -> list[list[str]]:
    """The names of linears with the same inputs together.

    Args:
        model: a transformers model that the targets belong to.
        targets: linears by name.
        blocks: tokens, int64 [num_blocks, block_size]; one block suffices.

    Raises:
        UsageError: if the tokens never reach a target.
    """
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


def _costs(
    model: Any,
    targets: Mapping[str, nn.Module],
    changes: Mapping[str, Sequence[Tensor]],
    blocks: Tensor,
    precision: str,
) -> dict[str, list[float]]:
    """The module's cost by name, of each of its changes."""
    dtype = arithmetic(precision)
    costs = {name: [0.0] * len(changes[name]) for name in targets}
    stored = {name: stored_weight(linear) for name, linear in targets.items()}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, outputs: Tensor) -> None:
            tokens = inputs[0].detach().to(dtype)

            def add(grad: Tensor) -> None:
                grad = grad[..., sharding.own_rows(stored[name])]
                for number, change in enumerate(changes[name]):
                    moved = grad * (tokens @ change.to(tokens).t()).float()
                    of_tokens = sharding.summed(moved.flatten(0, -2).sum(-1), stored[name])
                    costs[name][number] += 0.5 * float(of_tokens.square().sum())

            outputs.register_hook(add)

        return hook

    def begin(_: nn.Module, inputs: Any, outputs: Tensor) -> None:
        outputs.requires_grad_()  # gradients by a linear's outputs need a beginning

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in targets.items()]
    hooks.append(model.get_input_embeddings().register_forward_hook(begin))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with hooked(hooks):
        for block in tqdm(blocks, desc="cost of pruning", unit="block"):
            with autocast(precision, device.type):
                logits = model(input_ids=block[None].to(device), use_cache=False).logits[0].float()
            labels = _drawn(logits.detach(), generator)
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return costs


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row's distribution, int64 [num_tokens].

    By the inverse of its cumulative sums: torch.multinomial draws a number for each token of the
    vocabulary, which takes a third of a block's time.
    """
    sums = logits.softmax(-1).cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn)[:, 0].clamp(max=sums.shape[1] - 1)
