"""A recorded run and its result -> result.json and the reports in the run's directory.

result.json                the result: figures, speed-ups and the verdict
report.html, .md, .png     the same for people
"""

import json
from pathlib import Path
from typing import Any

from loadtest.quality import models
from loadtest.record import Recorded
from loadtest.report import figures, html
from loadtest.report.words import (
    facts,
    guard_rails,
    markdown_table,
    notes,
    origin,
    quality_texts,
    rows,
    stressed,
    title,
    verdict,
)

WRITTEN = "result.json, report.html, report.md and report.png, from run.json and requests.jsonl"


def write_reports(directory: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    """Writes result.json and the reports, replacing older ones.

    Args:
        directory: the run's; it exists.
        recorded: run.json and requests.jsonl, as read.
        result: of `judge.result_of`.
    """
    texts = {
        "result.json": json.dumps(result, indent=2, allow_nan=False) + "\n",
        "report.md": markdown_of(result),
        "report.html": html.report(recorded, result),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    figures.write_png(directory / "report.png", recorded, result)


def markdown_of(result: dict[str, Any]) -> str:
    """report.md: the result in Markdown, for a pull request or a wiki."""
    lines = [f"# {title(result)}", "", origin(result), ""]
    lines += [f"> **{warning}**\n" for warning in result["warnings"]]
    lines += [f"**{verdict(result)}**: {result['headline']}", ""]
    lines += [*(f"- {text}" for text in guard_rails(result)), ""]
    columns = ("variant", result["baseline"], result["candidate"])
    lines += [*markdown_table(columns, models.rows(result)), ""]
    if result["num_requests"]:
        names = ("", result["baseline"], result["candidate"], "speed-up")
        cells = [(row.label, row.baseline, row.candidate, row.speedup) for row in rows(result)]
        lines += [*markdown_table(names, cells), ""]
        lines += [f"{note}\n" for note in notes(result)]
        lines += ["![distributions and block pairs](report.png)", ""]
    lines += [f"{text}\n" for text in quality_texts(result)]
    lines += ["## Checks", ""]
    lines += [f"- {stressed(check)}: {check['name']}: {check['why']}" for check in result["checks"]]
    lines += ["", "## How it was measured", ""]
    lines += [f"- {name}: {value}" for name, value in facts(result)]
    return "\n".join(lines) + "\n"
