"""channel_order.json <-> how the channels of a checkpoint lie, seen from the dense model it is of.

``cast-train run``, ``permute`` and ``oneshot --mask`` write it beside a model whose channels they
reordered, and whatever is made of such a model has it too. Who compares the model with the dense
one weight by weight, or by hidden states, reorders the dense one alike first; logits are the same
in any order.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from cast_serve.checkpoint.record import CheckpointError, read_json

ORDER_FILE = "channel_order.json"


@dataclass(frozen=True)
class ChannelOrder:
    """The channel of the dense model that each place takes; pruning/reorder.py applies it.

    Attributes:
        residual: of the residual stream, [hidden_size].
        inner: of each layer's MLP, [num_layers][intermediate_size].
        values: of each layer's key-value heads, [num_layers][num_key_value_heads][head_dim].
    """

    residual: list[int]
    inner: list[list[int]]
    values: list[list[list[int]]]


def write(directory: Path, order: ChannelOrder | None) -> None:
    """Writes the file into a directory; removes it if the order is unchanged."""
    if order is None:
        (directory / ORDER_FILE).unlink(missing_ok=True)
    else:
        content = json.dumps(dataclasses.asdict(order), separators=(",", ":"))
        (directory / ORDER_FILE).write_text(content + "\n", encoding="utf-8")


def read(directory: Path) -> ChannelOrder | None:
    """A checkpoint's order; None if it is the dense model's.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = directory / ORDER_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        found = ChannelOrder(content["residual"], content["inner"], content["values"])
        heads = [head for layer in found.values for head in layer]
        is_order = len(found.inner) == len(found.values) > 0 and all(
            sorted(order) == list(range(len(order)))
            for order in (found.residual, *found.inner, *heads)
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold a channel order: {error!r}") from error
    if not is_order:
        raise CheckpointError(f"{path} is damaged: it does not name every channel once")
    return found
