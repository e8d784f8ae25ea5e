"""Command line -> a paired load test (`run`), its reports, or a benchmark of the source tree.

Exit 0: done, and what was measured passes. 1: it fails, or a fault, which shows its traceback. 2:
wrong use. 3: what was measured is inconclusive. 130: stopped by Ctrl-C or SIGTERM.
"""

import inspect
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cast_serve.options import PASSED_ON, VERSION, of_source_tree
from loadtest.capacity import capacity
from loadtest.errors import FailedError, QualityError, UnreachableError, UsageError
from loadtest.job import Job, Options
from loadtest.measure import measure
from loadtest.provenance import given_in, provenance
from loadtest.record import Recorded
from loadtest.report import commands, pareto
from loadtest.report.files import WRITTEN, write_reports
from loadtest.report.result import result_of
from loadtest.tasks import tasks

app = typer.Typer(no_args_is_help=True)
app.command()(commands.report)
app.command()(commands.compare)
app.command()(tasks)
app.command()(capacity)


@app.callback()
def about(show_version: Annotated[bool, VERSION] = False) -> None:
    """Measure served variants against each other over HTTP."""


def run(context: typer.Context, **options: Any) -> None:
    """Send the same prompts to all variants in alternating blocks; compare each candidate.

    Times run from the intended send; every ratio above 1 favours the candidate. Exit code 0: the
    run passes, 1: it fails, 2: wrong use, 3: inconclusive: more blocks would tell.
    """
    try:
        job = Job.of(Options(**options), given_in(context))
    except UsageError as error:
        commands.refuse(error)
    results, unwritten = [], []
    out = job.options.out
    folder = Path(tempfile.mkdtemp(prefix="cast-loadtest-")) if out is None else out
    folders = job.folders(folder).values()
    with _keeping(folder, folders):
        about = {**provenance(context, job.models), **job.terms}
        for directory in measure(job, about, folder):
            result, failed = _conclude(directory, is_out=out is not None)
            results.append(result)
            unwritten += failed
        if out is not None and len(job.loads) > 1:
            for sweep in folders:
                curve = pareto.sweep_of(pareto.runs_in(sweep))
                unwritten += _written(sweep, partial(pareto.write_sweep, sweep, curve))
    if out is None:
        shutil.rmtree(folder)
    failures = [text for result in results for text in commands.failures_of(result)]
    commands.finish(
        {"sweep": results} if len(results) > 1 else results[0],
        failures + unwritten,
        commands.code_of(results, unwritten),
    )


# Typer reads a command's flags from its signature: those of `run` are the fields of Options.
_context, _ = inspect.signature(run).parameters.values()
_fields = inspect.signature(Options).parameters.values()
run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_context, *(field.replace(kind=field.KEYWORD_ONLY) for field in _fields)]
)
run.__annotations__ = {"context": typer.Context, **Options.__annotations__}
app.command()(run)


@contextmanager
def _keeping(folder: Path, reported: Iterable[Path]) -> Iterator[None]:
    """Ends a command that goes wrong, and says that its records are left in `folder`.

    `reported` are the directories of which there is a report each.
    """
    try:
        yield
        return
    except (UnreachableError, QualityError) as error:
        code, why = 2, str(error)
    except (FailedError, ChildProcessError) as error:
        code, why = 1, str(error)
    except KeyboardInterrupt:
        code, why = commands.STOPPED, "stopped"
    except Exception:
        traceback.print_exc()
        code, why = 1, "this is a bug in cast-loadtest"
    with suppress(OSError):  # not empty, or not made yet
        folder.rmdir()
    print(f"cast-loadtest: {why}", file=sys.stderr)
    for left in filter(Path.exists, reported):
        print(
            f"cast-loadtest: the measurements are in {left}; to write their report: "
            f"{shlex.join(['cast-loadtest', 'report', str(left)])}",
            file=sys.stderr,
        )
    raise typer.Exit(code)


def _conclude(directory: Path, is_out: bool) -> tuple[dict[str, Any], list[str]]:
    """Shows a run as its record has it, and writes the reports if that is --out.

    Returns:
        its result, and what could not be written.
    """
    recorded = Recorded.read(directory)
    result = result_of(recorded)
    commands.show(result)
    if not is_out:
        return result, []
    return result, _written(directory, lambda: write_reports(directory, recorded, result))


def _written(out: Path, write: Callable[[], None]) -> list[str]:
    """Writes, and says so; returns what went wrong."""
    failures = commands.attempt(f"--out {out}", write)
    if not failures:
        print(f"written: {out}/{WRITTEN}")
    return failures


@app.command(context_settings=PASSED_ON)
def kernels(context: typer.Context) -> None:
    """Time the sparse op without a server: python -m benchmarks.kernels; needs the source tree."""
    of_source_tree(context, "benchmarks.kernels.__main__").main(context.args)


@app.command(context_settings=PASSED_ON)
def coverage(context: typer.Context) -> None:
    """Simulate how often intervals hold the true value; needs the source tree."""
    of_source_tree(context, "benchmarks.coverage").main(context.args)


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
