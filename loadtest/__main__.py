"""Command line -> a paired load test (`run`), or kernel timings (`kernels`).

Exit 0: done. 1: a request failed, or lengths differed. 2: wrong use.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from loadtest.client import Client
from loadtest.paired import PairedRun, Plan, run_paired
from loadtest.report import check_out, result_of, table_of, write_out
from loadtest.workload import Workload, read_words

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def about() -> None:
    """Measures served variants against each other, over HTTP."""


@app.command()
def run(
    url: Annotated[str, typer.Option(help="Root of the server, without /v1.")],
    baseline: Annotated[str, typer.Option(help="Variant compared against.")] = Plan.baseline,
    candidate: Annotated[str, typer.Option(help="Variant that should be better.")] = Plan.candidate,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = Plan.concurrency,
    num_prompts: Annotated[int, typer.Option(help="Prompts in a block.")] = Plan.num_prompts,
    blocks: Annotated[
        int, typer.Option(help="Block pairs, in ABBA order; even.")
    ] = Plan.num_block_pairs,
    warmup: Annotated[
        int, typer.Option(help="Requests to each variant before anything is counted.")
    ] = Plan.num_warmup,
    output_tokens: Annotated[
        int, typer.Option(help="Tokens that every response must have.")
    ] = Plan.output_tokens,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of a prompt, counted in words.")
    ] = Workload.prompt_words,
    text: Annotated[
        Path | None, typer.Option(help="Text file to cut prompts from; else they are made up.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same words.")] = Workload.seed,
    timeout_s: Annotated[float, typer.Option(help="Longest time for one request.")] = 120.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="CAST_LOADTEST_API_KEY", help="Bearer token.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New directory for result.json, requests.jsonl and report.png."),
    ] = None,
) -> None:
    """Sends the same prompts to two variants in alternating blocks and compares them.

    Times run from the intended send; every ratio above 1 favours the candidate. Exit code 0: done,
    1: a request failed or an output had another length than asked for, 2: wrong use.
    """
    try:
        plan = Plan(baseline, candidate, concurrency, num_prompts, blocks, warmup, output_tokens)
        words = () if text is None else read_words(text)
        workload = Workload(prompt_words=prompt_tokens, seed=seed, text=words)
        if timeout_s <= 0:
            raise ValueError(f"--timeout-s {timeout_s:g} is too small; give more than 0")
        if out is not None:
            check_out(out)
        paired_run = asyncio.run(_measure(url, plan, workload, timeout_s, api_key))
    except ValueError as error:
        print(f"cast-loadtest: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    result = result_of(url, paired_run, workload)
    Console().print(table_of(result))
    failures = [] if result["passed"] else [_failure(result)]
    if out is not None:
        try:
            write_out(out, result, paired_run)
            print(f"written: {out}/result.json, requests.jsonl, report.png")
        except OSError as error:
            failures.append(
                f"--out {out} could not be written: {error}; free or name another place"
            )
    print(json.dumps(result), flush=True)
    for failure in failures:
        print(f"cast-loadtest: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


@app.command()
def kernels(
    shapes: Annotated[
        str, typer.Option(help="Whose linears: smollm2-135m, llama-1b or llama-8b.")
    ] = "llama-1b",
    tokens: Annotated[str, typer.Option(help="Tokens per call, comma-separated.")] = "1,4,8,16,64",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="New directory for result.json and report.png.")
    ] = None,
) -> None:
    """Times the 2:4 op against vLLM's dense op and torch's, interleaved, without a server."""
    from loadtest import kernels as bench

    try:
        linears = bench.shapes_of(shapes)
        counts = bench.parse_tokens(tokens)
        if out is not None:
            check_out(out)
    except ValueError as error:
        print(f"cast-loadtest: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("shapes x tokens", total=len(linears) * len(counts))
        result = bench.run(linears, counts, threads, lambda: progress.advance(task))
    console = Console()
    console.width = max(console.width, bench.TABLE_WIDTH)
    console.print(bench.table_of(result))
    if out is not None:
        bench.write_out(out, result)
    print(json.dumps(result), flush=True)


async def _measure(
    url: str, plan: Plan, workload: Workload, timeout_s: float, api_key: str | None
) -> PairedRun:
    async with Client(
        url, concurrency=plan.concurrency, timeout_s=timeout_s, api_key=api_key
    ) as client:
        known = await client.variants()
        for variant in (plan.baseline, plan.candidate):
            if variant not in known:
                raise ValueError(
                    f"variant {variant!r} is not served at {url}; it serves: {', '.join(known)}"
                )
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("requests", total=plan.num_requests)
            return await run_paired(client, plan, workload, lambda: progress.advance(task))


def _failure(result: dict[str, Any]) -> str:
    classes = ", ".join(
        f"{variant} {error} x{number}"
        for variant, errors in result["errors"].items()
        for error, number in errors.items()
    )
    if result["num_warmup_errors"]:
        return f"the warm-up failed, so nothing was measured: {classes}; see the server's log"
    if result["num_errors"]:
        return (
            f"{result['num_errors']} of {result['num_requests']} requests failed: {classes}; "
            "see the server's log, or lower --concurrency"
        )
    return (
        f"{result['num_unequal_lengths']} of {result['num_requests']} responses do not have "
        f"{result['output_tokens_per_request']} tokens, so the variants did unequal work; lower "
        "--output-tokens, or make the server honour ignore_eos"
    )


def main() -> None:
    """Entry point of `cast-loadtest`."""
    app()


if __name__ == "__main__":
    main()
