"""Models and hooks -> passes that leave them as they were: evaluated, with the hooks removed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


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
