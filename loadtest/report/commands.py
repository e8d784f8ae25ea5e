"""Run directories -> `cast-loadtest report` and `compare`; and the limits that judge a `run`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cast_serve.options import option
from cast_serve.provenance import origin
from loadtest.judge import coverage as simulation
from loadtest.judge.statistics import MIN_BLOCK_PAIRS
from loadtest.judge.verdict import Guard
from loadtest.record import Recorded
from loadtest.report import pareto, regression
from loadtest.report.directory import check_directory, check_file, check_matplotlib
from loadtest.report.files import WRITTEN, write_reports
from loadtest.report.result import result_of, table_of


def terms_of(
    guard: Path | None,
    slo_ttft_ms: float | None,
    slo_tpot_ms: float | None,
    num_quality_prompts: int,
    is_aa: bool,
    has_choices: bool = False,
    num_pairs: int = MIN_BLOCK_PAIRS,
) -> dict[str, Any]:
    """The limits that a run is judged by, for run.json.

    Raises:
        ValueError: if the guard file is wrong, a limit is not above 0, or the guard asks for
            goodput, agreement or accuracy that nothing measures, or for speed of too few block
            pairs (`num_pairs`, of all launches) to tell.
    """
    slo_ms = {"ttft_s": slo_ttft_ms, "tpot_s": slo_tpot_ms}
    for name, limit_ms in slo_ms.items():
        if limit_ms is not None and limit_ms <= 0:
            option = f"--slo-{name.removesuffix('_s')}-ms"
            raise ValueError(f"{option} {limit_ms:g} is too small; give more than 0")
    slo = {name: None if limit is None else limit / 1e3 for name, limit in slo_ms.items()}
    limits = Guard() if guard is None else Guard.read(guard)
    if num_quality_prompts < 0:
        raise ValueError(f"--quality-prompts {num_quality_prompts} is too small; give 0 or more")
    if limits.min_token_agreement is not None and not num_quality_prompts:
        raise ValueError(
            f"guard {guard} sets min_token_agreement, but nothing measures it; give "
            "--quality-prompts, or drop it"
        )
    if limits.max_accuracy_loss is not None and not has_choices:
        raise ValueError(
            f"guard {guard} sets max_accuracy_loss, but nothing measures it; give --choices, or "
            "drop it"
        )
    speed = {**limits.min_speedup, **limits.max_slowdown}
    if "goodput" in speed and slo_ttft_ms is None and slo_tpot_ms is None:
        raise ValueError(
            f"guard {guard} limits goodput, but nothing says which requests are good; give "
            "--slo-ttft-ms or --slo-tpot-ms, or drop it"
        )
    if speed and num_pairs < MIN_BLOCK_PAIRS:
        raise ValueError(
            f"guard {guard} limits {next(iter(speed))}, but {num_pairs} block pairs give no "
            f"interval; give --blocks {MIN_BLOCK_PAIRS} or more"
        )
    return {
        "guard": limits.about(),
        "slo": slo if any(limit is not None for limit in slo.values()) else None,
        "is_aa": is_aa,
    }


def show(result: dict[str, Any]) -> None:
    """Prints a result for people; warnings last, where a terminal shows them."""
    console = Console()
    console.print(table_of(result))
    console.print(result["headline"], markup=False, highlight=False)
    for text in result["warnings"]:
        console.print(f"warning: {text}", style="bold red", markup=False, highlight=False)


def failures_of(result: dict[str, Any]) -> list[str]:
    """Why a result did not pass, a line a check."""
    checks = result["verdict"]["checks"]
    return [f"{check['name']}: {check['why']}" for check in checks if not check["passed"]]


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="As made by `run --out`, or a sweep of them.")
    ],
    guard: Annotated[
        Path | None, option("FILE", "TOML of guard rails to judge by.", "the run's own")
    ] = None,
) -> None:
    """Computes result.json and the reports anew from run.json and requests.jsonl.

    Of a directory whose sub-directories are runs, it computes each, and throughput against
    interactivity of them all. Exit code 0: done, 1: a run does not pass, 2: wrong use.
    """
    try:
        check_matplotlib()
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
    except ValueError as error:
        _refuse(error)
    failures, unwritten = [], []
    for name, run in runs:
        printed = result_of(run)
        unwritten += _write_anew(directory / name, run, printed, new_guard is not None)
        show(printed)
        failures += [f"{name}: {text}" if name else text for text in failures_of(printed)]
    if pareto.is_sweep(directory):
        printed = sweep = pareto.sweep_of(runs)
        unwritten += attempt(f"{directory}", lambda: pareto.write_sweep(directory, sweep))
        Console().print(pareto.headline(printed))
    if not unwritten:
        print(f"written: {directory}/{WRITTEN}")
    finish(printed, failures + unwritten)


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
    """Prints the speed-ups of two runs side by side, and how they changed.

    A speed-up got worse if its new interval lies wholly below the old one. Exit code 0: done, 1:
    one got worse and --fail-on-regression is given, 2: wrong use.
    """
    try:
        runs = [Recorded.read(directory) for directory in (old, new)]
    except ValueError as error:
        _refuse(error)
    found = regression.compare(*runs)
    console = Console()
    console.width = max(console.width, regression.TABLE_WIDTH)
    console.print(regression.table_of(found))
    for text in found["warnings"]:
        console.print(f"warning, {text}", style="bold red", markup=False, highlight=False)
    for text in found["differences"]:
        console.print(f"not the same, {text}", style="yellow", markup=False, highlight=False)
    worse = [name for name, change in found["changes"].items() if change["verdict"] == "worse"]
    failures = [f"worse than {old}: {', '.join(worse)}"] if worse and fail_on_regression else []
    finish(found, failures)


def coverage(
    runs: Annotated[int, option("N", "Simulated runs of each kind of noise.", min=1)] = 1000,
    seed: Annotated[int, option("N", "Same seed, same result.")] = 0,
    out: Annotated[Path | None, option("FILE", "JSON to write.", "none")] = None,
) -> None:
    """Simulates how often a report's 95 % intervals hold the truth, by kind of noise."""
    try:
        if out is not None:
            check_file("--out", out)
    except ValueError as error:
        _refuse(error)
    begun = origin()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("runs", total=runs * len(simulation.NOISES))
        found = {**begun, **simulation.coverage(runs, seed, lambda: progress.advance(task))}
    table = Table(caption="share of runs whose interval holds the truth; it should be 95 %")
    for heading in ("noise", *next(iter(found["coverage"].values()))):
        table.add_column(heading)
    for noise, shares in found["coverage"].items():
        table.add_row(noise, *(f"{share:.1%}" for share in shares.values()))
    Console().print(table)
    failures = []
    if out is not None:
        text = json.dumps(found, indent=2) + "\n"
        failures = attempt(f"--out {out}", lambda: out.write_text(text, encoding="utf-8"))
    finish(found, failures)


def attempt(place: str, write: Callable[[], object]) -> list[str]:
    """Writes; returns what went wrong, so that what was measured is printed all the same."""
    try:
        write()
    except OSError as error:
        return [f"{place} could not be written: {error}; free or name another place"]
    return []


def finish(printed: dict[str, Any], failures: list[str]) -> None:
    """Ends a command: the line of JSON, then what is wrong, and exit code 1 if anything is."""
    print(json.dumps(printed, allow_nan=False), flush=True)
    for failure in failures:
        print(f"cast-loadtest: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _refuse(error: ValueError) -> NoReturn:
    print(f"cast-loadtest: {error}", file=sys.stderr)
    raise typer.Exit(2) from None
