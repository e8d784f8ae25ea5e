"""A model and hooks -> passes that leave it as it was; too long sequences are refused."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cast_serve.errors import UsageError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models are in evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(model, model.training) for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in modes:
            model.train(was_training)


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks, which are registered, are removed afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def few_logits(model: Any) -> dict[str, int]:
    """Arguments of a pass whose logits nobody reads: a transformers model then computes few."""
    has_choice = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has_choice else {}


@contextmanager
def computing(module: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module's forward is this function."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def ends_in_head(model: Any) -> bool:
    """Whether a model's logits are what its output layer returns: a bias-free product, no more.

    Gemma2, for one, caps them afterwards.

    Args:
        model: of transformers; where it is sharded, every process must call.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    returned: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, __, logits: returned.append(logits))
    with hooked([hook]), evaluating(model):
        return model(input_ids=ids, use_cache=False).logits is returned[-1]


def check_length(model: Any, length: int, option: str) -> None:
    """Refuses sequences that have more places than a model has learnt embeddings of positions for.

    Args:
        model: of transformers, such as GPT-2 or OPT; most others compute positions, of any number.
        length: tokens.
        option: where the length comes from.

    Raises:
        UsageError: naming both numbers.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    is_learnt = any(
        isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )
    if is_learnt and limit is not None and length > limit:
        raise UsageError(
            f"{option} {length} is more than the {limit} places that {type(model).__name__} has "
            f"embeddings for; set it to {limit} or less"
        )
