"""A model and hooks -> passes that leave it as it was; too long sequences are refused."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
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
