"""A recorded run -> its result, one JSON object, and a table of it for the terminal."""

from typing import Any

from rich.table import Table

from cast_serve.guard import Guard
from loadtest.judge.saturation import growth, saturation
from loadtest.judge.statistics import speedups, summarise
from loadtest.judge.verdict import judge
from loadtest.quality import agreement, choices
from loadtest.record import Recorded
from loadtest.report.warnings import warnings
from loadtest.report.words import headline, output_lengths, rows

# What result.json copies from run.json.
KEPT = "date command versions plan workload schedule rate_per_s timeout_s harness is_aa served"
# Earlier records do not have these.
LATER = ("machine", "models", "directories", "quality_source", "until", "draft_acceptance")


def result_of(recorded: Recorded) -> dict[str, Any]:
    """The whole result; keys name their units, and every ratio above 1 favours the candidate."""
    about, plan = recorded.about, recorded.about["plan"]
    chosen = about.get("choices")  # older records do not have it
    is_ramp = about["schedule"] == "ramp" and recorded.pairs
    has_one_rate = about["schedule"] not in ("closed", "ramp") and recorded.pairs
    growths = {v: growth(recorded, v) for v in recorded.variants}
    result = {
        "url": about["url"],
        **dict(zip(("baseline", "candidate"), recorded.variants, strict=True)),
        "concurrency": plan["concurrency"],
        "block_order": [block.variant for block in recorded.blocks],
        **{key: about["workload"].get(key) for key in ("prompt_words", "seed", "run_number")},
        **{key: about[key] for key in KEPT.split()},
        **{key: about.get(key) for key in LATER},
        "is_complete": recorded.is_complete,
        **summarise(recorded, speedups(recorded)),
        "saturation": {v: saturation(recorded, v) for v in recorded.variants} if is_ramp else None,
        "ttft_growth": growths if has_one_rate else None,
        "quality": agreement.summarise(about["quality"]) if about["quality"] else None,
        "choices": choices.summarise(chosen, *recorded.variants) if chosen else None,
    }
    result |= judge(result, Guard.of(about["guard"]))
    return {**result, "headline": headline(result), "warnings": warnings(result)}


def table_of(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    table = Table(
        title=f"{result['num_requests']} requests, {result['num_errors']} errors, "
        f"{result['num_block_pairs']} block pairs, {output_lengths(result)}",
        caption="above 1x the candidate is better; 95 % intervals in brackets",
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
