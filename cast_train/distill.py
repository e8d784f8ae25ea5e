"""Student and teacher logits -> the distillation loss.

L = eta * T^2 * KL(teacher || student) + (1 - eta) * L_task, both softened by the temperature T; the
teacher is the dense model as it was before training. T^2 keeps the gradient's size when T changes.
Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

ROWS = 32  # tokens at a time: fp32 copies of all logits cost more than the arithmetic


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) in nats, averaged over the tokens.

    Args:
        student_logits: [..., vocabulary], any floating dtype; the gradient flows here, once.
        teacher_logits: the same shape, any floating dtype.
        temperature: above 0.

    Returns:
        fp32 scalar, 0 if both agree.
    """
    return _Divergence.apply(
        student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), temperature
    )


class _Divergence(torch.autograd.Function):
    """The loss and its gradient T * (softmax(student / T) - softmax(teacher / T)) in one pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        num_tokens = student.shape[0]
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student.device)
        for first in range(0, num_tokens, ROWS):
            rows = slice(first, first + ROWS)
            ours = log_softmax(student[rows].float() / temperature, dim=-1)
            theirs = log_softmax(teacher[rows].float() / temperature, dim=-1)
            wanted = theirs.exp()
            total += (wanted * (theirs - ours)).sum()
            if grad is not None:
                grad[rows] = (ours.exp_() - wanted).mul_(temperature / num_tokens)
        ctx.save_for_backward(grad)
        return total * (temperature**2 / num_tokens)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grad_output.to(grad.dtype), None, None
