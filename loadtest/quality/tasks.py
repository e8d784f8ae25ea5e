"""Programming problems and a server -> each variant's answers, and pass@1 paired by problem.

*pass@1* is the share of problems whose single greedy answer passes the problem's own tests. The
programs run in loadtest/quality/sandbox.py after the last answer has arrived, so they do not slow
down a server that is being timed.

Instruct models are asked as in the evaluation that Qwen published with Qwen2.5-Coder (QwenLM/
Qwen2.5-Coder, qwencoder-eval/instruct/eval_plus/model.py; its report gives 61.6 % on HumanEval for
0.5B-Instruct): `SYSTEM`, `QUESTION`, and an answer that already starts with "```python", which vLLM
continues (`continue_final_message`). The answer ends at the first of `CHAT_STOPS`, and tabs become
four spaces. As in EvalPlus's sanitize, only imports, definitions and assignments are kept.

Three things differ from there. EvalPlus runs the answer alone; here the problem's imports and
helper functions come before it, because HumanEval's own tests call them, so an answer that forgets
an import can pass. EvalPlus's sanitize also searches for the longest text that parses. And the
answer may have 2,048 tokens there; see --max-tokens.

Base models continue the bare prompt on /v1/completions up to one of `STOPS`, as in the paper of
HumanEval (Chen et al., 2021).

The server returns the stop string as well, and `code_of` cuts it off: otherwise vLLM holds back as
many characters as the longest stop string has, and the first token would appear late.
"""

import ast
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import QualityError, UsageError
from loadtest.judge.proportions import Pairs, wilson
from loadtest.judge.statistics import distribution
from loadtest.quality import sandbox
from loadtest.quality.ask import at_once
from loadtest.send.client import Client

SYSTEM = "You are an intelligent programming assistant to produce Python algorithmic solutions"
QUESTION = "Can you complete the following Python function?\n```python\n{prompt}\n```\n"
BEGUN = "```python\n"
CHAT_STOPS = ("\n```", "\nif __name__", "\nprint(", "\n#", "\ndef main(")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_STOPS = 4  # that vLLM and OpenAI's API accept; `code_of` applies all of them
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
KEPT = (ast.Import, ast.ImportFrom, *DEFINITIONS, ast.Assign, ast.AnnAssign)
REMEDY = (
    "see the server's log; raise --timeout-s if it was too slow, lower --max-tokens if prompt and "
    "answer exceed the model's context, and use --completions for a model without a chat template"
)


@dataclass(frozen=True)
class Problem:
    """One problem, in HumanEval's form.

    Attributes:
        task_id: its name.
        prompt: Python up to the end of a function's docstring.
        entry_point: the name of that function.
        test: Python that defines `check`, which takes the function and asserts.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def checked(self, code: str) -> str:
        """The program that runs to its end only if the code is right."""
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Answer:
    """A variant's answer to a problem, as in answers.jsonl; times in seconds.

    Attributes:
        task_id: the problem.
        variant: the variant that answered.
        text: the answer, including the stop string that ended it.
        code: the code that is tested.
        finish_reason: `stop`, or `length` if --max-tokens cut it off.
        prompt_tokens: as the server counted them.
        output_tokens: likewise.
        ttft_s: as in cast_serve/latency.py.
        tpot_s: likewise; None for a single token.
        e2e_s: likewise.
        outcome: of sandbox.Outcome; None before the program has run.
        error: the program's last line on stderr.
    """

    task_id: str
    variant: str
    text: str
    code: str
    finish_reason: str | None
    prompt_tokens: int | None
    output_tokens: int | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    outcome: str | None = None
    error: str = ""


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Reads JSONL with `task_id`, `prompt`, `entry_point` and `test`; the first `limit` lines.

    Raises:
        UsageError: if the file cannot be read, is empty, names a task twice, or a line is not a
            problem.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(islice(file, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"tasks {path} cannot be read: {error}; name a .jsonl file in HumanEval's form"
        ) from error
    names = ("task_id", "prompt", "entry_point", "test")
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        try:
            given = json.loads(line)
            fields = [given[name] for name in names]
        except (ValueError, KeyError, TypeError):
            fields = []
        if not fields or not all(isinstance(field, str) and field for field in fields):
            raise UsageError(
                f"tasks {path}, line {number}: {line.strip()[:80]!r} is not a problem; give JSON "
                f"with the texts {', '.join(names)}"
            )
        problems.append(Problem(*fields))
    if not problems:
        raise UsageError(f"tasks {path} is empty; give one line of JSON per problem")
    task_id, num = Counter(problem.task_id for problem in problems).most_common(1)[0]
    if num > 1:
        raise UsageError(f"tasks {path} has {num} problems {task_id!r}; give each its own task_id")
    return problems


def question(problem: Problem, is_chat: bool) -> tuple[str, dict[str, Any]]:
    """The path, and the part of the request's body that holds the question."""
    if not is_chat:
        return "/v1/completions", {"prompt": problem.prompt, "stop": STOPS[:MAX_STOPS]}
    asked = QUESTION.format(prompt=problem.prompt.strip())
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": BEGUN},
    ]
    how = {"add_generation_prompt": False, "continue_final_message": True}
    stops = CHAT_STOPS[:MAX_STOPS]
    return "/v1/chat/completions", {"messages": messages, **how, "stop": stops}


def code_of(problem: Problem, text: str, is_chat: bool) -> str:
    """The code to test: the answer's own function, or the prompt continued by the answer."""
    stops = (*CHAT_STOPS, "```") if is_chat else STOPS
    if is_chat and text.lstrip().startswith("```"):  # the server did not go on, but began again
        text = text.lstrip().partition("\n")[2]
    places = (text.find(stop) for stop in stops)
    code = text[: min((place for place in places if place >= 0), default=len(text))]
    if not is_chat:
        return problem.prompt + code
    code = code.replace("\t", "    ")
    head = rf"^(async )?def {re.escape(problem.entry_point)}\b"
    if not re.search(head, code, re.MULTILINE):
        return problem.prompt + code
    found = re.search(head, problem.prompt, re.MULTILINE)
    return problem.prompt[: found.start() if found else 0] + _definitions(code)


def _definitions(code: str) -> str:
    """Imports, definitions and assignments at the top level; all of a code that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in strings
            nodes = ast.parse(code).body
            return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, KEPT)) + "\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


async def ask(
    client: Client,
    problems: Sequence[Problem],
    variants: Sequence[str],
    is_chat: bool,
    max_tokens: int,
    concurrency: int,
    on_answer: Callable[[Answer], None],
) -> None:
    """Asks all variants each problem in turn; which variant comes first alternates.

    Raises:
        QualityError: as soon as a request fails.
    """

    def places() -> Iterator[tuple[int, str]]:
        for number in range(len(problems)):
            yield from ((number, variant) for variant in variants[:: -1 if number % 2 else 1])

    waiting = places()

    async def keep_asking() -> None:
        for number, variant in waiting:
            on_answer(await _ask(client, problems, number, variant, is_chat, max_tokens))

    await at_once(concurrency, keep_asking)


async def _ask(
    client: Client,
    problems: Sequence[Problem],
    number: int,
    variant: str,
    is_chat: bool,
    max_tokens: int,
) -> Answer:
    problem = problems[number]
    path, asked = question(problem, is_chat)
    body = {
        "model": variant,
        **asked,
        "max_tokens": max_tokens,
        "temperature": 0,
        "include_stop_str_in_output": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    texts: list[str] = []
    reasons: list[str] = []

    def read(chunk: Mapping[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or choice
            texts.append(delta.get("content" if is_chat else "text") or "")
            reasons.extend([choice["finish_reason"]] if choice.get("finish_reason") else [])

    request = await client.stream(path, body, number, on_chunk=read)
    timing = request.timing
    # An empty answer is a wrong answer, not a failed request.
    if request.error not in (None, "no_output"):
        where = f"{problem.task_id}, variant {variant}"
        raise QualityError(f"{where}: {client.url}{path} gave {request.error}; {REMEDY}")
    text = "".join(texts)
    return Answer(
        problem.task_id,
        variant,
        text,
        code_of(problem, text, is_chat),
        reasons[-1] if reasons else None,
        request.prompt_tokens,
        request.output_tokens,
        timing.ttft_s if timing else None,
        timing.tpot_s if timing else None,
        timing.e2e_s if timing else request.ended_s - request.intended_send_s,
    )


def judge(problems: Sequence[Problem], answers: Sequence[Answer]) -> Iterator[Answer]:
    """Runs the answers' programs, one per core at a time; yields each answer with its outcome.

    Raises:
        FailedError: if a program cannot be run.
    """
    by_id = {problem.task_id: problem for problem in problems}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        programs = (by_id[answer.task_id].checked(answer.code) for answer in answers)
        for answer, found in zip(answers, pool.map(sandbox.run, programs), strict=True):
            yield replace(answer, outcome=found.name, error=found.error)
    finally:
        pool.shutdown(cancel_futures=True)


def summarise(answers: Sequence[Answer], variants: Sequence[str]) -> dict[str, Any]:
    """pass@1 and latencies by variant, and each other variant paired with the first.

    Only problems count whose answers of all variants were run.

    Returns:
        `num_problems`; `variants`: by name `num_passed`, `pass_at_1` with `low` and `high`,
        `outcomes`, `num_cut_off` at --max-tokens, `output_tokens`, `ttft_s`, `tpot_s` and `e2e_s`;
        `pairs`: by candidate, as proportions.Pairs.about.
    """
    run = {(one.task_id, one.variant): one for one in answers if one.outcome is not None}
    ids = [one.task_id for one in answers if one.variant == variants[0]]
    whole = [one for one in ids if all((one, variant) in run for variant in variants)]
    by_variant = {variant: [run[one, variant] for one in whole] for variant in variants}
    passed = {
        name: [one.outcome == "passed" for one in found] for name, found in by_variant.items()
    }
    if not whole:
        return {"num_problems": 0, "variants": {}, "pairs": {}}
    baseline = variants[0]
    return {
        "num_problems": len(whole),
        "variants": {name: _about(found, sum(passed[name])) for name, found in by_variant.items()},
        "pairs": {name: Pairs.of(passed[baseline], passed[name]).about() for name in variants[1:]},
    }


def _about(answers: Sequence[Answer], num_passed: int) -> dict[str, Any]:
    low, high = wilson(num_passed, len(answers))
    return {
        "num_passed": num_passed,
        "pass_at_1": num_passed / len(answers),
        "low": low,
        "high": high,
        "outcomes": dict(Counter(one.outcome for one in answers)),
        "num_cut_off": sum(one.finish_reason == "length" for one in answers),
        **{
            name: distribution(
                np.sort([value for one in answers if (value := getattr(one, name)) is not None])
            )
            for name in ("output_tokens", "ttft_s", "tpot_s", "e2e_s")
        },
    }
