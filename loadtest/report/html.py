"""A recorded run and its result -> report.html: one file, no script, nothing fetched.

Figures follow the viewer's light or dark setting, and variants differ by dash and name as well as
by colour.
"""

from collections.abc import Iterable
from html import escape
from typing import Any

from loadtest.judge.statistics import THROUGHPUT
from loadtest.record import Recorded
from loadtest.report import charts, plots
from loadtest.report.words import facts, headline, notes, quality_texts, rows, warnings

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --surface: #fff; --ink: #1b1f24; --muted: #59616b; --line: #deded8;
  --edge: #83898f; --v0: #59616b; --v1: #0f766e; --better: #0f766e; --worse: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131618; --surface: #1b1f22; --ink: #e8e9e7; --muted: #a2a9b0; --line: #30363a;
    --edge: #747d84; --v0: #a9b2bb; --v1: #4cc9b8; --better: #4cc9b8; --worse: #ff9d92;
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
h2 { margin: 3rem 0 0.75rem; font-size: 1.25rem; letter-spacing: -0.01em; }
h3 { margin: 0 0 0.25rem; font-size: 1rem; }
p { max-width: 54rem; }
.muted, figcaption, dt { color: var(--muted); font-size: 0.875rem; }
.warnings { margin: 0 0 2rem; padding: 0; list-style: none; display: grid; gap: 0.75rem; }
.warnings li { padding: 1rem 1.25rem; border-left: 0.4rem solid var(--worse); font-size: 1.125rem;
  background: var(--surface); }
.verdict { display: inline-block; margin: 0 0 0.75rem; padding: 0.125rem 0.75rem; font-weight: 650;
  border-radius: 1rem; border: 1.5px solid currentColor; }
.passed { color: var(--better); } .not-passed { color: var(--worse); }
.panel { padding: 1.25rem; border: 1px solid var(--line); border-radius: 0.75rem;
  background: var(--surface); overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 0.3rem 0.75rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--muted); font-size: 0.875rem; }
th:first-child, .text { text-align: left; }
.text { min-width: 14rem; white-space: normal; }
tbody tr.first > * { border-top: 1px solid var(--line); }
.bar { display: block; width: 10rem; height: 1rem; }
.bar .even { stroke: var(--edge); stroke-dasharray: 2 2; }
.bar .range { stroke-width: 6; opacity: 0.4; stroke: currentColor; }
.bar circle { fill: currentColor; }
.better { color: var(--better); } .worse { color: var(--worse); } .same { color: var(--muted); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; } .only { max-width: 52rem; }
a { color: var(--v1); }
.chart { display: block; width: 100%; }
.chart text { fill: var(--muted); font-size: 12px; }
.chart .grid { stroke: var(--line); } .chart .tick { stroke: var(--edge); }
.chart .even { stroke: var(--edge); stroke-dasharray: 4 3; }
.chart .value { stroke: var(--v1); stroke-width: 1.5; }
.chart .interval { fill: var(--v1); opacity: 0.18; }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.v0 { stroke: var(--v0); stroke-dasharray: 5 3; } .v1 { stroke: var(--v1); }
.dot { stroke-width: 1.5; stroke-dasharray: none; }
.dot.v0 { fill: var(--surface); } .dot.v1 { fill: var(--v1); }
.cross { fill: none; stroke-width: 1.5; stroke-dasharray: none; }
.key { display: inline-flex; align-items: center; gap: 0.4rem; margin-right: 1rem; }
.key svg { width: 1.75rem; height: 0.6rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.375rem 1.25rem; margin: 0; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code { font-size: 0.9em; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around a body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def alerts(texts: Iterable[str]) -> list[str]:
    """What must be seen first, big."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return [f'<ul class="warnings" role="alert">{items}</ul>'] if items else []


def report(recorded: Recorded, result: dict[str, Any]) -> str:
    """The report as HTML."""
    body = alerts(warnings(result))
    state = ("passed", "PASSED") if result["passed"] else ("not-passed", "NOT PASSED")
    body.append(f'<p class="verdict {state[0]}">{state[1]}</p>')
    body.append(f"<h1>{escape(headline(result))}</h1>")
    body += [f'<p class="muted">{escape(text)}</p>' for text in notes(result)]
    if recorded.pairs:
        body += ["<h2>Figures</h2>", _table(result)]
    if texts := quality_texts(result):
        body += ["<h2>Quality</h2>", *(f"<p>{escape(text)}</p>" for text in texts)]
    checks = ["check", "limit", "found", "passed", "why"]
    lines = [
        [
            check["name"],
            _shown(check["limit"]),
            _shown(check["found"]),
            "yes" if check["passed"] else "NO",
            check["why"],
        ]
        for check in result["verdict"]["checks"]
    ]
    body += ["<h2>Verdict</h2>", plain_table(checks, lines)]
    if recorded.pairs:
        body += _figures(recorded, result)
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(result)
    )
    body += ["<h2>How it was measured</h2>", f'<dl class="panel">{items}</dl>']
    body.append(
        '<p class="muted">Computed from run.json and requests.jsonl beside this file; '
        "<code>cast-loadtest report DIR</code> does it again.</p>"
    )
    return page(f"{result['candidate']} against {result['baseline']}", body)


def _figures(recorded: Recorded, result: dict[str, Any]) -> list[str]:
    legend = plots.legend(*recorded.variants)
    ratios = [plots.pairs(result, metric) for metric in ("ttft", "tpot", "e2e", THROUGHPUT)]
    body = ["<h2>Distributions</h2>", legend]
    body += _grid(plots.distribution(recorded, metric) for metric in ("ttft", "tpot"))
    body += ["<h2>Speed-up in each block pair</h2>", *_grid(ratios)]
    body += ["<h2>Drift over the run</h2>", legend]
    body += _grid(plots.drift(recorded, result, metric) for metric in ("ttft", "tpot"))
    if result["schedule"] != "closed":
        body += ["<h2>Latency against time</h2>", legend]
        body += _grid(plots.timeline(recorded, metric) for metric in ("ttft", "e2e"))
    return body


def _grid(figures: Iterable[str]) -> list[str]:
    return ['<div class="charts">', *figures, "</div>"]


def _table(result: dict[str, Any]) -> str:
    found = rows(result)
    # All bars share a scale that holds 1 and every end.
    ends = [end for row in found if row.interval for end in row.interval]
    reach = (min([0.95, *ends]) / 1.03, max([1.05, *ends]) * 1.03)
    scale = f"{reach[0]:.2f} to {reach[1]:.2f}, dashed: 1"
    columns = ("", result["baseline"], result["candidate"], "speed-up", scale, "n")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = []
    for row in found:
        bar = ""
        if row.interval:
            bar = charts.interval_bar(*row.interval, reach)
        n = (
            ""
            if row.n is None
            else f"{row.n[0]}"
            if row.n[0] == row.n[1]
            else "{} / {}".format(*row.n)
        )
        kind = ' class="first"' if row.label.split()[1] in ("p50,", "tokens/s") else ""
        cells = "".join(f"<td>{escape(c)}</td>" for c in (row.baseline, row.candidate, row.speedup))
        lines.append(
            f"<tr{kind}><th>{escape(row.label)}</th>{cells}<td>{bar}</td><td>{n}</td></tr>"
        )
    return _panel(head, "".join(lines))


def plain_table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Text in rows and columns; the last column is prose."""
    *names, prose = columns
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    head += f'<th class="text">{escape(prose)}</th>'
    body = ""
    for line in lines:
        first, *cells, last = line
        body += f"<tr><th>{escape(first)}</th>"
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<td class="text">{escape(last)}</td></tr>'
    return _panel(head, body)


def _panel(head: str, body: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="panel">{table}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}"
