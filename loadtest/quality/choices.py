"""Questions with choices, and a server -> the answer that is likeliest for each variant.

Every answer is scored as the continuation of "Question: ...\\nAnswer:", without examples, as
cast_train/evaluate/choices.py scores it on a model in memory.

A server is asked through POST /v1/completions with `echo` and `logprobs`, one request for each
answer: it repeats the text with the log likelihood of each token. One token is asked for, because
our gateway refuses 0 and llama-cpp-python takes 0 for no limit; the generated token is not counted.

Which tokens belong to the answer follows from the text of the tokens, counted from the end: all
that end after the place where the answer begins, so a token across that place counts in full, and
all that begin there. (The text of a token that holds only part of a character is empty.)
`text_offset` is not used: vLLM's includes the text of a BOS token, and SGLang's is always -1.

The variants' difference is paired, because both got the same questions. Its interval is Student's t
times the standard error; its width is 0 if both chose the same answer to every question.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from cast_serve.intervals import student
from cast_serve.questions import Question, paired_difference, share
from loadtest.errors import QualityError, UsageError
from loadtest.quality.ask import Ask, at_once

MEASURES = {"acc": "by_sum", "acc_norm": "by_byte"}
"""Name of the share, and of the choices in run.json that it counts."""
PATH = "/v1/completions"
REMEDY = "see the server's log, raise --timeout-s if it was too slow, or leave --choices out"
NUM_IN_FLIGHT = 8
ROUNDING = 1e-6  # a log likelihood is at most 0, but for rounding


def about(path: Path, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As run.json has it: where the questions are from, and what `measure` returned."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"source": str(path), "source_sha256": digest, "each": list(each)}


async def measure(
    ask: Ask,
    questions: Sequence[Question],
    baseline: str,
    candidate: str,
    on_answer: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Lets both variants score every answer, at most NUM_IN_FLIGHT requests to PATH at a time.

    Returns:
        For each question `right`, the index of the right answer, `num_choices`, and `by_sum` and
        `by_byte`: by variant, the index of the answer with the highest score; of equals, the first.

    Raises:
        QualityError: as soon as a variant does not score an answer.
    """
    variants = (baseline, candidate)
    scores: dict[tuple[int, str, int], float] = {}

    def places() -> Iterator[tuple[int, str, int]]:
        for number, question in enumerate(questions):
            for variant in variants:
                yield from ((number, variant, choice) for choice in range(len(question.choices)))

    waiting = places()

    async def keep_asking() -> None:
        for place in waiting:
            number, variant, choice = place
            question = questions[number]
            continuation = f" {question.choices[choice]}"
            body = {
                "model": variant,
                "prompt": question.prompt + continuation,
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
            }
            try:
                scores[place] = log_likelihood(await ask(body), continuation)
            except UsageError as error:
                where = f"question {number + 1}, variant {variant}"
                raise QualityError(f"accuracy cannot be measured: {where}: {error}") from error
            on_answer()

    await at_once(NUM_IN_FLIGHT, keep_asking)

    found = []
    for number, question in enumerate(questions):
        choices = range(len(question.choices))
        chosen = {
            variant: question.likeliest([scores[number, variant, choice] for choice in choices])
            for variant in variants
        }
        found.append(
            {
                "right": question.answer,
                "num_choices": len(choices),
                "by_sum": {variant: in_sum for variant, (in_sum, _) in chosen.items()},
                "by_byte": {variant: per_byte for variant, (_, per_byte) in chosen.items()},
            }
        )
    return found


def log_likelihood(response: Mapping[str, Any], continuation: str) -> float:
    """The log likelihood of the prompt's last part, in nats.

    `response` is to a completion with `echo` and `logprobs`; generated tokens are not counted.

    Raises:
        UsageError: if the response does not have the log likelihoods.
    """
    try:
        found = response["choices"][0]["logprobs"]
        num = max(0, len(found["tokens"]) - response["usage"]["completion_tokens"])
        tokens, logprobs = found["tokens"][:num], found["token_logprobs"][:num]
        spelled = "".join(tokens)
    except (KeyError, IndexError, TypeError):
        tokens, logprobs = [], []
    if not tokens or len(tokens) != len(logprobs):
        raise UsageError(
            "the server does not return log probabilities of the prompt (echo with logprobs); "
            "serve the variant with vLLM, or leave --choices out"
        )
    if not spelled.endswith(continuation):
        raise UsageError(
            f"the tokens spell {spelled[-80:]!r}, which does not end with the answer "
            f"{continuation!r}; if the server shows token ids instead of text, switch that off; "
            "otherwise remove the question"
        )
    border = len(spelled) - len(continuation)  # where the answer begins
    ends = list(accumulate(map(len, tokens)))
    own = [
        logprob
        for start, end, logprob in zip([0, *ends[:-1]], ends, logprobs, strict=True)
        if end > border or start == border
    ]
    if not all(isinstance(logprob, int | float) for logprob in own):
        raise UsageError(
            f"the server gives no log probability to a part of the answer {continuation!r}; serve "
            "the variant with vLLM, or leave --choices out"
        )
    if wrong := [logprob for logprob in own if not logprob <= ROUNDING]:
        raise UsageError(
            f"the server reports {wrong[0]:g} as a log probability; if these are logits, start it "
            "without --logprobs-mode"
        )
    return float(sum(own))


def summarise(asked: Mapping[str, Any], baseline: str, candidate: str) -> dict[str, Any]:
    """Accuracies with standard errors, and how the variants differ, of what `about` returns.

    Returns:
        `source`; `chance`: the share that guessing gets, None in records of 2026-11-25 and before;
        `accuracy`: by variant `acc`, `acc_norm`, their standard errors (None for one
        question) and `num_questions`; `acc_norm_difference`: `mean` of candidate - baseline, `low`
        and `high` (None for one question), and `num_questions`.
    """
    each = asked["each"]
    accuracy: dict[str, dict[str, Any]] = {}
    for variant in (baseline, candidate):
        accuracy[variant] = {"num_questions": len(each)}
        for name in MEASURES:
            found, stderr = share(_is_right(each, variant, name))
            accuracy[variant] |= {name: found, f"{name}_stderr": stderr}
    mean, stderr = paired_difference(
        _is_right(each, candidate, "acc_norm"), _is_right(each, baseline, "acc_norm")
    )
    low = high = None
    if stderr is not None:
        reach = student(len(each)) * stderr
        low, high = max(mean - reach, -1.0), min(mean + reach, 1.0)
    has_chance = all("num_choices" in one for one in each)
    return {
        "source": asked["source"],
        "chance": fmean(1 / one["num_choices"] for one in each) if has_chance else None,
        "accuracy": accuracy,
        "acc_norm_difference": {
            "mean": mean,
            "low": low,
            "high": high,
            "num_questions": len(each),
        },
    }


def _is_right(each: Sequence[Mapping[str, Any]], variant: str, measure: str) -> list[bool]:
    return [one[MEASURES[measure]][variant] == one["right"] for one in each]
