"""A model + an order of its channels -> the same function, its channels in that order.

In a decoder of Llama's layout three sets of channels can be reordered without changing what is
computed, if the linears that write them and those that read them use the same order:

    residual   hidden_size channels, one order for the whole model
    inner      intermediate_size channels of an MLP: rows of gate_proj and up_proj, columns of
               down_proj
    values     head_dim channels of a key-value head: v_proj's rows, o_proj's columns
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.errors import UsageError
from cast_train.checkpoint.channel_order import ChannelOrder

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of a transformers model.

    Raises:
        UsageError: if it has another layout than Llama's.
    """
    layers = list(getattr(getattr(model, "model", None), "layers", []))
    if not layers or not all(
        {name for name, _ in layer.named_modules()} >= set(LINEARS) for layer in layers
    ):
        raise UsageError(
            f"{type(model).__name__} is not a decoder of Llama's layout (model.layers, each with "
            f"{', '.join(LINEARS)}), so it is not known which of its channels can be reordered"
        )
    return layers


def num_key_heads(attention: Any) -> int:
    """Key-value heads of a layer's attention."""
    return int(attention.v_proj.weight.shape[0]) // int(attention.head_dim)


def residual_readers(layer: Any) -> list[nn.Linear]:
    """The linears of a layer that read the residual stream."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]


@torch.no_grad()
def reorder(model: Any, order: ChannelOrder) -> None:
    """Reorders all channels of a model in place.

    Args:
        model: a transformers causal language model of Llama's layout.
        order: found for a model of the same shape.

    Raises:
        UsageError: if it has another layout or shape (it is unchanged then).
    """
    layers = layers_of(model)
    _check_shape(model, layers, order)
    reorder_residual(model, order)
    for layer, inner, values in zip(layers, order.inner, order.values, strict=True):
        _reorder_inner(layer.mlp, torch.tensor(inner))
        _reorder_values(layer.self_attn, [torch.tensor(head) for head in values])


@torch.no_grad()
def reorder_residual(model: Any, order: ChannelOrder) -> None:
    """Reorders the residual stream alone, and with it the hidden states that a layer returns.

    Args:
        model: as for `reorder`; its MLPs and heads may have another shape.
        order: its ``residual`` counts.

    Raises:
        UsageError: if it has another layout or hidden_size (it is unchanged then).
    """
    layers = layers_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    index = torch.tensor(order.residual)
    if embedding.weight.shape[1] != len(index):
        raise UsageError(
            f"the channels of {len(index)} places were ordered, but {type(model).__name__} has "
            f"hidden_size {embedding.weight.shape[1]}; give the model that was reordered"
        )
    _reorder_columns(embedding, index)
    if head.weight is not embedding.weight:
        _reorder_columns(head, index)
    for layer in layers:
        for reader in residual_readers(layer):
            _reorder_columns(reader, index)
        _reorder_rows(layer.self_attn.o_proj, index)
        _reorder_rows(layer.mlp.down_proj, index)
    children = [child for layer in layers for child in layer.children()]
    for norm in filter(_is_norm, [model.model.norm, *children]):
        _reorder_rows(norm, index)


def _check_shape(model: Any, layers: Sequence[Any], order: ChannelOrder) -> None:
    found = [
        (
            layer.mlp.down_proj.weight.shape[1],
            num_key_heads(layer.self_attn) * [layer.self_attn.head_dim],
        )
        for layer in layers
    ]
    wanted = [
        (len(inner), [len(head) for head in values])
        for inner, values in zip(order.inner, order.values, strict=True)
    ]
    if found != wanted:
        raise UsageError(
            f"{type(model).__name__} has {len(found)} layers, the first with {found[0][0]} inner "
            f"channels and key-value heads of {found[0][1]}, but those that were ordered are "
            f"{len(wanted)} with {wanted[0][0]} and {wanted[0][1]}; give the model that was "
            "reordered"
        )


def _reorder_inner(mlp: Any, index: Tensor) -> None:
    _reorder_rows(mlp.gate_proj, index)
    _reorder_rows(mlp.up_proj, index)
    _reorder_columns(mlp.down_proj, index)


def _reorder_values(attention: Any, of_heads: Sequence[Tensor]) -> None:
    num_heads = attention.o_proj.weight.shape[1] // attention.head_dim
    _reorder_rows(attention.v_proj, _over_heads(of_heads, 1))
    # Each key-value head is read by as many query heads.
    _reorder_columns(attention.o_proj, _over_heads(of_heads, num_heads // len(of_heads)))


def _is_norm(child: nn.Module) -> bool:
    """Of a layer's children only norms have a weight, though not all; OLMo's have none."""
    return getattr(child, "weight", None) is not None


def _reorder_rows(module: Any, index: Tensor) -> None:
    module.weight.copy_(module.weight[index])
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(module.bias[index])


def _reorder_columns(module: Any, index: Tensor) -> None:
    module.weight.copy_(module.weight[:, index])


def _over_heads(orders: Sequence[Tensor], repeats: int) -> Tensor:
    """Orders within each head -> one over all heads, each repeated for the heads that share it."""
    of_heads = [order for order in orders for _ in range(repeats)]
    return torch.cat([order + number * len(order) for number, order in enumerate(of_heads)])
