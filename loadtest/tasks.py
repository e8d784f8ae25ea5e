"""Programming problems -> `cast-loadtest tasks`: pass@1 of each variant beside its latency.

--out holds `answers.jsonl`, a line per answer (quality/tasks.py), written as it comes and once more
with the outcomes, and `tasks.json`: settings, origin, and the figures that the command prints.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cast_serve.options import option
from loadtest.errors import FailedError, QualityError, RecordError, UsageError
from loadtest.progress import progress
from loadtest.provenance import provenance, told_by
from loadtest.quality import tasks as quality
from loadtest.quality.sandbox import Limits, check_sandbox
from loadtest.report.commands import STOPPED, attempt, finish, refuse
from loadtest.report.directory import check_out
from loadtest.send.client import Client

TABLE_WIDTH = 100


def tasks(
    context: typer.Context,
    url: Annotated[str, option("URL", "Server root, without /v1.")],
    tasks: Annotated[
        Path,
        option(
            "FILE",
            "Problems in HumanEval's form: .jsonl with task_id, prompt, entry_point and test.",
        ),
    ],
    baseline: Annotated[str | None, option("NAME", "Variant to compare against.", "dense")] = None,
    candidate: Annotated[
        str | None, option("NAME", "Variant to compare with it.", "sparse")
    ] = None,
    variants: Annotated[
        str | None,
        option("NAME,NAME", "Instead of both: any number of variants, the baseline first.", "none"),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option("--completions", help="Base model: give it the bare prompt to continue."),
    ] = False,
    limit: Annotated[int | None, option("N", "Only the first N problems.", "all", min=1)] = None,
    concurrency: Annotated[int, option("N", "Requests in flight, all variants.", min=1)] = 4,
    max_tokens: Annotated[int, option("N", "Longest answer.", min=1)] = 512,
    timeout_s: Annotated[float, option("SECONDS", "Time limit per request.", min=1)] = 300.0,
    api_key: Annotated[
        str | None, option("KEY", "Bearer token.", "none", envvar="CAST_LOADTEST_API_KEY")
    ] = None,
    out: Annotated[
        Path | None, option("DIR", "New folder for the answers and the result.", "none")
    ] = None,
) -> None:
    """Let each variant solve programming problems, and run what it writes in a sandbox.

    Prints pass@1 with its interval, McNemar's test by problem, and the latency of the same answers.
    Exit code 0: done, 1: a program could not be run, 2: wrong use, or a request failed.
    """
    try:
        names = _names(baseline, candidate, variants)
        problems = quality.read_problems(tasks, limit)
        if out is not None:
            check_out(out)
        check_sandbox()
        asyncio.run(_check_served(url, api_key, timeout_s, names))
    except UsageError as error:
        refuse(error)
    about = {
        **provenance(context, {}),
        **told_by(api_key, url),
        "source": str(tasks),
        "source_sha256": hashlib.sha256(tasks.read_bytes()).hexdigest(),
        "form": "completions" if completions else "chat",
        "stop": quality.STOPS if completions else quality.CHAT_STOPS,
        "temperature": 0,
        "max_tokens": max_tokens,
        "concurrency": concurrency,
        "limits": asdict(Limits()),
    }
    answers: list[quality.Answer] = []
    code, failures = 1, []
    try:
        num_answers = len(problems) * len(names)
        with progress("answers", num_answers) as (advance, _), _writing(out) as write:

            def on_answer(answer: quality.Answer) -> None:
                answers.append(answer)
                write(answer)
                advance()

            async def ask() -> None:
                form = (not completions, max_tokens, concurrency)
                async with Client(url, timeout_s=timeout_s, api_key=api_key) as client:
                    await quality.ask(client, problems, names, *form, on_answer)

            asyncio.run(ask())
    except (QualityError, FailedError, KeyboardInterrupt) as error:
        code, failures = _code(error), [str(error) or "stopped"]
    try:  # what was written until then is worth its run
        with progress("programs", len(answers)) as (advance, _):
            for place, answer in enumerate(quality.judge(problems, answers[:])):
                answers[place] = answer
                advance()
    except (FailedError, KeyboardInterrupt) as error:
        code, failures = _code(error), [*failures, str(error) or "stopped"]
    found = quality.summarise(answers, names)
    is_complete = found["num_problems"] == len(problems)
    printed = {**found, "is_complete": is_complete, **about}
    if found["num_problems"]:
        show(printed)
    if out is not None and answers:
        failures += attempt(f"--out {out}", lambda: _write(out, answers, printed))
    finish(printed, failures, code)


def show(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    console, num = Console(), result["num_problems"]
    console.width = max(console.width, TABLE_WIDTH)
    incomplete = "" if result["is_complete"] else "INCOMPLETE: "
    table = Table(title=f"{incomplete}{num} problems of {Path(result['source']).name}")
    table.add_column("variant")
    columns = ("pass@1", "95 % interval", "cut off", "tokens", "TTFT, ms", "TPOT, ms")
    for column in columns:
        table.add_column(column, justify="right")
    for name, about in result["variants"].items():
        table.add_row(
            name,
            f"{about['pass_at_1']:.1%} ({about['num_passed']})",
            f"{about['low']:.1%} to {about['high']:.1%}",
            str(about["num_cut_off"]),
            _median(about["output_tokens"], 1, 0),
            _median(about["ttft_s"], 1000, 0),
            _median(about["tpot_s"], 1000, 1),
        )
    console.print(table)
    baseline = next(iter(result["variants"]))
    for name, pairs in result["pairs"].items():
        mean, low, high = (pairs["difference"][key] * 100 for key in ("mean", "low", "high"))
        console.print(
            f"{name} - {baseline}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}), McNemar "
            f"p = {pairs['p_mcnemar']:.3g}; both {pairs['both']}, only {baseline} "
            f"{pairs['only_baseline']}, only {name} {pairs['only_candidate']}, neither "
            f"{pairs['neither']}",
            markup=False,
            highlight=False,
        )
    console.print(
        f"tokens, TTFT and TPOT: medians over these answers, {result['concurrency']} requests in "
        "flight; `cast-loadtest run` compares speeds",
        markup=False,
        highlight=False,
    )


def _median(found: dict[str, Any], factor: float, digits: int) -> str:
    return "-" if found["median"] is None else f"{found['median'] * factor:.{digits}f}"


def _names(baseline: str | None, candidate: str | None, variants: str | None) -> list[str]:
    if variants is None:
        names = [baseline or "dense", candidate or "sparse"]
    elif baseline or candidate:
        raise UsageError(f"--variants {variants} has no effect beside --baseline or --candidate")
    else:
        names = variants.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"variants {', '.join(names)}: give each a name of its own")
    return names


async def _check_served(
    url: str, api_key: str | None, timeout_s: float, names: Sequence[str]
) -> None:
    async with Client(url, timeout_s=timeout_s, api_key=api_key) as client:
        await client.check_serves(names, "; name one of these with --variants")


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def _writing(out: Path | None) -> Iterator[Callable[[quality.Answer], None]]:
    """What writes an answer into answers.jsonl at once."""
    if out is None:
        yield lambda answer: None
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "answers.jsonl").open("x", encoding="utf-8") as file:

            def write(answer: quality.Answer) -> None:
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()

            try:
                yield write
            finally:
                if file.tell() == 0:  # nothing was answered: leave nothing behind
                    (out / "answers.jsonl").unlink()
                    out.rmdir()
    except OSError as error:
        raise RecordError(f"--out {out} cannot be written: {error}; free some space") from error


def _write(out: Path, answers: Sequence[quality.Answer], result: dict[str, Any]) -> None:
    lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    for name, content in (("answers.jsonl", lines), ("tasks.json", text)):
        partial = out / f".{name}"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out / name)
