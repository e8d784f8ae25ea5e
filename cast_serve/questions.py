"""A JSONL file -> multiple-choice questions; a model's log likelihoods -> its accuracy on them.

cast_train scores a model in memory, loadtest a served one. What they share is here, so that their
accuracies can be compared: *acc* goes by the log likelihood of the whole answer, *acc_norm* by that
per byte of the answer, which does not favour short ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from cast_serve.errors import UsageError


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        question: what is asked.
        choices: two answers or more, none empty.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise UsageError(f"{len(self.choices)} choices; give two or more, none empty")
        if type(self.answer) is not int or self.answer not in range(len(self.choices)):
            raise UsageError(
                f"answer {self.answer!r}; give the right choice's index, 0 to "
                f"{len(self.choices) - 1}"
            )

    @property
    def prompt(self) -> str:
        """What the model reads before an answer, which follows after a space."""
        return f"Question: {self.question}\nAnswer:"

    def likeliest(self, log_likelihoods: Sequence[float]) -> tuple[int, int]:
        """The index of the likeliest answer, by acc and by acc_norm; of equals, the first."""
        per_byte = [
            total / len(choice.encode())
            for total, choice in zip(log_likelihoods, self.choices, strict=True)
        ]
        return log_likelihoods.index(max(log_likelihoods)), per_byte.index(max(per_byte))


def share(is_right: Sequence[bool]) -> tuple[float, float | None]:
    """The share of right answers, and its standard error; None for one answer."""
    num, found = len(is_right), sum(is_right) / len(is_right)
    return found, sqrt(found * (1 - found) / (num - 1)) if num > 1 else None


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float | None]:
    """The share of `ours` minus that of `theirs`, and its standard error; None for one question.

    Questions that both get right, or both wrong, say nothing about the difference, so its error is
    smaller than the two shares' errors suggest (McNemar's comparison).

    Args:
        ours: whether each question was answered rightly.
        theirs: likewise, of the same questions.
    """
    gained = [int(own) - int(other) for own, other in zip(ours, theirs, strict=True)]
    return fmean(gained), stdev(gained) / sqrt(len(gained)) if len(gained) > 1 else None


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Reads JSONL with `question`, `choices` and `answer`, as scripts/data writes it.

    Args:
        path: a line a question.
        limit: read only the first so many, at least 1; None: all.

    Raises:
        UsageError: if the file cannot be read, is empty, or a line is not a question.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(islice(file, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"questions {path} cannot be read: {error}; name a .jsonl file, for example one of "
            "data/choices after running scripts/data"
        ) from error
    if not lines:
        raise UsageError(f"questions {path} is empty; give one line of JSON per question")
    return [_parse(line, f"questions {path}, line {n}") for n, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> Question:
    try:
        given = json.loads(line)
        if not isinstance(given["choices"], list):
            raise TypeError(f"choices {given['choices']!r} are not a list")
        choices = tuple(str(choice) for choice in given["choices"])
        return Question(str(given["question"]), choices, given["answer"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{where}: {line.strip()[:80]!r} is not a question: {reason}") from error
