"""A recorded run -> its result (one JSON object), a table for the terminal, and a directory.

run.json, requests.jsonl   the record (record.py)
result.json                the result: all that follows from the record, the verdict included
report.html, .md, .png     the same for people
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

from loadtest.judge.saturation import saturation
from loadtest.judge.statistics import speedups, summarise
from loadtest.judge.verdict import Guard, judge
from loadtest.quality import agreement, choices
from loadtest.record import Recorded
from loadtest.report import html, picture
from loadtest.report.words import facts, headline, notes, quality_texts, rows, warnings

WRITTEN = "result.json, report.html, report.md and report.png, from run.json and requests.jsonl"


def result_of(recorded: Recorded) -> dict[str, Any]:
    """The whole result; keys name their units, and every ratio above 1 favours the candidate."""
    about, plan = recorded.about, recorded.about["plan"]
    chosen = about.get("choices")  # older records do not have it
    is_ramp = about["schedule"] == "ramp" and recorded.pairs
    result = {
        "url": about["url"],
        "baseline": recorded.baseline,
        "candidate": recorded.candidate,
        "concurrency": plan["concurrency"],
        "output_tokens_per_request": plan["output_tokens"],
        "block_order": [block.variant for block in recorded.blocks],
        **{key: about["workload"].get(key) for key in ("prompt_words", "seed", "run_number")},
        **{
            key: about[key]
            for key in (
                *("date", "command", "versions", "plan", "workload", "schedule", "rate_per_s"),
                *("timeout_s", "harness", "is_aa", "served"),
            )
        },
        **summarise(recorded, speedups(recorded)),
        "saturation": {v: saturation(recorded, v) for v in recorded.variants} if is_ramp else None,
        "quality": agreement.summarise(about["quality"]) if about["quality"] else None,
        "choices": choices.summarise(chosen, *recorded.variants) if chosen else None,
    }
    verdict = judge(result, Guard.of(about["guard"]))
    result |= {"passed": verdict["passed"], "verdict": verdict}
    return {**result, "headline": headline(result), "warnings": warnings(result)}


def table_of(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    table = Table(
        title=f"{result['num_requests']} requests, {result['num_errors']} errors, "
        f"{result['num_block_pairs']} block pairs, "
        f"{result['output_tokens_per_request']} output tokens each",
        caption="above 1x the candidate is better; in brackets, the 95 % interval",
    )
    table.add_column("", no_wrap=True)
    for heading in (result["baseline"], result["candidate"], "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(result):
        style = None
        if row.interval:
            style = "green" if row.interval[1] > 1 else "red" if row.interval[2] < 1 else None
        table.add_row(row.label, row.baseline, row.candidate, row.speedup, style=style)
    return table


def markdown_of(result: dict[str, Any]) -> str:
    """The result for a pull request or a wiki."""

    def table(columns: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> list[str]:
        head = [columns, ("---",) + ("---:",) * (len(columns) - 1)]
        return [f"| {' | '.join(line)} |" for line in (*head, *lines)] + [""]

    text = [f"# {result['headline']}", ""]
    text += [f"> **{warning}**\n" for warning in result["warnings"]]
    text += [f"**{'Passed' if result['passed'] else 'NOT PASSED'}**", ""]
    if result["num_requests"]:
        columns = ("", result["baseline"], result["candidate"], "speed-up")
        lines = ((row.label, row.baseline, row.candidate, row.speedup) for row in rows(result))
        text += [*table(columns, lines), *(f"{note}\n" for note in notes(result))]
        text += ["![distributions and block pairs](report.png)", ""]
    text += [f"{found}\n" for found in quality_texts(result)]
    text += ["## Verdict", ""]
    text += [
        f"- {'passed' if check['passed'] else '**NOT PASSED**'}: {check['name']}: {check['why']}"
        for check in result["verdict"]["checks"]
    ]
    text += ["", "## How it was measured", ""]
    text += [f"- {name}: {value}" for name, value in facts(result)]
    return "\n".join(text) + "\n"


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
    check_matplotlib()


def check_matplotlib() -> None:
    """Finds out whether a PNG can be drawn.

    Raises:
        ValueError: if not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "reports need matplotlib; install it with: pip install 'cast-serve[loadtest]'"
        ) from error


def write_out(out: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    """Makes the directory with everything in it, or nothing."""
    with new_directory(out, result) as partial:
        recorded.write(partial)
        write_reports(partial, recorded, result)


def write_reports(directory: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    """Writes whatever follows from the record into a directory that exists."""
    texts = {
        "result.json": json.dumps(result, indent=2, allow_nan=False) + "\n",
        "report.md": markdown_of(result),
        "report.html": html.report(recorded, result),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    picture.draw(directory / "report.png", recorded, result)


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
