"""A paired run -> the result (one JSON object), a table for the terminal, and files in a directory.

result.json     the result
requests.jsonl  one line a request with its raw time stamps, in seconds from the run's start
report.png      TTFT and TPOT of both variants, and every block pair's ratios
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtest.client import Outcome
from loadtest.paired import PairedRun
from loadtest.statistics import THROUGHPUT, TIMES, summarise, times
from loadtest.workload import Workload

_COLOURS = ("#0072b2", "#d55e00")  # told apart by colour-blind readers too
_RATIO_COLOURS = ("#009e73", "#cc79a7", "#56b4e9")


def result_of(url: str, run: PairedRun, workload: Workload) -> dict[str, Any]:
    """The whole result; keys name their units, and every ratio above 1 favours the candidate."""
    summary = summarise(run)
    problems = ("num_errors", "num_warmup_errors", "num_unequal_lengths")
    return {
        "url": url,
        "baseline": run.plan.baseline,
        "candidate": run.plan.candidate,
        "passed": not any(summary[problem] for problem in problems),
        "concurrency": run.plan.concurrency,
        "output_tokens_per_request": run.plan.output_tokens,
        "prompt_words": workload.prompt_words,
        "seed": workload.seed,
        "run_number": workload.run_number,
        "block_order": [variant for _, variant in run.plan.block_order()],
        **summary,
    }


def table_of(result: dict[str, Any]) -> Table:
    """The result for people."""
    baseline, candidate = result["baseline"], result["candidate"]
    table = Table(
        title=f"{result['num_requests']} requests, {result['num_errors']} errors, "
        f"concurrency {result['concurrency']}, "
        f"{result['output_tokens_per_request']} output tokens each, medians",
        caption="ratio above 1: the candidate is better; in brackets, over block pairs",
    )
    table.add_column("", no_wrap=True)
    for heading in (baseline, "p95", candidate, "p95", "ratio [min, max]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in TIMES:
        sides = [result[f"{metric}_s"][variant] for variant in (baseline, candidate)]
        cells = [_milliseconds(side[key]) for side in sides for key in ("median", "p95")]
        table.add_row(f"{metric.upper()} (ms)", *cells, _ratio(result["ratio"][metric]))
    speeds = [result[THROUGHPUT][variant] for variant in (baseline, candidate)]
    shown = ["-" if speed is None else f"{speed:.1f}" for speed in speeds]
    ratio = _ratio(result["ratio"][THROUGHPUT])
    table.add_row("tokens/s", shown[0], "", shown[1], "", ratio)
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _ratio(spread: dict[str, Any]) -> str:
    if spread["median"] is None:
        return "-"
    return f"{spread['median']:.3f} [{spread['min']:.3f}, {spread['max']:.3f}]"


def check_out(out: Path) -> None:
    """Finds out before the run what would stop write_out after it.

    Raises:
        ValueError: if `out` is taken, its parent cannot be written, or matplotlib is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; name a new directory, or remove it")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be made: {parent} is not a directory we may write")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--out needs matplotlib; install it with: pip install 'cast-serve[loadtest]'"
        ) from error


def write_out(out: Path, result: dict[str, Any], run: PairedRun) -> None:
    """Writes all three files or none."""
    with new_directory(out, result) as partial:
        with (partial / "requests.jsonl").open("w", encoding="utf-8") as file:
            for line in _requests(run):
                file.write(json.dumps(line) + "\n")
        _draw(partial / "report.png", result, run)


@contextmanager
def new_directory(out: Path, result: dict[str, Any]) -> Iterator[Path]:
    """A directory beside `out` with result.json, renamed to `out` if the block ends well."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (partial / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _requests(run: PairedRun) -> Iterator[dict[str, Any]]:
    def line(outcome: Outcome, block: int | None, block_pair: int | None) -> dict[str, Any]:
        timing = outcome.timing
        since = [] if timing is None else timing.token_events_s
        return {
            "block": block,  # its place in block_order; null = warm-up
            "block_pair": block_pair,
            "variant": outcome.variant,
            "prompt_index": outcome.prompt_index,
            "error": outcome.error,
            "prompt_tokens": outcome.prompt_tokens,
            "output_tokens": timing and timing.output_tokens,
            "intended_send_s": timing and timing.intended_send_s - run.started_s,
            "token_events_s": [stamp - run.started_s for stamp in since],
            "last_s": timing and timing.last_s - run.started_s,
        }

    for outcome in run.warmup:
        yield line(outcome, None, None)
    for number, block in enumerate(run.blocks):
        for outcome in block.outcomes:
            yield line(outcome, number, block.block_pair)


def _draw(path: Path, result: dict[str, Any], run: PairedRun) -> None:
    from matplotlib.figure import Figure  # an optional extra, needed for --out only

    figure = Figure(figsize=(13, 4), layout="constrained")
    *distributions, pairs = figure.subplots(1, 3)
    for axes, metric in zip(distributions, ("ttft", "tpot"), strict=True):
        for variant, colour in zip((run.plan.baseline, run.plan.candidate), _COLOURS, strict=True):
            outcomes = [o for b in run.blocks if b.variant == variant for o in b.outcomes]
            values = sorted(1e3 * value for value in times(outcomes, metric))
            shares = [(rank + 1) / len(values) for rank in range(len(values))]
            label = f"{variant} (n={len(values)})"
            axes.step(values, shares, where="post", color=colour, label=label)
        axes.set(xlabel=f"{metric.upper()} (ms)", ylabel="share of requests", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.legend()
    for metric, colour in zip(("ttft", "tpot", THROUGHPUT), _RATIO_COLOURS, strict=True):
        per_pair = result["ratio"][metric]["per_block_pair"]
        pairs.plot(range(len(per_pair)), per_pair, marker="o", color=colour, label=metric)
    pairs.axhline(1, color="grey", linewidth=1)
    pairs.set(xlabel="block pair", ylabel="ratio (above 1: candidate better)")
    pairs.xaxis.get_major_locator().set_params(integer=True)
    pairs.legend()
    figure.suptitle(
        f"{run.plan.candidate} against {run.plan.baseline}, concurrency {run.plan.concurrency}, "
        f"{run.plan.output_tokens} output tokens, {result['num_errors']} errors"
    )
    figure.savefig(path, dpi=120)
