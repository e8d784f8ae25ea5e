"""Logits, labels and a teacher's logits -> the task loss and the distillation loss, in one pass.

L = (1 - eta) * L_task + eta * T^2 * KL(teacher || student), the second softened by the temperature
T; the teacher is the dense model as it was before training. T^2 keeps the gradient's size when T
changes. Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.

The gradient is made while the loss is, a few tokens at a time: log_softmax and its backward over
all logits at once cost a fifth of a training step on a CPU, most of it fresh memory.

`hidden_distance` is a third loss, of the hidden states before the logits; the trainer adds it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

ROWS = 32  # tokens at a time: fp32 copies of all logits cost more than the arithmetic
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
    next_tokens = torch.full_like(labels, UNLABELLED)
    next_tokens[:, :-1] = labels[:, 1:]
    teacher = None if teacher_logits is None else teacher_logits.flatten(0, -2)
    found: tuple[Tensor, Tensor, Tensor] = _Losses.apply(
        logits.flatten(0, -2), next_tokens.flatten(), teacher, share, temperature
    )
    return found


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
    total: Tensor = _Losses.apply(student, labels, teacher, 1.0, temperature)[0]
    return total


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


class _Losses(torch.autograd.Function):
    """Both losses and the gradient of their sum: softmax minus labels, and minus teacher.

    `forward` takes logits [num_tokens, vocabulary] and int64 [num_tokens], the token after each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        next_tokens: Tensor,
        teacher: Tensor | None,
        share: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, is_labelled = student.shape[0], next_tokens != UNLABELLED
        label_weight = is_labelled.float() * ((1 - share) / is_labelled.sum().clamp(min=1))
        teacher_weight = share * temperature / num_tokens
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        task, distance = torch.zeros(2, device=student.device)
        for first in range(0, num_tokens, ROWS):
            rows = slice(first, first + ROWS)
            logits, labels = student[rows].float(), next_tokens[rows].clamp(min=0)[:, None]
            plain = log_softmax(logits, dim=-1)
            task -= (plain.gather(1, labels)[:, 0] * is_labelled[rows]).sum()
            if teacher is None:
                slope = plain.exp_().mul_(label_weight[rows, None])
            else:
                softened = plain if temperature == 1 else log_softmax(logits / temperature, dim=-1)
                theirs = log_softmax(teacher[rows].float() / temperature, dim=-1)
                wanted = theirs.exp()
                distance += (wanted * (theirs - softened)).sum()
                if temperature == 1:
                    slope = plain.exp_().mul_(label_weight[rows, None] + teacher_weight)
                else:
                    slope = plain.exp_().mul_(label_weight[rows, None])
                    slope.add_(softened.exp_(), alpha=teacher_weight)
                slope.sub_(wanted, alpha=teacher_weight)
            if grad is not None:
                grad[rows] = slope.scatter_add_(1, labels, -label_weight[rows, None])
        task /= is_labelled.sum().clamp(min=1)
        distance *= temperature**2 / num_tokens
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(task, distance)
        return (1 - share) * task + share * distance, task, distance

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if grad is not None and grad_loss != 1:
            grad = grad * grad_loss.to(grad.dtype)
        return grad, None, None, None, None
