"""A recorded run and its result -> report.html: one file, no script, nothing fetched.

The first screen has what was compared, where and when, what may mislead, the verdict with its guard
rails, and the models. On a phone charts and details are folded. The page follows the viewer's light
or dark setting; charts are always light. In them, variants differ by dash and name as well as by
colour.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from loadtest.judge.statistics import THROUGHPUT
from loadtest.quality import models
from loadtest.record import Recorded
from loadtest.report import figures
from loadtest.report.warnings import warnings
from loadtest.report.words import (
    facts,
    guard_rails,
    headline,
    notes,
    origin,
    quality_texts,
    rows,
    stressed,
    title,
    verdict,
)

SPEEDUPS_INCHES = (5.6, 4.2)
STYLE = Path(__file__).with_name("report.css")


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around a body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def alerts(texts: Iterable[str]) -> list[str]:
    """Warnings in large letters, for the top of a page."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return [f'<ul class="warnings" aria-label="Warnings">{items}</ul>'] if items else []


def report(recorded: Recorded, result: dict[str, Any]) -> str:
    """The report as HTML."""
    body = _first_screen(result)
    if recorded.pairs:
        body += ["<h2>Figures</h2>", _table(result)]
        all_speedups = chart(partial(figures.speedups, result=result), SPEEDUPS_INCHES)
        body.append(f'<div class="only">{all_speedups}</div>')
    if texts := notes(result):
        body += ["<h2>How to read the figures</h2>"]
        body += folded("Notes", [f'<p class="muted">{escape(text)}</p>' for text in texts])
    if texts := quality_texts(result):
        body += ["<h2>Quality</h2>", *(f"<p>{escape(text)}</p>" for text in texts)]
    if recorded.pairs:
        body += ["<h2>Charts</h2>"]
        body += folded("Distributions, block pairs, drift", _charts(recorded, result))
    columns = ["check", "limit", "found", "verdict", "why"]
    checks = [
        [
            check["name"],
            _shown(check["limit"]),
            _shown(check["found"]),
            stressed(check),
            check["why"],
        ]
        for check in result["checks"]
    ]
    body += ["<h2>Checks</h2>", plain_table(columns, checks)]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(result)
    )
    body += ["<h2>How it was measured</h2>"]
    body += folded("Command, load, machine, versions", [f'<dl class="panel">{items}</dl>'])
    body.append(
        '<p class="muted">Computed from run.json and requests.jsonl beside this file; '
        "<code>cast-loadtest report DIR</code> recomputes it.</p>"
    )
    return page(title(result), body)


def _first_screen(result: dict[str, Any]) -> list[str]:
    state = verdict(result)
    style = result["verdict"] if state == result["verdict"].upper() else "muted"
    rails = "".join(f"<li>{escape(text)}</li>" for text in guard_rails(result))
    return [
        f"<header><h1>{escape(title(result))}</h1>",
        f'<p class="muted">{escape(origin(result))}</p></header>',
        *alerts(warnings(result)),
        f'<p class="verdict {style}">{state}</p>',
        f'<p class="lead">{escape(headline(result))}</p>',
        f'<ul class="rails">{rails}</ul>' if rails else "",
        _models(result),
    ]


def _models(result: dict[str, Any]) -> str:
    columns = ("variant", result["baseline"], result["candidate"])
    lines = [("", line) for line in models.rows(result)]
    return _panel("Models", columns, lines, "models")


def folded(handle: str, body: Iterable[str]) -> list[str]:
    """What a phone shows only when the handle is tapped."""
    return [f"<details><summary>{escape(handle)}</summary>", *body, "</details>"]


def _charts(recorded: Recorded, result: dict[str, Any]) -> list[str]:
    ttft_and_tpot = ("ttft", "tpot")
    body = ["<h3>Distributions</h3>"]
    body += _grid(partial(figures.distribution, recorded=recorded, metric=m) for m in ttft_and_tpot)
    body.append("<h3>Speed-up in each block pair</h3>")
    body += _grid(
        partial(figures.block_pairs, result=result, metric=metric)
        for metric in ("ttft", "tpot", "e2e", THROUGHPUT)
    )
    body.append("<h3>Drift over the run</h3>")
    body += _grid(
        partial(figures.drift, recorded=recorded, result=result, metric=m) for m in ttft_and_tpot
    )
    if result["schedule"] != "closed":
        body.append("<h3>Latency against time</h3>")
        body += _grid(
            partial(figures.timeline, recorded=recorded, metric=m) for m in ("ttft", "e2e")
        )
    return body


def _grid(draws: Iterable[figures.Draw]) -> list[str]:
    return ['<div class="charts">', *(chart(draw) for draw in draws), "</div>"]


def chart(draw: figures.Draw, size: tuple[float, float] = figures.CHART_INCHES) -> str:
    """A chart with its caption."""
    drawing, caption = figures.svg(draw, size)
    return f'<figure class="panel">{drawing}<figcaption>{escape(caption)}</figcaption></figure>'


def _table(result: dict[str, Any]) -> str:
    lines = []
    for row in rows(result):
        n = "" if row.n is None else " / ".join(str(number) for number in dict.fromkeys(row.n))
        is_first = row.label.split()[1] in ("p50,", "tokens/s")
        cells = (row.label, row.baseline, row.candidate, row.speedup, n)
        lines.append(("first" if is_first else "", cells))
    columns = ("figure", result["baseline"], result["candidate"], "speed-up", "n")
    return _panel("Figures", columns, lines, "numbers figures")


def plain_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Text in rows and columns; the last column is prose."""
    return _panel(f"By {columns[0]}", columns, [("", line) for line in lines], "numbers prose")


def _panel(
    name: str, columns: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], kind: str
) -> str:
    """A table that scrolls to the side in its panel, by keyboard too; `name` is for screen readers.

    Each of `lines` is a row's class and its cells; `kind` has the table's classes.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = ""
    for of_row, (first, *cells) in lines:
        body += f'<tr class="{of_row}">' if of_row else "<tr>"
        body += f'<th scope="row">{escape(first)}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    about = f'tabindex="0" role="region" aria-label="{escape(name)}"'
    return f'<div class="panel scrolls" {about}>{table}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}"
