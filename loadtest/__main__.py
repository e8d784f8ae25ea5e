"""Command line -> a paired load test (`run`), what became of it, or kernel timings (`kernels`).

Exit 0: done. 1: what was measured does not pass, or a fault, which shows its traceback. 2: wrong
use. 130: stopped by Ctrl-C or SIGTERM.
"""

import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cast_serve.options import PASSED_ON, VERSION, of_source_tree, option
from cast_serve.questions import read_questions
from loadtest.measure import Job, measure
from loadtest.provenance import provenance, told_by
from loadtest.quality.ask import QualityError
from loadtest.record import Recorded, Recorder, RecordError
from loadtest.report import commands, pareto
from loadtest.report.directory import check_out
from loadtest.report.files import WRITTEN, write_reports
from loadtest.report.result import result_of
from loadtest.send.client import UnreachableError
from loadtest.send.launches import LaunchError, parse_variants
from loadtest.send.paired import Plan, check_fit
from loadtest.send.schedule import KINDS, Schedule, read_trace
from loadtest.send.sweep import Load, parse_concurrency, parse_rate, sweep
from loadtest.send.workload import PACKAGED, Workload, read_prompts, read_words

STOPPED = 130  # as a shell says of a process that Ctrl-C ended
app = typer.Typer(no_args_is_help=True)
app.command()(commands.report)
app.command()(commands.compare)
app.command()(commands.coverage)


@app.callback()
def about(show_version: Annotated[bool, VERSION] = False) -> None:
    """Measures served variants against each other, over HTTP."""


@app.command()
def run(
    context: typer.Context,
    url: Annotated[str | None, option("URL", "Root of the server, without /v1.", "none")] = None,
    variant: Annotated[
        list[str] | None,
        option("NAME=DIR", "For both, in place of --url: `cast-serve up` serves them.", "none"),
    ] = None,
    launches: Annotated[
        int, option("N", "With --variant: so often they are started, in turned order.", min=1)
    ] = 1,
    vllm_flags: Annotated[
        str, option("FLAGS", "With --variant: for both vLLM servers, in one word.", "none")
    ] = "",
    baseline: Annotated[str, option("NAME", "Variant compared against.")] = Plan.baseline,
    candidate: Annotated[str, option("NAME", "Variant that should be better.")] = Plan.candidate,
    concurrency: Annotated[
        str, option("N,N", "Closed loop: requests in flight; 1,4,16 makes a run for each.")
    ] = str(Plan.concurrency),
    schedule: Annotated[
        str, option("NAME", f"When requests leave: {', '.join(KINDS)}.")
    ] = Schedule.kind,
    rate: Annotated[
        str | None, option("RATE,RATE", "Requests a second; 1,2,4 makes a run for each.", "none")
    ] = None,
    rate_to: Annotated[
        float | None, option("RATE", "Ramp: the rate at a block's end.", "none")
    ] = None,
    burst: Annotated[
        int | None,
        option("N", "Burst: requests that leave at once, every BURST/RATE s.", "none"),
    ] = None,
    trace: Annotated[
        Path | None,
        option("FILE", "Trace: seconds from a block's start, one a line.", "none"),
    ] = None,
    processes: Annotated[
        int, option("N", "Client processes, if one is too slow for the load.", min=1)
    ] = 1,
    num_prompts: Annotated[
        int | None, option("N", "Prompts in a block.", "as many as --block-s needs")
    ] = Plan.num_prompts,
    block_s: Annotated[
        float, option("SECONDS", "For which a block keeps up its load.")
    ] = Plan.block_s,
    blocks: Annotated[int, option("N", "Block pairs, in ABBA order; even.")] = Plan.num_block_pairs,
    warmup: Annotated[
        int, option("N", "Requests to each variant before anything is counted.")
    ] = Plan.num_warmup,
    output_tokens: Annotated[
        int, option("N", "Tokens that every response must have.")
    ] = Plan.output_tokens,
    prompt_tokens: Annotated[
        int, option("N", "Length of a prompt, counted in words.")
    ] = Workload.prompt_words,
    text: Annotated[
        Path | None, option("FILE", "Text to cut prompts from.", "prompts are made up")
    ] = None,
    prompts: Annotated[
        str | None,
        option(
            "NAME", "Ready prompts: sharegpt, gsm8k, or a .jsonl of prompts or messages.", "none"
        ),
    ] = None,
    seed: Annotated[int, option("N", "Same seed, same words and times.")] = Workload.seed,
    timeout_s: Annotated[float, option("SECONDS", "Longest time for one request.")] = 120.0,
    api_key: Annotated[
        str | None, option("KEY", "Bearer token.", "none", envvar="CAST_LOADTEST_API_KEY")
    ] = None,
    guard: Annotated[
        Path | None,
        option("FILE", "TOML of guard rails.", "nothing may fail or be void"),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None, option("MS", "Goodput: a good request has this TTFT at most.", "none")
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, option("MS", "Goodput: a good request has this TPOT at most.", "none")
    ] = None,
    quality_prompts: Annotated[
        int,
        option(
            "N",
            "Prompts on which agreement and KL are measured, before the load: those of "
            "--prompts or --text, else of ShareGPT (scripts/data).",
        ),
    ] = 0,
    choices_file: Annotated[
        Path | None,
        option(
            *("FILE", "Questions on which accuracy is measured, before the load.", "none"),
            name="--choices",
        ),
    ] = None,
    choices_limit: Annotated[
        int | None, option("N", "Take so many questions from the file's beginning.", "all")
    ] = None,
    same_model: Annotated[
        bool,
        typer.Option("--same-model", help="A/A: both names serve one model, so ratios must be 1."),
    ] = False,
    out: Annotated[
        Path | None, option("DIR", "New, for the record, the result and reports.", "none")
    ] = None,
) -> None:
    """Sends the same prompts to two variants in alternating blocks and compares them.

    Times run from the intended send; every ratio above 1 favours the candidate. Exit code 0: done,
    1: the run does not pass its guard rails, 2: wrong use.
    """
    try:
        places, rates = parse_concurrency(concurrency), parse_rate(rate)
        plan = Plan(
            baseline=baseline,
            candidate=candidate,
            concurrency=places[0],
            num_prompts=num_prompts,
            block_s=block_s,
            num_block_pairs=blocks,
            num_warmup=warmup,
            output_tokens=output_tokens,
        )
        if (url is None) == (variant is None):
            raise ValueError("give either --url, or --variant NAME=DIR for both variants")
        if url is not None and (launches > 1 or vllm_flags):
            raise ValueError("--launches and --vllm-flags start servers; give --variant, not --url")
        models = parse_variants(variant, (baseline, candidate)) if variant else {}
        timetable = Schedule(
            kind=schedule,
            rate_per_s=rates[0] if rates else None,
            rate_to_per_s=rate_to,
            burst=burst,
            trace_s=read_trace(trace) if trace else (),
            seed=seed,
        )
        loads = sweep(plan, timetable, places, rates)
        for load in loads:
            check_fit(load.plan, load.schedule, processes)
        workload = Workload(
            prompt_words=prompt_tokens,
            seed=seed,
            text=read_words(text) if text else (),
            prompts=read_prompts(prompts) if prompts else (),
            source=str(prompts or text or Workload.source),
        )
        if prompts and prompt_tokens != Workload.prompt_words:
            raise ValueError(
                f"--prompt-tokens {prompt_tokens} has no effect on the prompts of --prompts; leave "
                "one of them out"
            )
        if (num_prompts or trace) and block_s != Plan.block_s:
            raise ValueError(
                f"--block-s {block_s:g} has no effect where --num-prompts or --trace say how many "
                "prompts a block has; leave one of them out"
            )
        # Made-up words say nothing about quality: a model that reads them repeats itself.
        quality_workload = workload
        if quality_prompts > 0 and not (prompts or text):
            real = read_prompts(PACKAGED[0])
            quality_workload = replace(workload, prompts=real, source=PACKAGED[0])
        if timeout_s <= 0:
            raise ValueError(f"--timeout-s {timeout_s:g} is too small; give more than 0")
        if out is not None:
            check_out(out)
        terms = commands.terms_of(
            guard,
            slo_ttft_ms,
            slo_tpot_ms,
            quality_prompts,
            is_aa=same_model,
            has_choices=choices_file is not None,
            num_pairs=blocks * launches,
        )
        if choices_file is None and choices_limit is not None:
            raise ValueError(f"--choices-limit {choices_limit} limits nothing; give --choices too")
        if choices_limit is not None and choices_limit < 1:
            raise ValueError(f"--choices-limit {choices_limit} is too small; give 1 or more")
        questions = read_questions(choices_file, choices_limit) if choices_file else []
        job = Job(
            loads=loads,
            workload=workload,
            timeout_s=timeout_s,
            api_key=api_key,
            num_processes=processes,
            quality_workload=quality_workload,
            num_quality_prompts=quality_prompts,
            questions=questions,
            choices_file=choices_file,
            url=url,
            models=models,
            num_launches=launches,
            vllm_flags=vllm_flags.split(),
        )
    except ValueError as error:
        print(f"cast-loadtest: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    results, failures = [], []
    folder = Path(tempfile.mkdtemp(prefix="cast-loadtest-")) if out is None else out
    recorders: list[Recorder] = []

    def recorder_of(load: Load, about: Mapping[str, Any]) -> Recorder:
        recorders.append(Recorder(load.out(folder), about))
        return recorders[-1]

    with _keeping(folder, recorders):
        about = {**provenance(context, models), **terms}
        for load in measure(job, about, partial(told_by, api_key), recorder_of):
            result, failed = _conclude(load.out(folder), is_out=out is not None)
            results.append(result)
            failures += failed
        if out is not None and len(loads) > 1:
            curve = pareto.sweep_of(pareto.runs_in(out))
            failures += _written(out, lambda: pareto.write_sweep(out, curve))
    if out is None:
        shutil.rmtree(folder)
    commands.finish({"sweep": results} if len(loads) > 1 else results[0], failures)


@contextmanager
def _keeping(folder: Path, recorders: Sequence[Recorder]) -> Iterator[None]:
    """Ends a command that goes wrong, and says where the records are that it leaves.

    Args:
        folder: of all records.
        recorders: those begun so far.
    """
    try:
        yield
        return
    except (UnreachableError, QualityError) as error:
        code, why = 2, str(error)
    except (LaunchError, ChildProcessError, RecordError) as error:
        code, why = 1, str(error)
    except KeyboardInterrupt:
        code, why = STOPPED, "stopped"
    except Exception:
        traceback.print_exc()
        code, why = 1, "this is a fault of cast-loadtest itself"
    for recorder in recorders:
        recorder.discard_if_empty()
    with suppress(OSError):  # not empty, or not made yet
        folder.rmdir()
    print(f"cast-loadtest: {why}", file=sys.stderr)
    if folder.exists():
        print(
            f"cast-loadtest: what was measured is in {folder}; to make the report from it: "
            f"{shlex.join(['cast-loadtest', 'report', str(folder)])}",
            file=sys.stderr,
        )
    raise typer.Exit(code)


def _conclude(directory: Path, is_out: bool) -> tuple[dict[str, Any], list[str]]:
    """Shows a run as its record has it, and writes the reports if that is --out.

    Returns:
        its result, and all that is wrong with it.
    """
    recorded = Recorded.read(directory)
    result = result_of(recorded)
    commands.show(result)
    failures = commands.failures_of(result)
    if is_out:
        failures += _written(directory, lambda: write_reports(directory, recorded, result))
    return result, failures


def _written(out: Path, write: Callable[[], None]) -> list[str]:
    """Writes, and says so; returns what went wrong."""
    failures = commands.attempt(f"--out {out}", write)
    if not failures:
        print(f"written: {out}/{WRITTEN}")
    return failures


@app.command(context_settings=PASSED_ON)
def kernels(context: typer.Context) -> None:
    """Times the 2:4 op without a server: python -m benchmarks.kernels, of the source tree."""
    of_source_tree(context, "benchmarks.kernels.__main__").main(context.args)


def main() -> None:
    """Entry point of `cast-loadtest`; a missing optional package is one line and exit 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends its servers
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "vllm"):
            raise
        print(
            f"cast-loadtest: {error}; this command needs pip install 'cast-serve[cpu]', or [gpu]",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
