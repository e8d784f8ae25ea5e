"""Queries, keys, values -> causal attention by a library's batched products, for training on a CPU.

PyTorch's fused attention takes a third of a training step of a small model on a CPU. A block of
queries at a time, with two batched products and a softmax, the same takes a third of that
(benchmarks/log.md). What is kept for the backward grows with the square of the length, so longer
sequences, and all that is not plain causal attention on a CPU, go to the fused one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "causal_blocks"
BLOCK = 128  # queries at a time; keys after a block's last query are not looked at
MAX_LENGTH = 1024


def use_blocks(model: Any, is_fake: bool = False) -> None:
    """Has a model compute its plain causal attention by `causal_attention`, on a CPU.

    Args:
        model: of transformers; changed, unless it was told to take another attention than "sdpa".
        is_fake: whether its tensors hold nothing, so that masks cannot be looked at: then all are
            plain.
    """
    if model.config._attn_implementation == "sdpa":
        name = f"{NAME}_fake" if is_fake else NAME
        AttentionInterface.register(name, _forward)
        # None where it is plain causal.
        AttentionMaskInterface.register(name, _no_mask if is_fake else sdpa_mask)
        model.set_attn_implementation(name)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * query @ key.T) @ value, each query with the keys up to its own place.

    Args:
        query: [batch, heads, length, width], any floating dtype.
        key: [batch, key_heads, length, width]; heads is a multiple of key_heads.
        value: as key.

    Returns:
        [batch, length, heads, width], contiguous. Scores are rounded to query's dtype.
    """
    batch, heads, length, width = query.shape
    key_heads = key.shape[1]
    queries = (query * scaling).reshape(batch * key_heads, heads // key_heads, length, width)
    keys = key.reshape(batch * key_heads, length, width)
    values = value.reshape(batch * key_heads, length, width)
    found = []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        rows = queries[:, :, first:last].flatten(1, 2)  # of all heads that share a key head
        scores = torch.bmm(rows, keys[:, :last].transpose(1, 2))
        later = torch.full((last - first, last - first), -math.inf, dtype=scores.dtype).triu(1)
        scores.unflatten(1, (-1, last - first))[..., first:] += later
        block = torch.bmm(torch.softmax(scores, -1), values[:, :last])
        found.append(block.view(batch, heads, last - first, width).transpose(1, 2))
    return torch.cat(found, 1)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function."""
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_plain = attention_mask is None and is_causal and not dropout
    is_plain = is_plain and kwargs.get("position_bias") is None
    fits = query.shape[2] == key.shape[2] <= MAX_LENGTH and value.shape == key.shape
    if not (is_plain and fits and query.device.type == "cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling), None
