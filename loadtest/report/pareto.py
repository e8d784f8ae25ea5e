"""A directory of runs at different loads -> throughput against interactivity, for both variants.

*Interactivity* is what one user gets, tokens per second after the first: 1 / median TPOT.
*Throughput* is what all users get together. More load raises throughput and lowers interactivity; a
point is on the *front* if no other of its variant is at least as good in both and better in one.
The better variant's front lies further up and right.
"""

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError
from loadtest.judge.statistics import THROUGHPUT
from loadtest.record import RUN_FILE, Recorded
from loadtest.report import figures, html
from loadtest.report.result import result_of
from loadtest.report.words import markdown_table, verdict

CHART_INCHES = (7.0, 4.4)
PER_USER = "output_tokens_per_s_per_user"


def runs_in(directory: Path) -> list[tuple[str, Recorded]]:
    """(name, run) of each sub-directory that holds one, by load.

    Raises:
        UsageError: if one cannot be read, or they do not compare the same variants.
    """
    found = [
        (path.parent.name, Recorded.read(path.parent))
        for path in sorted(directory.glob("*/run.json"))
    ]
    if len({run.variants for _, run in found}) > 1:
        raise UsageError(
            f"the runs in {directory} compare different variants; name one run's directory, such "
            f"as {directory / found[0][0]}"
        )
    return sorted(found, key=lambda one: (_load(one[1]), one[0]))


def _load(run: Recorded) -> tuple[float, int]:
    return run.about["rate_per_s"] or 0.0, run.about["plan"]["concurrency"]


def sweep_of(runs: Sequence[tuple[str, Recorded]]) -> dict[str, Any]:
    """The sweep's result: `points`, one a run and variant, and `speedups` of each run."""
    baseline, candidate = runs[0][1].variants
    points: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name, run in runs:
        result = result_of(run)
        speedups = result["speedups"]
        found[name] = {
            "verdict": result["verdict"],
            "has_guard": result["has_guard"],
            "headline": result["headline"],
            "warnings": result["warnings"],
            **{key: speedups.get(key) for key in ("tpot_p50", "ttft_p50", "throughput")},
        }
        for variant in run.variants:
            tpot_s = result["tpot_s"][variant]["median"]
            per_user = 1 / tpot_s if tpot_s else None
            point = {"run": name, "variant": variant, PER_USER: per_user}
            points.append({**point, THROUGHPUT: result[THROUGHPUT][variant]})
    for point in points:
        here = _position(point)
        others = [_position(other) for other in points if other["variant"] == point["variant"]]
        point["is_on_front"] = here is not None and not any(
            there is not None and there != here and there[0] >= here[0] and there[1] >= here[1]
            for there in others
        )
    return {"baseline": baseline, "candidate": candidate, "points": points, "runs": found}


def _position(point: dict[str, Any]) -> tuple[float, float] | None:
    at = (point[PER_USER], point[THROUGHPUT])
    return None if None in at else at


def headline(sweep: dict[str, Any]) -> str:
    """What each variant reaches, in one sentence."""
    parts = []
    for variant, front, _ in _series(sweep):
        if not front:
            parts.append(f"{variant} answered too few requests to tell")
            continue
        per_user = max(position[0] for position in front)
        total = max(position[1] for position in front)
        parts.append(f"{variant} reaches {per_user:.1f} tokens/s per user and {total:.1f} in total")
    return "; ".join(parts) + "."


def _warnings(sweep: dict[str, Any]) -> list[str]:
    """Each warning once, with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for name, found in sweep["runs"].items():
        for text in found["warnings"]:
            about.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in about.items()]


def _table(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    variants = (sweep["baseline"], sweep["candidate"])
    columns = ["run"]
    columns += [f"{variant}, per user" for variant in variants]
    columns += [f"{variant}, total" for variant in variants]
    columns += ["verdict", "summary"]
    lines = []
    for name, found in sweep["runs"].items():
        own = {p["variant"]: p for p in sweep["points"] if p["run"] == name}
        values = [own[variant][key] for key in (PER_USER, THROUGHPUT) for variant in variants]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append([name, *cells, verdict(found), found["headline"]])
    return columns, lines


def _series(sweep: dict[str, Any]) -> list[figures.Series]:
    found: list[figures.Series] = []
    for variant in (sweep["baseline"], sweep["candidate"]):
        own = [p for p in sweep["points"] if p["variant"] == variant]
        dots = [(position, p["run"]) for p in own if (position := _position(p))]
        front = sorted(at for p in own if p["is_on_front"] and (at := _position(p)))
        found.append((variant, front, dots))
    return found


def write_sweep(directory: Path, sweep: dict[str, Any]) -> None:
    """Writes result.json, report.html, report.md and report.png beside the runs."""
    texts = {
        "result.json": json.dumps(sweep, indent=2, allow_nan=False),
        "report.html": _html(sweep),
        "report.md": _markdown(sweep),
    }
    for name, text in texts.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")
    figures.write_front_png(directory / "report.png", _series(sweep))


def _html(sweep: dict[str, Any]) -> str:
    columns, lines = _table(sweep)
    chart = html.chart(partial(figures.front, series=_series(sweep)), CHART_INCHES)
    links = "".join(
        f'<li><a href="{escape(name)}/report.html">{escape(name)}</a></li>'
        for name in sweep["runs"]
    )
    body = [
        *html.alerts(_warnings(sweep)),
        f"<h1>{escape(headline(sweep))}</h1>",
        f'<div class="only">{chart}</div>',
        "<h2>Runs</h2>",
        html.plain_table(columns, lines),
        f"<ul>{links}</ul>",
    ]
    return html.page(f"{sweep['candidate']} against {sweep['baseline']}, sweep", body).rstrip()


def _markdown(sweep: dict[str, Any]) -> str:
    columns, lines = _table(sweep)
    return "\n".join(
        [
            f"# {headline(sweep)}",
            "",
            *(f"> **{text}**\n" for text in _warnings(sweep)),
            "![throughput against interactivity](report.png)",
            "",
            *markdown_table(columns, lines),
            "",
            figures.FRONT_CAPTION,
        ]
    )


def is_sweep(directory: Path) -> bool:
    """Whether a directory holds runs and is not one itself."""
    return not (directory / RUN_FILE).exists() and any(directory.glob(f"*/{RUN_FILE}"))
