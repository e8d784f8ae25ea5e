"""A model + token blocks or questions -> perplexity, divergence from another model, accuracy.

Every figure comes with the number of tokens or questions that it was measured on.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cast_train import losses
from cast_train.gates import gating
from cast_train.gates.schedules import Phase


def arithmetic(precision: str = "auto") -> torch.dtype:
    """The dtype that a model multiplies in; ``auto``: bf16 where the machine is fastest with it.

    That is GPUs, CPUs with AMX and AMD's with AVX-512 BF16 (2.8 times as fast as fp32 on Zen 5);
    Intel's without AMX multiply fp32 faster (docs/log.md).

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
    """
    if precision == "auto":
        is_native = torch.cuda.is_available() or _cpu_prefers_bf16(torch.cpu.get_capabilities())
        return torch.bfloat16 if is_native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: str, device_type: str) -> torch.autocast:
    """A context in which a model of fp32 weights multiplies in `arithmetic(precision)`.

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
        device_type: where the model is, as in ``tensor.device.type``.
    """
    is_bf16 = arithmetic(precision) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_bf16)


def _cpu_prefers_bf16(capabilities: Mapping[str, Any]) -> bool:
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return bool(capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16")))


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
    modes = [(module, module.training) for module in (model, reference)]
    total = 0.0
    try:
        for module, _ in modes:
            module.eval()
        for batch in tqdm(blocks.split(batch_blocks), desc="divergence", leave=False):
            pair = []
            for module, _ in modes:
                on_device = batch.to(next(module.parameters()).device)
                pair.append(module(input_ids=on_device, use_cache=False).logits)
            for ours, theirs in zip(*pair, strict=True):
                total += float(losses.divergence(ours, theirs.to(ours.device)))
    finally:
        for module, was_training in modes:
            module.train(was_training)
    return total / blocks.shape[0]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        question: what is asked.
        choices: two answers or more.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Reads JSONL with ``question``, ``choices`` and ``answer``, as scripts/data writes it.

    Args:
        limit: take so many from the file's beginning; None: all.

    Raises:
        ValueError: naming the file and line that is none.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the questions {path}: {error}") from error
    for number, line in enumerate(lines[:limit], 1):
        try:
            row = json.loads(line)
            found = Question(str(row["question"]), tuple(map(str, row["choices"])), row["answer"])
            if not (len(found.choices) > 1 and found.choices[found.answer]):
                raise ValueError("needs two choices or more, and an answer among them")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number} is no question: {error!r}") from error
        questions.append(found)
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Share of questions whose right answer the model finds likeliest.

    Attributes:
        acc: by the log likelihood of the whole answer.
        acc_norm: by the log likelihood per byte of the answer, which favours no short answers.
        acc_stderr, acc_norm_stderr: standard errors, sqrt(p (1 - p) / (n - 1)).
        num_questions: n.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    num_questions: int


@torch.no_grad()
def choice_accuracy(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], batch_rows: int = 16
) -> ChoiceAccuracy:
    """Scores every answer as the continuation of ``Question: ...\\nAnswer:``, without examples.

    Args:
        model: a transformers causal language model; it is left as it was.
        tokenizer: its tokenizer.
        questions: one or more.
        batch_rows: answers per pass.
    """
    rows, spans = [], []
    for question in questions:
        prompt = tokenizer(f"Question: {question.question}\nAnswer:").input_ids
        for choice in question.choices:
            answer = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            rows.append([*prompt, *answer])
            spans.append(len(answer))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    scores: list[float] = []
    try:
        for first in tqdm(range(0, len(rows), batch_rows), desc="choices", leave=False):
            batch = rows[first : first + batch_rows]
            longest = max(map(len, batch))
            # Padded on the right: a causal model's earlier positions do not see it.
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
            logits = model(input_ids=padded.to(device), use_cache=False).logits
            for row, span, predicted in zip(batch, spans[first:], logits, strict=False):
                answer = predicted[len(row) - span - 1 : len(row) - 1].float()
                wanted = torch.tensor(row[-span:], device=device)
                scores.append(-float(cross_entropy(answer, wanted, reduction="sum")))
    finally:
        model.train(was_training)
    right = right_norm = at = 0
    for question in questions:
        own = scores[at : at + len(question.choices)]
        per_byte = [
            score / len(choice.encode())
            for score, choice in zip(own, question.choices, strict=True)
        ]
        right += own.index(max(own)) == question.answer
        right_norm += per_byte.index(max(per_byte)) == question.answer
        at += len(question.choices)
    count = len(questions)

    def stderr(share: float) -> float:
        return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan

    acc, acc_norm = right / count, right_norm / count
    return ChoiceAccuracy(acc, stderr(acc), acc_norm, stderr(acc_norm), count)


def soft_and_hard(
    model: nn.Module, gate_map: Mapping[str, gating.Gate], last: Phase, blocks: Tensor
) -> tuple[Perplexity, Perplexity]:
    """Measures a gated model under the soft mask at its last temperature, and under the exact one.

    Args:
        model: with its gates attached; left in the hard phase.
        last: the phase that training ended in.
        blocks: int64 [num_blocks, block_size].

    Raises:
        ValueError: if the model's output is not finite.
    """
    gating.set_phase(gate_map, dataclasses.replace(last, is_hard=False))
    soft = perplexity(model, blocks, name="soft")
    gating.set_phase(gate_map, dataclasses.replace(last, is_hard=True))
    return soft, perplexity(model, blocks, name="hard")
