"""Claims in a TOML file -> a table of them, whose figures are computed from records.

A claim has `claim`, `figure`, `command`, `threat` and, for speeds, `quality`: what the same bits
cost in quality. In all but the first and the command, braces hold a function of `FUNCTIONS` and its
arguments:

    figure = "{ratio perplexity/long-c4.json perplexity/dense-c4.json} on C4"
    figure = "{speedup demo.json:speedups.tpot_p50}"

Records are paths from records/ beside the file, RECORD:KEY what a record holds at a dotted key. The
table names every record that a figure is computed from, and those in `records`, which may be
patterns. A figure that needs no record has `follows_from`, which says what it follows from.
"""

import math
import re
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables.records import above_first, losses_above, read, value
from cast_serve.intervals import series_stderr
from loadtest.record import Recorded
from loadtest.report.result import result_of
from loadtest.report.words import markdown_table, speedup

COMPUTED = re.compile(r"\{(\w+) ([^{}]+)\}")
REQUIRED = {"claim", "figure", "command", "threat"}
OPTIONAL = {"quality", "records", "follows_from"}


def table(paths: Sequence[Path]) -> list[str]:
    """A line a claim, in the file's order.

    Raises:
        ValueError: if a claim lacks a field or has an unknown one, if a record or a key is missing,
            or if a figure is not computed from a record and does not say what it follows from.
    """
    records = paths[0].parent / "records"
    lines = []
    for claim in tomllib.loads(paths[0].read_text(encoding="utf-8"))["claims"]:
        try:
            lines.append(_line(claim, records))
        except ValueError as error:
            raise ValueError(f"claim {claim.get('claim')!r}: {error}") from error
    columns = ["claim", "figure", "quality of the same bits", "record", "command", "threat"]
    head, _, *rows = markdown_table(columns, lines)
    return [head, "| --- " * len(columns) + "|", *rows]


def _line(claim: Mapping[str, Any], records: Path) -> list[str]:
    fields = set(claim)
    if wrong := (REQUIRED - fields) | (fields - REQUIRED - OPTIONAL):
        raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}")
    names: list[str] = []  # of the records, in the order of the figures

    def computed(found: re.Match[str]) -> str:
        name, arguments = found[1], found[2].split()
        if name not in FUNCTIONS:
            raise ValueError(f"function {name!r} is not one of {', '.join(FUNCTIONS)}")
        figure = FUNCTIONS[name](records, arguments)
        files = [argument.partition(":")[0].removesuffix("/run.json") for argument in arguments]
        names.extend(file for file in files if (records / file).exists())
        return figure

    texts = ("figure", "quality", "threat")
    filled = {name: COMPUTED.sub(computed, claim.get(name, "")) for name in texts}
    names.extend(claim.get("records", ()))
    if not names and "follows_from" not in claim:
        raise ValueError("no figure is computed from a record, and follows_from is missing")
    source = claim.get("follows_from") or _sources(records, names)
    return [
        claim["claim"],
        filled["figure"],
        filled["quality"],
        source,
        claim["command"],
        filled["threat"],
    ]


def _sources(records: Path, names: Sequence[str]) -> str:
    """Records by folder, without .json."""
    folders: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if not any(records.glob(name)):
            raise ValueError(f"no record is named {name}")
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file.removesuffix(".json").replace("*", "\\*"))
    return "; ".join(
        f"{folder}: {', '.join(files)}" if folder else ", ".join(files)
        for folder, files in folders.items()
    )


def _at(records: Path, name: str) -> Any:
    record, _, key = name.partition(":")
    return value(records / record, key)


def _value(records: Path, arguments: Sequence[str]) -> str:
    """RECORD:KEY [FORMAT]: a number."""
    return format(_at(records, arguments[0]), arguments[1] if len(arguments) > 1 else "")


def _speedup(records: Path, arguments: Sequence[str]) -> str:
    """RECORD:KEY: a ratio with its interval."""
    return speedup(_at(records, arguments[0]))


def _run(records: Path, arguments: Sequence[str]) -> str:
    """FOLDER SPEEDUP: of a recorded load test, such as tpot_p50."""
    speedups = result_of(Recorded.read(records / arguments[0]))["speedups"]
    if arguments[1] not in speedups:
        raise ValueError(f"{arguments[0]} has no speed-up {arguments[1]!r}")
    return speedup(speedups[arguments[1]])


def _ratio(records: Path, arguments: Sequence[str]) -> str:
    """RECORD OTHER: perplexity over the other's on the same blocks; or two RECORD:KEY."""
    if ":" in arguments[0]:
        return f"{_at(records, arguments[0]) / _at(records, arguments[1]):.2f}"
    return f"{math.exp(statistics.fmean(losses_above(*_paths(records, arguments)))):.2f}"


def _nats(records: Path, arguments: Sequence[str]) -> str:
    """RECORD OTHER: log perplexity above the other's, paired by block, with a standard error."""
    above = losses_above(*_paths(records, arguments))
    return f"{statistics.fmean(above):+.4f} ± {series_stderr(above):.4f}"


def _closed(records: Path, arguments: Sequence[str]) -> str:
    """FROM TO GOAL, records or RECORD:KEY: the share of the log perplexity gap that is closed."""
    if ":" in arguments[0]:
        start, end, goal = (math.log(_at(records, name)) for name in arguments)
        return f"{(start - end) / (start - goal):.0%}"
    start_path, end_path, goal_path = _paths(records, arguments)
    closed = -statistics.fmean(losses_above(end_path, start_path))
    return f"{closed / statistics.fmean(losses_above(start_path, goal_path)):.0%}"


def _seeds(records: Path, arguments: Sequence[str]) -> str:
    """RECORD WAY: of a study, log perplexity above its first way, paired by seed."""
    means = above_first(read(records / arguments[0]))
    way = " ".join(arguments[1:])
    if way not in means:
        raise ValueError(f"{arguments[0]} has no way {way!r}")
    mean, error = means[way]
    return f"{mean:+.4f} ± {error:.4f}"


def _paths(records: Path, names: Sequence[str]) -> list[Path]:
    return [records / name for name in names]


FUNCTIONS: dict[str, Callable[[Path, Sequence[str]], str]] = {
    "value": _value,
    "speedup": _speedup,
    "run": _run,
    "ratio": _ratio,
    "nats": _nats,
    "closed": _closed,
    "seeds": _seeds,
}
