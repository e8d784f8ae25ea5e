"""Student and teacher logits -> the distillation loss.

L = eta * T^2 * KL(teacher || student) + (1 - eta) * L_task, both softened by the temperature T; the
teacher is the dense model as it was before training. T^2 keeps the gradient's size when T changes.
Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) in nats, averaged over the tokens.

    Args:
        student_logits: [..., vocabulary]; the gradient flows here.
        teacher_logits: the same shape, any floating dtype.
        temperature: above 0.

    Returns:
        fp32 scalar, 0 if both agree.
    """
    student = log_softmax(student_logits.float().flatten(0, -2) / temperature, dim=-1)
    with torch.no_grad():
        teacher = log_softmax(teacher_logits.float().flatten(0, -2) / temperature, dim=-1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
