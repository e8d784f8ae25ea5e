"""A model + token blocks -> perplexity, with the number of tokens that it was measured on."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cast_train import gates
from cast_train.schedules import Phase


def arithmetic(precision: str = "auto") -> torch.dtype:
    """The dtype that a model multiplies in; ``auto``: bf16 on GPUs and on CPUs with AMX, else fp32.

    AVX-512 has bf16 instructions too, but fp32 measured faster there (docs/log.md).

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
    """
    if precision == "auto":
        is_native = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if is_native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Perplexity:
    """Exp of the mean negative log likelihood per predicted token.

    Attributes:
        perplexity: 1 is perfect; inf where exp overflows.
        num_tokens: predicted tokens; the first token of each block is only read.
        context_tokens: the block size; no token sees more than this before it.
    """

    perplexity: float
    num_tokens: int
    context_tokens: int


@torch.no_grad()
def perplexity(
    model: nn.Module, blocks: Tensor, batch_blocks: int = 4, name: str = "perplexity"
) -> Perplexity:
    """Measures a causal language model; blocks do not see one another.

    Args:
        model: a transformers causal language model; it is left as it was.
        blocks: int64 [num_blocks, block_size].
        batch_blocks: blocks per pass.
        name: shown beside the progress bar.

    Raises:
        ValueError: if the model's output is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in tqdm(blocks.split(batch_blocks), desc=name, unit="batch", leave=False):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for sequence, row in zip(batch, logits, strict=True):
                total += float(cross_entropy(row[:-1].float(), sequence[1:], reduction="sum"))
    finally:
        model.train(was_training)
    num_tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    mean = total / num_tokens
    if not math.isfinite(mean):
        raise ValueError(
            f"the model's log likelihood on this text is {mean}; its weights are damaged"
        )
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, num_tokens, blocks.shape[1])


def soft_and_hard(
    model: nn.Module, gate_map: Mapping[str, gates.Gate], last: Phase, blocks: Tensor
) -> tuple[Perplexity, Perplexity]:
    """Measures a gated model under the soft mask at its last temperature, and under the exact one.

    Args:
        model: with its gates attached; left in the hard phase.
        last: the phase that training ended in.
        blocks: int64 [num_blocks, block_size].

    Raises:
        ValueError: if the model's output is not finite.
    """
    gates.set_phase(gate_map, dataclasses.replace(last, is_hard=False))
    soft = perplexity(model, blocks, name="soft")
    gates.set_phase(gate_map, dataclasses.replace(last, is_hard=True))
    return soft, perplexity(model, blocks, name="hard")
