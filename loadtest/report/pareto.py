"""A directory of runs at different loads -> throughput against interactivity, for both variants.

*Interactivity* is what one user gets, tokens per second after the first: 1 / median TPOT.
*Throughput* is what all users get together. More load buys the one with the other; a point is on
the *front* if no other of its variant is at least as good in both and better in one. The better
variant's front lies further up and right.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.judge.statistics import THROUGHPUT
from loadtest.record import RUN_FILE, Recorded
from loadtest.report import charts, html, plots
from loadtest.report.charts import Point
from loadtest.report.picture import COLOURS
from loadtest.report.result import result_of

AXES = ("tokens/s per user (1 / median TPOT)", "output tokens/s of all users")


def runs_in(directory: Path) -> list[tuple[str, Recorded]]:
    """(name, run) of each sub-directory that holds one, by load.

    Raises:
        ValueError: if one cannot be read, or they do not compare the same variants.
    """
    found = [
        (path.parent.name, Recorded.read(path.parent)) for path in directory.glob("*/run.json")
    ]
    if len({run.variants for _, run in found}) > 1:
        raise ValueError(
            f"the runs in {directory} compare different variants; put those of one pair in a "
            "directory of their own"
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
        found[name] = {
            **{key: result[key] for key in ("passed", "headline", "warnings")},
            **{key: result["speedups"].get(key) for key in ("tpot_p50", "ttft_p50", "throughput")},
        }
        for variant in run.variants:
            tpot_s = result["tpot_s"][variant]["median"]
            points.append(
                {
                    "run": name,
                    "variant": variant,
                    "output_tokens_per_s_per_user": 1 / tpot_s if tpot_s else None,
                    THROUGHPUT: result[THROUGHPUT][variant],
                }
            )
    for point in points:
        rivals = [other for other in points if other["variant"] == point["variant"]]
        point["is_on_front"] = _position(point) is not None and not any(
            _beats(other, point) for other in rivals
        )
    return {"baseline": baseline, "candidate": candidate, "points": points, "runs": found}


def _position(point: dict[str, Any]) -> tuple[float, float] | None:
    at = (point["output_tokens_per_s_per_user"], point[THROUGHPUT])
    return None if None in at else at


def _beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
    theirs, own = _position(other), _position(point)
    if theirs is None or own is None or theirs == own:
        return False
    return theirs[0] >= own[0] and theirs[1] >= own[1]


def headline(sweep: dict[str, Any]) -> str:
    """Who gets how far, in one sentence."""
    said = []
    for variant, front, _ in _series(sweep):
        if not front:
            said.append(f"{variant} answered too little to tell")
            continue
        per_user, total = (max(at[axis] for at in front) for axis in (0, 1))
        said.append(
            f"{variant} reaches {per_user:.1f} tokens/s for one user and {total:.1f} for all"
        )
    return "; ".join(said) + "."


def _warnings(sweep: dict[str, Any]) -> list[str]:
    """Each warning once, with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for name, found in sweep["runs"].items():
        for text in found["warnings"]:
            about.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in about.items()]


def _table(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    variants = (sweep["baseline"], sweep["candidate"])
    columns = ["run", *(f"{v}, per user" for v in variants), *(f"{v}, all" for v in variants)]
    columns += ["passed", ""]
    lines = []
    for name, found in sweep["runs"].items():
        own = {p["variant"]: p for p in sweep["points"] if p["run"] == name}
        values = [
            own[variant][key]
            for key in ("output_tokens_per_s_per_user", THROUGHPUT)
            for variant in variants
        ]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append([name, *cells, "yes" if found["passed"] else "NO", found["headline"]])
    return columns, lines


def _chart(sweep: dict[str, Any]) -> str:
    series = _series(sweep)
    positions = [position for _, _, dots in series for position, _ in dots]
    if not positions:
        return ""
    x = charts.x_scale((per_user for per_user, _ in positions), pad=0.05)
    y = charts.y_scale(total for _, total in positions)
    marks = []
    for (_, front, dots), kind in zip(series, plots.KINDS, strict=True):
        named = [(*position, name) for position, name in dots]
        marks += [charts.line(front, x, y, kind), charts.dots(named, x, y, kind)]
        marks.append(charts.labels(named, x, y))
    return charts.chart("throughput against interactivity", x, y, *AXES, marks)


def _series(sweep: dict[str, Any]) -> list[tuple[str, list[Point], list[tuple[Point, str]]]]:
    """(variant, its front from left to right, its points with their runs)."""
    found = []
    for variant in (sweep["baseline"], sweep["candidate"]):
        own = [p for p in sweep["points"] if p["variant"] == variant]
        dots = [(position, p["run"]) for p in own if (position := _position(p))]
        front = sorted(at for p in own if p["is_on_front"] and (at := _position(p)))
        found.append((variant, front, dots))
    return found


def write_sweep(directory: Path, sweep: dict[str, Any]) -> None:
    """Writes result.json, report.html, report.md and report.png beside the runs."""
    columns, lines = _table(sweep)
    says = headline(sweep)
    how = "Lines join each variant's front. Further up and right is better."
    body = [*html.alerts(_warnings(sweep)), f"<h1>{escape(says)}</h1>"]
    body.append(plots.legend(sweep["baseline"], sweep["candidate"]))
    figure = plots.figure("Throughput against interactivity", how, _chart(sweep))
    body += [f'<div class="only">{figure}</div>', "<h2>Runs</h2>"]
    body.append(html.plain_table(columns, lines))
    links = "".join(
        f'<li><a href="{escape(name)}/report.html">{escape(name)}</a></li>'
        for name in sweep["runs"]
    )
    body.append(f"<ul>{links}</ul>")
    title = f"{sweep['candidate']} against {sweep['baseline']}, sweep"
    table = [columns, ["---"] + ["---:"] * (len(columns) - 1), *lines]
    markdown = [
        f"# {says}",
        "",
        *(f"> **{text}**\n" for text in _warnings(sweep)),
        "![throughput against interactivity](report.png)",
        "",
    ]
    markdown += [f"| {' | '.join(line)} |" for line in table]
    texts = {
        "result.json": json.dumps(sweep, indent=2, allow_nan=False),
        "report.html": html.page(title, body),
        "report.md": "\n".join([*markdown, "", how]),
    }
    for name, text in texts.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")
    _draw(directory / "report.png", sweep)


def _draw(path: Path, sweep: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (variant, front, dots), colour in zip(_series(sweep), COLOURS, strict=True):
        axes.plot(*([at[axis] for at in front] for axis in (0, 1)), color=colour, label=variant)
        axes.scatter(*([at[axis] for at, _ in dots] for axis in (0, 1)), color=colour)
        for at, name in dots:
            axes.annotate(name, at, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel=AXES[0], ylabel=AXES[1])
    axes.legend()
    figure.savefig(path, dpi=120)


def is_sweep(directory: Path) -> bool:
    """Whether a directory holds runs and is none itself."""
    return not (directory / RUN_FILE).exists() and any(directory.glob(f"*/{RUN_FILE}"))
