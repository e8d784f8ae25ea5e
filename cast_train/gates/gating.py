"""A dense model -> the same model with a gate beside every target weight, and back.

A target linear with weight W [out_features, in_features] has gate logits L of the same shape:

    s   = sigmoid(L)         gates in (0, 1), near 1 at the start
    p   = selection(L)       soft mask; sigmoid is monotone, so the order of logits is that of gates
    s'  = (1 - a) + a p      blend a, 1 by default: where it is 0 the model is the dense one
    W'' = W * s'             what the linear multiplies with

The selectors `soft_topk` and `gumbel` read L as it is learnt; `generator` computes L from the
weights by a network that all linears share; `penalty` has no selection, its p is the gates
themselves. The methods `ste` and `adams` learn no L: the weights' own sizes rank them. The method
`fixed` has no L at all, but the mask itself, and while it trains only the weights that this keeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cast_serve.sparsity.pattern import WORD, Pattern, groups, hard_mask, masked
from cast_train import sharding
from cast_train.gates.schedules import Phase
from cast_train.gates.selection import MaskGenerator, gumbel_topk, hard, sigmoid_gates, soft_topk

Part = Callable[[Tensor], Tensor]
DENSE = Phase(blend=0.0, tau=1.0, penalty_weight=0.0, is_hard=False)
# sigmoid(4) = 0.98: near 1, and still with a gradient.
START_LOGIT = 4.0


class Gate(nn.Module, ABC):
    """The parametrization W -> W'' of one linear.

    Where the model is sharded, a parameter is whole in a forward of its layer alone. `part` is what
    is asked of it else: `sharding.whole` of it, or `sharding.local`, this process's rows.

    Attributes:
        phase: what `forward` does; set before each step.
        penalty: of the last forward, see `sparsity_penalty`; None where lambda is 0.
        is_frozen: whether the mask stays as it is.
    """

    is_frozen = True

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.phase = DENSE
        self.penalty: Tensor | None = None
        self._linear: list[Any] = []  # in a list, so that torch does not register it as a submodule

    def register_on(self, linear: Any) -> None:
        self._linear = [linear]
        # unsafe: without a forward to check its shape, which meta tensors could not go through.
        parametrize.register_parametrization(linear, "weight", self, unsafe=True)

    def weight(self) -> Tensor:
        """W, the linear's parameter; looked up each time, as FSDP replaces it."""
        return stored_weight(self._linear[0])

    @abstractmethod
    def begin(self, scores: Tensor | None) -> None:
        """Starts as `attach` says, from the scores of this process's rows."""

    @abstractmethod
    def mask(self, part: Part = sharding.whole) -> Tensor:
        """The exact N:M mask, bool [out_features, in_features]."""

    @abstractmethod
    def soft_mask(self, phase: Phase, part: Part = sharding.whole) -> Tensor:
        """p [out_features, in_features], differentiable."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint has beside the weight; `take` reads the same."""

    @abstractmethod
    def take(self, stored: Tensor) -> None:
        """Takes over the tensor that `stored` gave."""

    def freeze(self) -> None:
        """Keeps the mask that the gate has now."""

    def mark_frozen(self) -> None:
        """Keeps the mask that was read, of a gate that was frozen before it was stored."""

    def set_phase(self, phase: Phase) -> None:
        self.phase = phase
        self.penalty = None

    def masked(self, weight: Tensor) -> Tensor:
        """W'' under the exact mask."""
        return _Masked.apply(weight, self.mask())


class FixedGate(Gate):
    """A mask that is kept from the first step to the last.

    While it trains the linear's parameter may be the kept weights alone, [out_features, kept of a
    row] in the order of their columns: the others have neither gradient nor moments.

    Attributes:
        kept: the mask, bool [out_features, in_features]; a parameter, so that it can be sharded.
            None where the parameter is the kept weights.
        columns: there the kept weights' columns, each in its word of the row: uint8 [out_features,
            words, kept of a word]; else None.
    """

    kept: nn.Parameter | None
    columns: nn.Parameter | None

    def __init__(self, kept: Tensor, pattern: Pattern) -> None:
        super().__init__(pattern)
        self.kept = nn.Parameter(kept.contiguous(), requires_grad=False)
        self.register_parameter("columns", None)

    def weight(self) -> Tensor:
        """W; where the parameter is the kept weights, a copy, with zeros between them."""
        weight = super().weight()
        return weight if self.columns is None else self._spread(weight.detach())

    def drop(self, values: nn.Parameter | None = None) -> None:
        """Makes the kept weights the linear's parameter.

        Args:
            values: the parameter that shall hold them; None: a new one.
        """
        assert self.kept is not None
        weight = self.weight().detach()
        has_words = weight.shape[1] % WORD == 0 and WORD % self.pattern.m == 0
        mask = groups(self.kept, WORD if has_words else self.pattern.m)
        columns = mask.nonzero()[:, -1].view(*mask.shape[:-1], -1)
        kept = weight.view_as(mask).gather(-1, columns).flatten(1)
        if values is None:
            values = nn.Parameter(kept)
        values.data.copy_(kept)
        self.kept, self.columns = None, nn.Parameter(columns.byte(), requires_grad=False)
        self._linear[0].parametrizations.weight.original = values

    def restore(self) -> nn.Parameter:
        """Makes W the linear's parameter again, with zeros where the mask drops.

        Returns:
            the parameter with the kept weights, as `drop` takes it.
        """
        original = self._linear[0].parametrizations.weight
        values, weight, mask = original.original, self.weight(), self.mask()
        self.kept, self.columns = nn.Parameter(mask, requires_grad=False), None
        original.original = nn.Parameter(weight)
        return values

    def begin(self, scores: Tensor | None) -> None:
        assert self.kept is not None
        kept = sharding.local(self.kept.data)
        kept.copy_(hard_mask(_start_logits(scores, kept, self.pattern.m), self.pattern))

    def mask(self, part: Part = sharding.whole) -> Tensor:
        if self.kept is not None:
            return part(self.kept.detach())
        assert self.columns is not None
        return self._spread(torch.ones_like(self.columns, dtype=torch.bool))

    def _spread(self, values: Tensor) -> Tensor:
        assert self.columns is not None
        return _Spread.apply(values, self.columns, self._linear[0].in_features)

    def soft_mask(self, phase: Phase, part: Part = sharding.whole) -> Tensor:
        return self.mask(part).float()

    def stored(self) -> dict[str, Tensor]:
        assert self.kept is not None
        return {"gate": self.kept.detach()}

    def take(self, stored: Tensor) -> None:
        """Takes over a mask, or the logits that releases before this form stored."""
        assert self.kept is not None
        if stored.dtype != torch.bool:
            stored = hard_mask(stored, self.pattern)
        self.kept.copy_(stored)

    def forward(self, weight: Tensor) -> Tensor:
        return self.masked(weight) if self.columns is None else self._spread(weight)


class LogitGate(Gate):
    """A gate with logits, which are learnt unless a subclass computes them.

    Attributes:
        logits: gate logits, fp32, the shape of the weight; of a gate that computes them, what they
            were when it was frozen.
        is_frozen: from the first exact mask on, the logits stay as they are.
        is_sharded: then a forward computes the mask in place of keeping it, whole, in each process.
        learnt_n: N of N:64 where it is learnt (budget.py), an fp32 scalar that linears may share;
            None: the pattern's.
    """

    def __init__(
        self,
        logits: Tensor,
        pattern: Pattern,
        selector: str = "soft_topk",
        is_learnt: bool = True,
    ) -> None:
        super().__init__(pattern)
        self.logits = nn.Parameter(logits.float().contiguous(), requires_grad=is_learnt)
        self.selector = selector
        self.is_frozen = False
        self.is_sharded = False
        self._mask: Tensor | None = None
        self._learnt_n: list[nn.Parameter] = []  # in a list: registered on its owner alone

    @property
    def learnt_n(self) -> nn.Parameter | None:
        return self._learnt_n[0] if self._learnt_n else None

    def learn_n(self) -> None:
        self.owned_n = nn.Parameter(torch.tensor(float(self.pattern.n)))
        self._learnt_n = [self.owned_n]

    def share_n(self, owner: "LogitGate") -> None:
        self._learnt_n = owner._learnt_n

    def stored(self) -> dict[str, Tensor]:
        return {"gate": self.logits.detach()}

    def take(self, stored: Tensor) -> None:
        self.logits.data.copy_(stored)

    def begin(self, scores: Tensor | None) -> None:
        logits = sharding.local(self.logits.data)
        logits.copy_(_start_logits(scores, logits, self.pattern.m))

    def ranks(self, part: Part = sharding.whole) -> Tensor:
        """The logits [out_features, in_features], also where they are computed."""
        return part(self.logits)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stops training the gate; logits that are computed are copied to `logits`."""
        sharding.local(self.logits.data).copy_(self.ranks(sharding.local))
        self.mark_frozen()

    def mark_frozen(self) -> None:
        self._round_n()
        self.is_frozen = True
        self._mask = None

    def _round_n(self) -> None:
        if self.learnt_n is not None:
            self.pattern = Pattern(round(self.learnt_n.item()), WORD)

    def mask(self, part: Part = sharding.whole) -> Tensor:
        """As `Gate.mask`; kept until the phase changes."""
        if self.is_sharded:
            return hard_mask(self.ranks(part).detach(), self.pattern)
        if self._mask is None:
            self._mask = hard_mask(self.ranks().detach(), self.pattern)
        return self._mask

    def soft_mask(self, phase: Phase, part: Part = sharding.whole) -> Tensor:
        logits, n, m = self.ranks(part), self.pattern.n, self.pattern.m
        if self.selector == "penalty":
            return sigmoid_gates(logits, phase.relative_tau)
        if self.selector == "gumbel":
            return gumbel_topk(logits, n, m, phase.tau, phase.noise if self.training else 0.0)
        return soft_topk(logits, n, m, phase.tau, self.learnt_n)

    def set_phase(self, phase: Phase) -> None:
        """Sets the phase of the next passes; with the first exact mask the gate is frozen."""
        if not (phase.is_hard and self.phase.is_hard):
            self._mask = None
        if not self.is_frozen:
            self._round_n()
        if phase.is_hard and not self.is_frozen:
            self.freeze()
        super().set_phase(phase)

    def forward(self, weight: Tensor) -> Tensor:
        return self.masked(weight) if self.phase.is_hard else self.soft(weight)

    def soft(self, weight: Tensor) -> Tensor:
        """W'' before the mask is exact."""
        if self.phase.blend == 0.0:
            return weight
        kept = self.soft_mask(self.phase)
        if self.phase.penalty_weight:
            self.penalty = sparsity_penalty(kept, self.pattern)
        if self.phase.blend < 1:
            kept = kept * self.phase.blend + (1 - self.phase.blend)
        return weight * kept.to(weight.dtype)


class GeneratedGate(LogitGate):
    """A gate whose logits a shared network computes from the weights, until it is frozen."""

    def __init__(
        self,
        logits: Tensor,
        pattern: Pattern,
        generator: MaskGenerator,
        is_owner: bool,
    ) -> None:
        super().__init__(logits, pattern, is_learnt=False)
        self._generator = [generator]
        if is_owner:
            self.generator = generator  # registered once, so that it is saved and trained once

    def ranks(self, part: Part = sharding.whole) -> Tensor:
        start = super().ranks(part)
        return start if self.is_frozen else self._generator[0](part(self.weight()), start)


class RankedGate(LogitGate):
    """No gate is learnt: |W| times a fixed factor per column ranks the weights at every step.

    Attributes:
        column_scale: [in_features]; 1 ranks by magnitude, the norms of the inputs as Wanda does.
        decay: SR-STE's pull on dropped weights, a share of each; None: the forward stays dense
            until the mask is exact.
    """

    column_scale: Tensor

    def __init__(self, logits: Tensor, pattern: Pattern, decay: float | None) -> None:
        super().__init__(logits, pattern, is_learnt=False)
        self.register_buffer("column_scale", torch.ones(logits.shape[1]), persistent=False)
        self.decay = decay

    def begin(self, scores: Tensor | None) -> None:
        """A score is |W| times a factor of its column; ``adams`` ranks by |W| alone."""
        sharding.local(self.logits.data).zero_()
        if scores is None or self.decay is None:
            return
        weight = self.weight().detach()
        sums = torch.stack([scores.sum(0), sharding.local(weight).float().abs().sum(0)])
        sums = sharding.summed(sums, weight)
        self.column_scale.copy_(sums[0] / sums[1].clamp(min=1e-12))

    def stored(self) -> dict[str, Tensor]:
        return {} if self.decay is None else super().stored()

    def ranks(self, part: Part = sharding.whole) -> Tensor:
        if self.is_frozen:
            return super().ranks(part)
        return part(self.weight()).detach().float().abs() * self.column_scale

    def soft(self, weight: Tensor) -> Tensor:
        if self.decay is None:
            return weight
        self._mask = None
        return _StraightThrough.apply(weight, self.mask(), self.decay)

    def soft_mask(self, phase: Phase, part: Part = sharding.whole) -> Tensor:
        return hard(self.ranks(part), self.pattern.n, self.pattern.m)


class _Masked(torch.autograd.Function):
    """`pattern.masked` with its gradient, which is masked too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return masked(values, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Of a mean it is one number, expanded, whose bits are multiplied slowly.
        return masked(grad.contiguous(), *ctx.saved_tensors), None


class _Spread(torch.autograd.Function):
    """Kept weights -> [out_features, in_features] with zeros between them, and its gradient back.

    By the indices that torch's own would keep for the backward, a weight would take 4 bytes more.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, columns: Tensor, in_features: int) -> Tensor:
        ctx.save_for_backward(columns)
        rows, words, _ = columns.shape
        whole = values.new_zeros(rows, words, in_features // words)
        return whole.scatter_(-1, columns.long(), values.view(columns.shape)).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (columns,) = ctx.saved_tensors
        words = grad.unflatten(1, (columns.shape[1], -1))
        return words.gather(-1, columns.long()).flatten(1), None, None


class _StraightThrough(torch.autograd.Function):
    """W * mask; in backward every weight, kept or dropped, gets the gradient of W''.

    The gradient of dropped weights has decay * W added, which pulls them to 0. Source: Zhou et al.,
    "Learning N:M fine-grained structured sparse neural networks from scratch" (SR-STE), 2021.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad.add(masked(weight, ~mask), alpha=ctx.decay), None, None


def stored_weight(linear: Any) -> Tensor:
    """W, a linear's parameter, whether it has a gate or not (yet)."""
    if parametrize.is_parametrized(linear, "weight"):
        return linear.parametrizations.weight.original
    return linear.weight


def sparsity_penalty(gates: Tensor, pattern: Pattern) -> Tensor:
    """L_sparsity: the sum of the M - N smallest gates of a group, averaged over the groups.

    It is the mean over groups, not the sum, so that one lambda fits models of any size.

    Args:
        gates: gates or soft mask in [0, 1], [..., K].

    Returns:
        scalar from 0 (exactly N:M) to M - N (every gate open).

    Raises:
        PatternError: if K is not a multiple of M.
    """
    kept = hard_mask(gates.detach(), pattern)  # topk is eight times as slow on small groups
    return _Masked.apply(gates, ~kept).mean() * pattern.m


def attach(
    targets: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    scores: Mapping[str, Tensor] | None = None,
    *,
    method: str = "gates",
    selector: str = "soft_topk",
    decay: float = 0.0,
) -> dict[str, Gate]:
    """Puts a gate beside every weight of the targets.

    Args:
        targets: linears by name.
        patterns: N:M by name, of one M.
        scores: importance of each weight, not negative, [out_features, in_features] by name: within
            a group the logits start in their order, spaced by score over the group's mean score.
            None: all logits start equal. For ``ste`` a score is |W| times a factor of its column.
        method: ``fixed``, ``gates``, ``ste`` or ``adams``.
        selector: of ``gates``.
        decay: of ``ste``.

    Returns:
        the gates by name, in the targets' order.
    """
    gates: dict[str, Gate] = {}
    generator = None
    for name, linear in targets.items():
        pattern = patterns[name]
        if selector == "generator" and generator is None:
            generator = MaskGenerator(pattern.m)
        assert isinstance(linear, nn.Linear), f"{name}: groups of a Conv1D lie in its columns"
        weight = linear.weight.detach()
        logits = torch.empty_like(weight, dtype=torch.float32)
        gate: Gate
        if method == "fixed":
            gate = FixedGate(torch.empty_like(weight, dtype=torch.bool), pattern)
        elif method != "gates":
            gate = RankedGate(logits, pattern, decay if method == "ste" else None)
        elif generator is not None:
            gate = GeneratedGate(logits, pattern, generator=generator, is_owner=not gates)
        else:
            gate = LogitGate(logits, pattern, selector)
        gate.register_on(linear)
        if not weight.is_meta:  # else it begins once it has memory
            gate.begin(None if scores is None else scores[name])
        gates[name] = gate
    return gates


def _start_logits(scores: Tensor | None, like: Tensor, m: int) -> Tensor:
    """Scores over their group's mean: around START_LOGIT, whatever the layer's scale."""
    if scores is None:
        return torch.full_like(like, START_LOGIT, dtype=torch.float32)
    grouped = groups(scores.float(), m)
    mean = grouped.mean(-1, keepdim=True)
    return START_LOGIT + torch.where(mean > 0, grouped / mean - 1, 0.0).flatten(-2)


def detach(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Removes gates and scales: the linears compute with their own weights W again, unmasked.

    Returns:
        ``<name>.gate``, the shape of the weight: gate logits, fp32; the mask itself, bool, where it
        is fixed; none where the weights' sizes alone decide (``adams``). ``<name>.scale`` and
        ``<name>.weight_scale``: see scaling.py and quantizing.py, where there is one.
    """
    tensors: dict[str, Tensor] = {}
    for name, linear in targets.items():
        for module in linear.parametrizations.weight:
            tensors |= {f"{name}.{part}": tensor for part, tensor in module.stored().items()}
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    return tensors


def set_phase(gates: Mapping[str, Gate], phase: Phase) -> None:
    for gate in gates.values():
        gate.set_phase(phase)


def freeze(gates: Mapping[str, Gate]) -> None:
    for gate in gates.values():
        gate.freeze()


def mark_frozen(gates: Mapping[str, Gate]) -> None:
    """For gates that were frozen before they were saved: keeps what was read."""
    for gate in gates.values():
        gate.mark_frozen()


def drop(gates: Mapping[str, Gate]) -> None:
    """Leaves linears with a fixed mask their kept weights alone; of a model that is not sharded."""
    for gate in gates.values():
        if isinstance(gate, FixedGate):
            gate.drop()


def restore(gates: Mapping[str, Gate]) -> list[tuple[FixedGate, nn.Parameter]]:
    """Undoes `drop`: what changes W in place finds it whole.

    Returns:
        the gates of which it did so, and the parameters with the kept weights.
    """
    dropped = [g for g in gates.values() if isinstance(g, FixedGate) and g.columns is not None]
    return [(gate, gate.restore()) for gate in dropped]


@contextmanager
def restored(gates: Mapping[str, Gate]) -> Iterator[None]:
    """`restore` meanwhile; afterwards the same parameters hold the kept weights again."""
    dropped = restore(gates)
    yield
    for gate, values in dropped:
        gate.drop(values)


def logits_of(gates: Mapping[str, Gate]) -> list[nn.Parameter]:
    """The logits of all gates that have any."""
    return [gate.logits for gate in gates.values() if isinstance(gate, LogitGate)]


def penalty(gates: Mapping[str, Gate]) -> Tensor | None:
    """The penalties of the last forward, averaged over the targets; None if there are none."""
    found = [gate.penalty for gate in gates.values() if gate.penalty is not None]
    return torch.stack(found).mean() if found else None


@dataclass(frozen=True)
class GateStatistics:
    """The state of all gates.

    Attributes:
        undecided_share: weights with a soft mask from 0.05 to 0.95, over all target weights.
        flipped_share: weights that are kept now and that the start would have dropped, over all
            that the start would have kept.
        dropped_to_kept: mean |W| of the weights that the mask drops, over that of those it keeps.
    """

    undecided_share: float
    flipped_share: float
    dropped_to_kept: float


@torch.no_grad()
def statistics(
    gates: Mapping[str, Gate], phase: Phase, start: Mapping[str, Tensor]
) -> GateStatistics:
    """Measures the gates in a phase, without setting it.

    Args:
        start: bool masks by name, to count flips against; where there is none: no flips. Of a
            sharded model this process's rows; then every process must call.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=sharding.device())
    for name, gate in gates.items():
        mask = gate.mask(sharding.local)
        soft = gate.soft_mask(replace(phase, noise=0.0), sharding.local)  # not drawn to be seen
        size = sharding.local(gate.weight().detach()).float().abs()
        begun = start.get(name, mask)
        found = (
            soft.numel(),
            ((soft > 0.05) & (soft < 0.95)).sum(),
            begun.sum(),
            (mask & ~begun).sum(),
            (size * mask).sum() / gate.pattern.n,
            (size * ~mask).sum() / (gate.pattern.m - gate.pattern.n),
        )
        totals += sharding.summed(
            torch.tensor(found, dtype=torch.float64).to(totals), gate.weight()
        )
    num_weights, num_undecided, num_kept, num_flipped, kept, dropped = totals.tolist()
    return GateStatistics(
        undecided_share=num_undecided / max(num_weights, 1),
        flipped_share=num_flipped / max(num_kept, 1),
        dropped_to_kept=dropped / max(kept, 1e-12),
    )
