"""Run directories -> `cast-loadtest report` and `compare`; and how every command ends."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cast_serve.guard import FAIL, PASS, Guard
from cast_serve.options import option
from loadtest.errors import UsageError
from loadtest.record import Recorded
from loadtest.report import pareto, regression
from loadtest.report.directory import check_directory, check_matplotlib
from loadtest.report.export import FORMS, write_export
from loadtest.report.files import WRITTEN, write_reports
from loadtest.report.result import result_of, table_of
from loadtest.report.words import stressed

FAILED, UNDECIDED = 1, 3  # exit codes of a verdict
STOPPED = 130  # as a shell says of a process that Ctrl-C ended


def show(result: dict[str, Any]) -> None:
    """Prints a result for people; warnings last, where a terminal shows them."""
    console = Console()
    console.print(table_of(result))
    console.print(result["headline"], markup=False, highlight=False)
    for text in result["warnings"]:
        console.print(f"warning: {text}", style="bold red", markup=False, highlight=False)


def failures_of(result: dict[str, Any]) -> list[str]:
    """Why a result did not pass, a line a check."""
    return [
        f"{stressed(check)}: {check['name']}: {check['why']}"
        for check in result["checks"]
        if check["verdict"] != PASS
    ]


def code_of(results: Sequence[dict[str, Any]], unwritten: Sequence[str]) -> int:
    """The exit code of a command some of whose results did not pass, or could not be written."""
    is_failed = unwritten or any(result["verdict"] == FAIL for result in results)
    return FAILED if is_failed else UNDECIDED


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Run or sweep that `run --out` wrote.")
    ],
    guard: Annotated[
        Path | None, option("FILE", "TOML file of guard rails.", "the run's own")
    ] = None,
    export: Annotated[
        str | None,
        option("NAME", f"Also write each variant's files as of {', '.join(FORMS)}.", "none"),
    ] = None,
) -> None:
    """Recompute result.json and the reports from run.json and requests.jsonl.

    If DIR is a sweep, recompute every run, and throughput against interactivity over all.

    Exit code 0: done, 1: a run fails, 2: wrong use, 3: a run is inconclusive.
    """
    try:
        check_matplotlib()
        if export is not None and export not in FORMS:
            raise UsageError(f"--export {export} is unknown; give {', '.join(FORMS)}")
        new_guard = None if guard is None else Guard.read(guard).about()
        if pareto.is_sweep(directory):
            runs = pareto.runs_in(directory)
        else:
            runs = [("", Recorded.read(directory))]
        for name in ["", *(name for name, _ in runs)]:
            check_directory(directory / name)
        if new_guard is not None:
            runs = [
                (name, Recorded({**run.about, "guard": new_guard}, run.requests))
                for name, run in runs
            ]
    except UsageError as error:
        refuse(error)
    results, failures, unwritten = [], [], []
    for name, run in runs:
        printed = result_of(run)
        results.append(printed)
        unwritten += _write_anew(directory / name, run, printed, new_guard is not None)
        if export is not None and not run.blocks:
            unwritten.append(f"{directory / name}: nothing was measured, so nothing is exported")
        elif export is not None:
            write = partial(write_export, run, directory / name, export)
            unwritten += attempt(f"{directory}", write)
        show(printed)
        failures += [f"{name}: {text}" if name else text for text in failures_of(printed)]
    if pareto.is_sweep(directory):
        printed = sweep = pareto.sweep_of(runs)
        unwritten += attempt(f"{directory}", lambda: pareto.write_sweep(directory, sweep))
        Console().print(pareto.headline(printed))
    if not unwritten:
        print(f"written: {directory}/{WRITTEN}")
    finish(printed, failures + unwritten, code_of(results, unwritten))


def _write_anew(
    directory: Path, run: Recorded, result: dict[str, Any], is_guard_new: bool
) -> list[str]:
    """Writes what follows from the record; returns as `attempt`."""

    def write() -> None:
        if is_guard_new:
            run.write_about(directory)
        write_reports(directory, run, result)

    return attempt(f"{directory}", write)


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Directory of the earlier run.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Directory of the later run.")],
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit 1 if a speed-up got worse.")
    ] = False,
) -> None:
    """Print the speed-ups of two runs side by side, and how they changed.

    A speed-up got worse if its new interval lies entirely below the old one. Exit code 0: done,
    1: one got worse and --fail-on-regression is given, 2: wrong use.
    """
    try:
        runs = [Recorded.read(directory) for directory in (old, new)]
    except UsageError as error:
        refuse(error)
    found = regression.compare(*runs)
    console = Console()
    console.width = max(console.width, regression.TABLE_WIDTH)
    console.print(regression.table_of(found))
    for text in found["warnings"]:
        console.print(f"warning: {text}", style="bold red", markup=False, highlight=False)
    for text in found["differences"]:
        console.print(f"differs: {text}", style="yellow", markup=False, highlight=False)
    worse = [name for name, change in found["changes"].items() if change["verdict"] == "worse"]
    failures = [f"worse than {old}: {', '.join(worse)}"] if worse and fail_on_regression else []
    finish(found, failures)


def attempt(place: str, write: Callable[[], object]) -> list[str]:
    """Writes; returns what went wrong, so that what was measured is printed all the same."""
    try:
        write()
    except OSError as error:
        return [f"{place} could not be written: {error}; free some space or name another place"]
    return []


def finish(printed: dict[str, Any], failures: list[str], code: int = FAILED) -> None:
    """Ends a command: the line of JSON, then what is wrong, and exit code `code` if anything is."""
    print(json.dumps(printed, allow_nan=False), flush=True)
    for failure in failures:
        print(f"cast-loadtest: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(code)


def refuse(error: ValueError) -> NoReturn:
    """Ends a command that was used wrongly: one line, and exit code 2."""
    print(f"cast-loadtest: {error}", file=sys.stderr)
    raise typer.Exit(2) from None
