"""Logits or the output layer's inputs, the same of a teacher, labels -> task and distillation loss.

L = (1 - eta) * L_task + eta * T^2 * KL(teacher || student), the second softened by the temperature
T; the teacher is the dense model as it was before training. T^2 keeps the gradient's size when T
changes. Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.

The gradient is made while the loss is, a few tokens at a time: log_softmax and its backward over
all logits at once cost a fifth of a training step on a CPU, most of it fresh memory. `head_losses`
also multiplies by the output layer, some tokens at a time, and goes back through it at once: of a
large vocabulary all logits never exist together, and none wait for the backward. torch's
`linear_cross_entropy` does so for labels, but would need the teacher's probabilities whole.

`hidden_distance` is a third loss, of the hidden states before the logits; the trainer adds it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

ROWS = 32  # tokens at a time: fp32 copies of all logits cost more than the arithmetic
MOST_LOGITS = 1 << 26  # at a time in `head_losses`: 1,365 tokens of a vocabulary of 49,152
UNLABELLED = -100  # as transformers marks tokens that are not predicted


def losses(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    share: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a causal language model, and what it is made of.

    Args:
        logits: [num_blocks, block_size, vocabulary], any floating dtype.
        labels: int64 [num_blocks, block_size], the tokens that were read; the logits at a position
            predict the label at the next one.
        teacher_logits: as `logits`, or None: no distillation.
        share: eta, from 0 to 1; 0 without a teacher.
        temperature: above 0.

    Returns:
        fp32 scalars: L, through which the gradient flows to `logits`; L_task, averaged over the
        tokens that have a next one; T^2 * KL in nats, averaged over all tokens (0 without teacher).
    """
    teacher = None if teacher_logits is None else teacher_logits.flatten(0, -2)
    found: Tensor = _Losses.apply(
        logits.flatten(0, -2), _next_tokens(labels), teacher, share, temperature
    )
    loss, task, distance = found.unbind()
    return loss, task.detach(), distance.detach()


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    share: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """`losses` of the logits hidden @ weight.T, of which at most MOST_LOGITS exist at a time.

    Products are in autocast's dtype.

    Args:
        hidden: the output layer's inputs, [num_blocks, block_size, width].
        weight: the output layer's, [vocabulary, width].
        labels: int64 [num_blocks, block_size], as for `losses`, and so are share and temperature.
        teacher_hidden: the teacher's, of any width; None: no distillation.
        teacher_weight: the teacher's, of the same vocabulary.

    Returns:
        fp32 [3], what `losses` returns; the gradient of the first flows to hidden and weight.
    """
    found: Tensor = _HeadLosses.apply(
        hidden.flatten(0, -2),
        weight,
        _next_tokens(labels),
        None if teacher_hidden is None else teacher_hidden.flatten(0, -2),
        teacher_weight,
        share,
        temperature,
    )
    return found


def rows_of_head(vocabulary: int) -> int:
    """Tokens whose logits `head_losses` has at a time."""
    return max(MOST_LOGITS // vocabulary, 1)


def _next_tokens(labels: Tensor) -> Tensor:
    """The token after each, UNLABELLED after a block's last; int64 [number of tokens]."""
    next_tokens = torch.full_like(labels, UNLABELLED)
    next_tokens[:, :-1] = labels[:, 1:]
    return next_tokens.flatten()


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) in nats, averaged over the tokens.

    Args:
        student_logits: [..., vocabulary], any floating dtype; the gradient flows here, once.
        teacher_logits: the same shape, any floating dtype.
        temperature: above 0.

    Returns:
        fp32 scalar, 0 if both agree.
    """
    student, teacher = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    labels = student.new_full(student.shape[:1], UNLABELLED, dtype=torch.int64)
    found: Tensor = _Losses.apply(student, labels, teacher, 1.0, temperature)
    return found[0]


def hidden_distance(states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
    """How far hidden states are from the teacher's, relative to the teacher's own length.

    With d the squared distance of a token's vector over the squared length of the teacher's, the
    mean of d / (1 + d) over tokens and layers. So no layer and no token with large activations
    outweighs others: where the model alone has one of the huge activations that a few tokens get,
    d is in the tens of thousands. Kurtic et al. (SquareHead, 2023) divide by the mean length over
    all tokens and sum over the layers.

    Args:
        states: of each layer [num_blocks, block_size, hidden], any floating dtype.
        teacher_states: the same number and shapes.

    Returns:
        fp32 scalar from 0, where both agree, to 1.
    """
    distances = []
    for ours, theirs in zip(states, teacher_states, strict=True):
        theirs = theirs.float()
        distance = (ours.float() - theirs).square().sum(-1)
        length = theirs.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        distances.append((distance / (length + distance)).mean())
    return torch.stack(distances).mean()


class _Terms:
    """The terms of the loss and its slopes by the logits, summed over calls with some tokens each.

    Args:
        next_tokens: int64 [number of all tokens].
        share, temperature: as for `losses`.
    """

    def __init__(self, next_tokens: Tensor, share: float, temperature: float) -> None:
        self.next_tokens, self.share, self.temperature = next_tokens, share, temperature
        self.is_labelled = next_tokens != UNLABELLED
        self.num_labelled = self.is_labelled.sum().clamp(min=1)
        self.label_weight = self.is_labelled.float() * ((1 - share) / self.num_labelled)
        self.teacher_weight = share * temperature / len(next_tokens)
        self.task, self.distance = torch.zeros(2, device=next_tokens.device)

    def add(self, first: int, student: Tensor, teacher: Tensor | None, grad: Tensor | None) -> None:
        """Adds the tokens from `first` on.

        Args:
            student: logits [some tokens, vocabulary].
            teacher: the same of the teacher, or None.
            grad: where the slopes go, softmax minus labels and minus teacher; may be `student`.
        """
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            of_all = slice(first + start, first + start + len(student[rows]))
            logits, labels = student[rows].float(), self.next_tokens[of_all].clamp(min=0)[:, None]
            label_weight = self.label_weight[of_all, None]
            plain = log_softmax(logits, dim=-1)
            self.task -= (plain.gather(1, labels)[:, 0] * self.is_labelled[of_all]).sum()
            if teacher is None:
                slope = plain.exp_().mul_(label_weight)
            else:
                is_plain = self.temperature == 1
                softened = plain if is_plain else log_softmax(logits / self.temperature, dim=-1)
                theirs = log_softmax(teacher[rows].float() / self.temperature, dim=-1)
                wanted = theirs.exp()
                self.distance += (wanted * (theirs - softened)).sum()
                if is_plain:
                    slope = plain.exp_().mul_(label_weight + self.teacher_weight)
                else:
                    slope = plain.exp_().mul_(label_weight)
                    slope.add_(softened.exp_(), alpha=self.teacher_weight)
                slope.sub_(wanted, alpha=self.teacher_weight)
            if grad is not None:
                grad[rows] = slope.scatter_add_(1, labels, -label_weight)

    def means(self) -> Tensor:
        """fp32 [3]: L, L_task, T^2 * KL."""
        task = self.task / self.num_labelled
        distance = self.distance * (self.temperature**2 / len(self.next_tokens))
        return torch.stack(((1 - self.share) * task + self.share * distance, task, distance))


class _Losses(torch.autograd.Function):
    """`losses` of logits [num_tokens, vocabulary], and the gradient of the first."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        next_tokens: Tensor,
        teacher: Tensor | None,
        share: float,
        temperature: float,
    ) -> Tensor:
        terms = _Terms(next_tokens, share, temperature)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        terms.add(0, student, teacher, grad)
        ctx.save_for_backward(grad)
        return terms.means()

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if grad is not None and grad_losses[0] != 1:
            grad = grad * grad_losses[0].to(grad.dtype)
        return grad, None, None, None, None


class _HeadLosses(torch.autograd.Function):
    """`head_losses` of hidden states [num_tokens, width], and the gradient of the first."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        next_tokens: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        share: float,
        temperature: float,
    ) -> Tensor:
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        terms = _Terms(next_tokens, share, temperature)
        by_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        teacher = None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = teacher_hidden.to(dtype), teacher_weight.to(dtype)
        size = rows_of_head(len(weight))
        for first in range(0, len(inputs), size):
            rows = slice(first, first + size)
            logits = linear(inputs[rows], matrix)
            theirs = None if teacher is None else linear(teacher[0][rows], teacher[1])
            terms.add(first, logits, theirs, logits)
            if by_hidden is not None:
                by_hidden[rows] = logits @ matrix
            if by_weight is not None:
                by_weight += logits.t() @ inputs[rows]
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtype = hidden.dtype
        return terms.means()

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        if by_hidden is not None:
            by_hidden = by_hidden.to(ctx.dtype) * grad_losses[0]
        if by_weight is not None:
            by_weight = by_weight * grad_losses[0]
        return by_hidden, by_weight, None, None, None, None, None
