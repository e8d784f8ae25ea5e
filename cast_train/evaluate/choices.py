"""A model + multiple-choice questions -> the share answered rightly, with its standard error."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm


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
