"""A recorded run and its result -> report.html: one file, no script, nothing fetched.

The first screen has what was compared, where and when, what may mislead, the verdict with its guard
rails, and the models. On a phone charts and details are folded. The page follows the viewer's light
or dark setting; charts are always light. In them, variants differ by dash and name as well as by
colour.
"""

from collections.abc import Iterable
from functools import partial
from html import escape
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
    title,
    verdict,
)

SPEEDUPS_INCHES = (5.6, 4.2)
STATES = {"PASSED": "passed", "NOT PASSED": "not-passed"}
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --surface: #fff; --ink: #1b1f24; --muted: #59616b; --line: #deded8;
  --link: #0f766e; --better: #0f766e; --worse: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131618; --surface: #1b1f22; --ink: #e8e9e7; --muted: #a2a9b0; --line: #30363a;
    --link: #4cc9b8; --better: #4cc9b8; --worse: #ff9d92;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 74rem; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; max-width: 60rem; font-size: clamp(1.4rem, 3.2vw, 2rem); line-height: 1.25;
  letter-spacing: -0.02em; text-wrap: balance; }
h3 { margin: 2rem 0 0.75rem; font-size: 1rem; }
h2 { margin: 2.5rem 0 0.75rem; font-size: 1.25rem; letter-spacing: -0.01em; }
p { max-width: 54rem; }
.muted, figcaption, dt { color: var(--muted); font-size: 0.875rem; }
header p { margin: 0.25rem 0 1.25rem; }
.warnings { margin: 0 0 1.5rem; padding: 0; list-style: none; display: grid; gap: 0.75rem; }
.warnings li { padding: 0.75rem 1.25rem; border-left: 0.4rem solid var(--worse);
  background: var(--surface); }
.verdict { display: inline-block; margin: 0; padding: 0.125rem 0.75rem; font-weight: 650;
  border-radius: 1rem; border: 1.5px solid currentColor; }
.lead { margin: 0.75rem 0; max-width: 60rem; font-size: 1.25rem; line-height: 1.35; }
.rails { margin: 0 0 1.5rem; padding-left: 1.25rem; }
.passed { color: var(--better); } .not-passed { color: var(--worse); }
.panel { padding: 1.25rem; border: 1px solid var(--line); border-radius: 0.75rem;
  background: var(--surface); overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 0.3rem 0.75rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--muted); font-size: 0.875rem; }
th:first-child, .text, .models * { text-align: left; }
.models td { white-space: normal; overflow-wrap: anywhere; } .models { width: auto; }
.text { min-width: 14rem; white-space: normal; }
tbody tr.first > * { border-top: 1px solid var(--line); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; } .only { max-width: 44rem; margin-top: 1rem; }
a { color: var(--link); }
.chart { display: block; width: 100%; height: auto; border-radius: 0.375rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.375rem 1.25rem; margin: 0; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code { font-size: 0.9em; }
summary { padding: 0.625rem 0; min-height: 2.75rem; font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media (max-width: 30rem) {
  body { padding-top: 1.25rem; }
  .panel { padding: 0.75rem; }
  th, td { padding: 0.25rem 0.3rem; font-size: 0.8125rem; white-space: normal; }
  .n { display: none; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; }
}
/* Where there is room, what is folded on a phone is open and has no handle. */
@supports selector(::details-content) {
  @media (min-width: 40.001rem), print {
    summary { display: none; }
    details::details-content { content-visibility: visible; block-size: auto; }
  }
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around a body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
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
        body += ["<h2>How to read them</h2>"]
        body += folded("Notes", [f'<p class="muted">{escape(text)}</p>' for text in texts])
    if texts := quality_texts(result):
        body += ["<h2>Quality</h2>", *(f"<p>{escape(text)}</p>" for text in texts)]
    if recorded.pairs:
        body += ["<h2>Charts</h2>"]
        body += folded("Distributions, block pairs, drift", _charts(recorded, result))
    columns = ["check", "limit", "found", "passed", "why"]
    checks = [
        [
            check["name"],
            _shown(check["limit"]),
            _shown(check["found"]),
            "yes" if check["passed"] else "NO",
            check["why"],
        ]
        for check in result["verdict"]["checks"]
    ]
    body += ["<h2>Checks</h2>", plain_table(columns, checks)]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(result)
    )
    body += ["<h2>How it was measured</h2>"]
    body += folded("Command, load, machine, versions", [f'<dl class="panel">{items}</dl>'])
    body.append(
        '<p class="muted">Computed from run.json and requests.jsonl beside this file; '
        "<code>cast-loadtest report DIR</code> does it again.</p>"
    )
    return page(title(result), body)


def _first_screen(result: dict[str, Any]) -> list[str]:
    state = verdict(result)
    rails = "".join(f"<li>{escape(text)}</li>" for text in guard_rails(result))
    return [
        f"<header><h1>{escape(title(result))}</h1>",
        f'<p class="muted">{escape(origin(result))}</p></header>',
        *alerts(warnings(result)),
        f'<p class="verdict {STATES.get(state, "muted")}">{state}</p>',
        f'<p class="lead">{escape(headline(result))}</p>',
        f'<ul class="rails">{rails}</ul>' if rails else "",
        _models(result),
    ]


def _models(result: dict[str, Any]) -> str:
    columns = ("model of", result["baseline"], result["candidate"])
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ""
    for name, *cells in models.rows(result):
        body += f'<tr><th scope="row">{escape(name)}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return _panel("Models", head, body, "models")


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
    """A chart with its caption.

    Args:
        draw: as for figures.svg; so is `size`.
    """
    drawing, caption = figures.svg(draw, size)
    return f'<figure class="panel">{drawing}<figcaption>{escape(caption)}</figcaption></figure>'


def _table(result: dict[str, Any]) -> str:
    columns = ("figure", result["baseline"], result["candidate"], "speed-up")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    head += '<th scope="col" class="n">n</th>'
    lines = []
    for row in rows(result):
        n = "" if row.n is None else " / ".join(str(number) for number in dict.fromkeys(row.n))
        kind = ' class="first"' if row.label.split()[1] in ("p50,", "tokens/s") else ""
        cells = (row.baseline, row.candidate, row.speedup)
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells) + f'<td class="n">{n}</td>'
        lines.append(f'<tr{kind}><th scope="row">{escape(row.label)}</th>{body}</tr>')
    return _panel("Figures", head, "".join(lines))


def plain_table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Text in rows and columns; the last column is prose."""
    *names, prose = columns
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    head += f'<th scope="col" class="text">{escape(prose)}</th>'
    body = ""
    for line in lines:
        first, *cells, last = line
        body += f'<tr><th scope="row">{escape(first)}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<td class="text">{escape(last)}</td></tr>'
    return _panel(f"By {names[0]}", head, body)


def _panel(name: str, head: str, body: str, kind: str = "numbers") -> str:
    """A table that scrolls to the side in its panel, by keyboard too."""
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    about = f'tabindex="0" role="region" aria-label="{escape(name)}"'
    return f'<div class="panel scrolls" {about}>{table}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}"
