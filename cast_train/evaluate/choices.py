"""A model + multiple-choice questions -> the share answered rightly, with its standard error."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cast_serve.questions import Question
from cast_train.passes import evaluating


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Share of questions whose right answer the model finds likeliest.

    Attributes:
        acc: by the log likelihood of the whole answer.
        acc_norm: by the log likelihood per byte of the answer, which favours no short answers.
        acc_stderr, acc_norm_stderr: standard errors, sqrt(p (1 - p) / (n - 1)).
        chance: the share that guessing gets.
        num_questions: n.
        is_right_norm: whether each question was answered rightly by acc_norm's score.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    chance: float
    num_questions: int
    is_right_norm: tuple[bool, ...]

    def about(self) -> dict[str, float]:
        """As the last line of `cast-train eval` has it."""
        found = dataclasses.asdict(self)
        del found["is_right_norm"]
        return found


def check_names(files: Sequence[Path]) -> None:
    """Refuses files of questions whose results would have one name.

    Raises:
        ValueError: naming both.
    """
    named: dict[str, Path] = {}
    for path in files:
        if (other := named.setdefault(path.stem, path)) is not path:
            raise ValueError(
                f"the questions {other} and {path} would both be reported as {path.stem}; give "
                "each file once, and files another name"
            )


def paired_difference(ours: ChoiceAccuracy, theirs: ChoiceAccuracy) -> tuple[float, float]:
    """acc_norm of `ours` minus that of `theirs` on the same questions, and its standard error.

    Questions that both get right, or both wrong, say nothing about the difference: so this is
    smaller than the standard errors of the two would let one think (it is McNemar's comparison).
    """
    pairs = zip(ours.is_right_norm, theirs.is_right_norm, strict=True)
    differences = [int(own) - int(other) for own, other in pairs]
    count = len(differences)
    stderr = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(differences), stderr


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
        prompt = tokenizer(question.prompt).input_ids
        for choice in question.choices:
            answer = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            rows.append([*prompt, *answer])
            spans.append(len(answer))
    device = next(model.parameters()).device
    scores: list[float] = []
    with evaluating(model):
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
    right = at = 0
    is_right_norm = []
    for question in questions:
        own = scores[at : at + len(question.choices)]
        per_byte = [
            score / len(choice.encode())
            for score, choice in zip(own, question.choices, strict=True)
        ]
        right += own.index(max(own)) == question.answer
        is_right_norm.append(per_byte.index(max(per_byte)) == question.answer)
        at += len(question.choices)
    count = len(questions)

    def stderr(share: float) -> float:
        return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan

    acc, acc_norm = right / count, sum(is_right_norm) / count
    return ChoiceAccuracy(
        acc=acc,
        acc_stderr=stderr(acc),
        acc_norm=acc_norm,
        acc_norm_stderr=stderr(acc_norm),
        chance=statistics.fmean(1 / len(question.choices) for question in questions),
        num_questions=count,
        is_right_norm=tuple(is_right_norm),
    )
