"""A model + token blocks -> perplexity, or divergence from another model, with its token count."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cast_serve.intervals import series_stderr
from cast_train import losses
from cast_train.errors import NotFiniteError
from cast_train.gates import gating
from cast_train.gates.schedules import Phase
from cast_train.passes import evaluating


@dataclass(frozen=True)
class Perplexity:
    """Exp of the mean negative log likelihood per predicted token.

    Attributes:
        perplexity: 1 is perfect; inf where exp overflows.
        num_tokens: predicted tokens; the first token of each block is only read.
        context_tokens: the block size; no token sees more than this before it.
        block_losses: mean negative log likelihood of each block's tokens, in nats.
    """

    perplexity: float
    num_tokens: int
    context_tokens: int
    block_losses: tuple[float, ...]

    @property
    def stderr_nats(self) -> float | None:
        """Standard error of the logarithm (`series_stderr`); None of a single block.

        Neighbouring blocks may be of one article, and so alike. It says how far another text of the
        kind would differ, and not how far two models do: that is `paired_difference`, which the
        text's difficulty does not enter.
        """
        return series_stderr(self.block_losses)


def paired_difference(ours: Perplexity, theirs: Perplexity) -> tuple[float, float | None]:
    """Log perplexity of `ours` minus that of `theirs`, on the same blocks, and its standard error.

    Returns:
        Nats; the standard error (`series_stderr`) is None of a single block.
    """
    pairs = zip(ours.block_losses, theirs.block_losses, strict=True)
    differences = [own - other for own, other in pairs]
    return statistics.fmean(differences), series_stderr(differences)


@torch.no_grad()
def perplexity(
    model: nn.Module, blocks: Tensor, batch_blocks: int = 4, name: str = "perplexity"
) -> Perplexity:
    """Measures a causal language model; each block is read on its own.

    Args:
        model: a transformers causal language model; it is left as it was.
        blocks: int64 [num_blocks, block_size].
        batch_blocks: blocks per pass.
        name: shown beside the progress bar.

    Raises:
        NotFiniteError: if the model's output is not.
    """
    device = next(model.parameters()).device
    block_losses: list[float] = []
    with evaluating(model):
        for batch in tqdm(blocks.split(batch_blocks), desc=name, unit="batch", leave=False):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for sequence, row in zip(batch, logits, strict=True):
                block_losses.append(float(cross_entropy(row[:-1].float(), sequence[1:])))
    num_tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    mean = statistics.fmean(block_losses)
    if not math.isfinite(mean):
        raise NotFiniteError(
            f"the model's log likelihood on this text is {mean}; its weights are damaged"
        )
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, num_tokens, blocks.shape[1], tuple(block_losses))


@torch.no_grad()
def mean_divergence(
    model: nn.Module, reference: nn.Module, blocks: Tensor, batch_blocks: int = 4
) -> float:
    """KL(reference || model) in nats per token, over all positions of the blocks.

    Args:
        model, reference: transformers causal language models of one vocabulary; left as they were.
        blocks: int64 [num_blocks, block_size].
        batch_blocks: blocks per pass.
    """
    total = 0.0
    with evaluating(model, reference):
        for batch in tqdm(blocks.split(batch_blocks), desc="divergence", leave=False):
            pair = []
            for module in (model, reference):
                on_device = batch.to(next(module.parameters()).device)
                pair.append(module(input_ids=on_device, use_cache=False).logits)
            for ours, theirs in zip(*pair, strict=True):
                total += float(losses.divergence(ours, theirs.to(ours.device)))
    return total / blocks.shape[0]


def soft_and_hard(
    model: nn.Module, gate_map: Mapping[str, gating.Gate], last: Phase, blocks: Tensor
) -> tuple[Perplexity, Perplexity]:
    """Measures a gated model under the soft mask at its last temperature, and under the exact one.

    A fixed mask has no soft form, so unless the last steps were quantised, it is measured once.

    Args:
        model: with its gates attached; left in the hard phase.
        last: the phase that training ended in.
        blocks: int64 [num_blocks, block_size].

    Raises:
        NotFiniteError: if the model's output is not.
    """
    soft = None
    is_fixed = all(isinstance(gate, gating.FixedGate) for gate in gate_map.values())
    if last.is_quantized or not is_fixed:
        gating.set_phase(gate_map, dataclasses.replace(last, is_hard=False))
        soft = perplexity(model, blocks, name="soft")
    gating.set_phase(gate_map, dataclasses.replace(last, is_hard=True))
    hard = perplexity(model, blocks, name="hard")
    return soft or hard, hard
