"""A model + multiple-choice questions -> the share answered rightly, with its standard error."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cast_serve.errors import UsageError
from cast_serve.questions import Question, share
from cast_train.passes import evaluating


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Share of questions whose right answer the model finds likeliest.

    Attributes:
        acc, acc_norm: as cast_serve/questions.py defines them.
        acc_stderr, acc_norm_stderr: standard errors; None for one question.
        chance: the share that guessing gets.
        num_questions: n.
        is_right_norm: whether each question was answered rightly by acc_norm's score.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    chance: float
    num_questions: int
    is_right_norm: tuple[bool, ...]

    def about(self) -> dict[str, float | None]:
        """As the last line of `cast-train eval` has it."""
        found = dataclasses.asdict(self)
        del found["is_right_norm"]
        return found


def check_names(files: Sequence[Path]) -> None:
    """Refuses files of questions whose results would have one name.

    Raises:
        UsageError: naming both.
    """
    named: dict[str, Path] = {}
    for path in files:
        if (other := named.setdefault(path.stem, path)) is not path:
            raise UsageError(
                f"the questions {other} and {path} would both be reported as {path.stem}; give "
                "each file once, and rename one of them"
            )


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
    of_each = iter(scores)
    chosen = [
        (question, question.likeliest([next(of_each) for _ in question.choices]))
        for question in questions
    ]
    acc, acc_stderr = share([in_sum == question.answer for question, (in_sum, _) in chosen])
    is_right_norm = tuple(per_byte == question.answer for question, (_, per_byte) in chosen)
    acc_norm, acc_norm_stderr = share(is_right_norm)
    return ChoiceAccuracy(
        acc=acc,
        acc_stderr=acc_stderr,
        acc_norm=acc_norm,
        acc_norm_stderr=acc_norm_stderr,
        chance=fmean(1 / len(question.choices) for question in questions),
        num_questions=len(questions),
        is_right_norm=is_right_norm,
    )
