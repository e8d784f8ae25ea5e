"""A recorded run and its result -> charts by matplotlib: SVG for report.html, and report.png.

A function that takes `axes` draws one chart into them and returns its caption, so a chart is drawn
the same way wherever it appears. The baseline is dashed and hollow, the candidate solid and filled.

matplotlib belongs to the extra [loadtest] and takes long to import, so it is imported where a
figure is made: a load test without reports does not need it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from loadtest.judge.statistics import THROUGHPUT, values
from loadtest.record import Recorded
from loadtest.report.words import NAMES, headline, limits_of, rows, times

Draw = Callable[[Any], str]
"""Draws into axes and returns the caption."""
Point = tuple[float, float]
Item = TypeVar("Item")

COLOURS = ("#0072b2", "#d55e00")  # baseline, candidate; they differ for colour-blind readers too
STYLES = (
    {"color": COLOURS[0], "linestyle": "--", "markerfacecolor": "white"},
    {"color": COLOURS[1], "linestyle": "-"},
)
BETTER, WORSE, SAME = "#00785a", "#b42318", "#666666"
SETTINGS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "grid.color": "#e6e6e6",
    "svg.fonttype": "none",  # text stays text
}
RATIO_NAMES = {**NAMES, THROUGHPUT: "output tokens/s"}
MAX_POINTS = 400
CHART_INCHES = (5.6, 3.2)
FRONT_CAPTION = "Lines join each variant's front. Further up and right is better."


def svg(draw: Draw, size: tuple[float, float] = CHART_INCHES) -> tuple[str, str]:
    """One chart as an SVG element that any page can hold, and its caption.

    The same chart always gives the same text: no date, and ids that follow from the chart's title,
    which is its own on a page. The page scales the chart, `size` inches large, to its own width.
    """
    from matplotlib import rc_context

    file = StringIO()
    with _figure(size) as figure:
        axes = figure.subplots()
        caption = draw(axes)
        title = axes.get_title()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context({"svg.hashsalt": title}):
            figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    # Without the XML prologue, and on one line: matplotlib breaks it at every point of a line.
    text = " ".join(text[text.index("<svg ") :].split())
    text = text.replace("<svg ", f'<svg class="chart" role="img" aria-label="{escape(title)}" ', 1)
    # Every chart numbers its groups from 1 (axes_1), and nothing refers to them.
    return re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text), caption


def write_png(path: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    """Draws report.png: distributions, speed-ups and every block pair's ratios."""
    with _figure((15, 8.4)) as figure:
        above, below = figure.subplots(2, 3)
        distribution(above[0], recorded, "ttft")
        distribution(above[1], recorded, "tpot")
        speedups(above[2], result)
        for axes, metric in zip(below, ("ttft", "tpot", THROUGHPUT), strict=True):
            block_pairs(axes, result, metric)
        figure.suptitle(headline(result), wrap=True, fontsize=11)
        figure.savefig(path, dpi=100)


def write_front_png(path: Path, series: Sequence["Series"]) -> None:
    """Draws a sweep's report.png."""
    with _figure((8, 5)) as figure:
        front(figure.subplots(), series)
        figure.savefig(path, dpi=120)


def write_capacity_png(
    path: Path,
    about: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    blocks: Mapping[str, Sequence[Point]],
) -> None:
    """Draws the report.png of `cast-loadtest capacity`: a point per block, and each capacity.

    Args:
        path: of the picture.
        about: what capacity.json says of the run.
        variants: of capacity.py's `result_of`, in requests/s.
        blocks: by variant, of each block the rate in requests/s and the share of good requests.
    """
    rates = np.array([rate for points in blocks.values() for rate, _ in points])
    with _figure((8, 4.5)) as figure:
        axes = figure.subplots()
        axes.set_title(f"requests within {limits_of(about['slo'])}")
        for (variant, found), style in zip(variants.items(), STYLES, strict=True):
            value, low, high = found["capacity_per_s"], found["low"], found["high"]
            label = variant
            if value is not None:
                axes.axvspan(low, high, color=style["color"], alpha=0.12, linewidth=0)
                axes.axvline(value, color=style["color"], linestyle=style["linestyle"])
                label += f": {value:.3g} ({low:.3g} to {high:.3g})"
            points = _coordinates(blocks[variant])
            axes.plot(*points, marker="o", label=label, **{**style, "linestyle": "none"})
        axes.axhline(about["good"], color=SAME, linewidth=0.8)
        _scale(axes.set_xscale, axes.xaxis, rates)
        axes.set(xlabel="requests/s", ylabel="share of good requests", ylim=(0, 1.04))
        axes.legend(loc="lower left")
        figure.savefig(path, dpi=120)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw into and to save as long as the block lasts: only there SETTINGS hold."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        yield Figure(figsize=size, layout="constrained")


def distribution(axes: Any, recorded: Recorded, metric: str) -> str:
    """The share of requests that had a time, or a shorter one."""
    axes.set_title(f"{NAMES[metric]}: share of requests at least as fast")
    all_ms = []
    for variant in recorded.variants:
        requests = [r for block in recorded.blocks_of(variant) for r in block.requests]
        all_ms.append(1e3 * values(requests, metric))
    answered_ms = [side[np.isfinite(side)] for side in all_ms]
    if not all(map(len, answered_ms)):
        return _empty(axes, "One variant has no values.")
    longest_ms = max(side[-1] for side in answered_ms)
    lines = zip(recorded.variants, all_ms, answered_ms, STYLES, strict=True)
    for variant, side, known, style in lines:
        shares = (1 + np.arange(len(known))) / len(side)
        # From the bottom, and on to the right end: what failed is missing there.
        across = [known[0], *thinned(known.tolist()), longest_ms]
        up = [0.0, *thinned(shares.tolist()), shares[-1]]
        num_failed = len(side) - len(known)
        label = f"{variant}, n = {len(side)}" + (f", {num_failed} failed" if num_failed else "")
        axes.step(across, up, where="post", label=label, **style)
    _scale(axes.set_xscale, axes.xaxis, np.concatenate(answered_ms))
    axes.set(xlabel=f"{NAMES[metric]} (ms)", ylabel="share of requests", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return "Further left is faster."


def speedups(axes: Any, result: dict[str, Any]) -> str:
    """Every speed-up that has an interval, against 1."""
    axes.set_title(f"speed-up: above 1, {result['candidate']} is better")
    found = [row for row in rows(result) if row.interval]
    if not found:
        return _empty(axes, "No speed-up has an interval.")
    for place, row in enumerate(found):
        ratio, low, high = row.interval or (1.0, 1.0, 1.0)
        colour = BETTER if low > 1 else WORSE if high < 1 else SAME
        axes.plot([low, high], [place, place], color=colour, linewidth=4, alpha=0.4)
        axes.plot([ratio], [place], color=colour, marker="o", markersize=5)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(found)), [row.label.removesuffix(", ms") for row in found])
    axes.set_xlabel("speed-up and 95 % interval")
    _scale(axes.set_xscale, axes.xaxis, np.array([row.interval for row in found]))
    axes.invert_yaxis()  # the first row on top
    return "Dots and bars: the run's speed-ups and their intervals; a grey one contains 1."


def block_pairs(axes: Any, result: dict[str, Any], metric: str) -> str:
    """Each block pair's ratio, and the run's with its interval if it has one."""
    axes.set_title(f"{RATIO_NAMES[metric]}: above 1, {result['candidate']} is better")
    per_pair = result["ratio"][metric]["per_block_pair"]
    speedup = result["speedups"].get("throughput" if metric == THROUGHPUT else f"{metric}_p50")
    if not per_pair or not speedup or speedup["ratio"] is None:
        return _empty(axes, "Too many requests failed.")
    has_interval = None not in speedup.values()
    if has_interval:
        axes.axhspan(speedup["low"], speedup["high"], color=COLOURS[1], alpha=0.15, linewidth=0)
    axes.axhline(speedup["ratio"], color=COLOURS[1], linewidth=1.5)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.plot(range(1, len(per_pair) + 1), per_pair, "o", color=COLOURS[1], markersize=5)
    _scale(axes.set_yscale, axes.yaxis, np.array([*per_pair, 1.0]))
    axes.set(xlabel="block pair", ylabel="ratio", xlim=(0.5, len(per_pair) + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    dots = "each pair alone" if metric == THROUGHPUT else "each pair's medians"
    line = "Line and band" if has_interval else "Line"
    return f"{line}: {times(speedup)} over the whole run. Dots: {dots}."


def drift(axes: Any, recorded: Recorded, result: dict[str, Any], metric: str) -> str:
    """Each block's median against when it began."""
    axes.set_title(f"{NAMES[metric]}: block by block")
    found = result["drift"][metric]
    drawn_ms: list[float] = []
    for variant, style in zip(recorded.variants, STYLES, strict=True):
        blocks = zip(recorded.blocks_of(variant), found[variant]["per_block_s"], strict=True)
        points = [(block.started_s, 1e3 * median) for block, median in blocks if median is not None]
        if points:
            drawn_ms += [median_ms for _, median_ms in points]
            axes.plot(*_coordinates(points), marker="o", markersize=5, label=variant, **style)
    if not drawn_ms:
        return _empty(axes, "Too many requests failed.")
    _scale(axes.set_yscale, axes.yaxis, np.array(drawn_ms))
    axes.set(xlabel="seconds since the run's start", ylabel=f"block median of {NAMES[metric]} (ms)")
    axes.legend()
    halves = [
        f"{variant} {of_variant['second_half_over_first']:.3f}x"
        for variant, of_variant in found.items()
        if of_variant["second_half_over_first"] is not None
    ]
    return f"Second half of the blocks over the first half: {', '.join(halves) or 'unknown'}."


def timeline(axes: Any, recorded: Recorded, metric: str) -> str:
    """Each request's time against when it should have left, counted from its block's start."""
    axes.set_title(f"{NAMES[metric]} against the time in the block")
    sent = [(block, request) for block in recorded.blocks for request in block.requests]
    answered: dict[str, list[Point]] = {variant: [] for variant in recorded.variants}
    failed_s: dict[str, list[float]] = {variant: [] for variant in recorded.variants}
    for block, request in sent:
        at_s = request.intended_send_s - block.started_s
        if request.timing is None:
            failed_s[block.variant].append(at_s)
        else:
            value_ms = 1e3 * (getattr(request.timing, f"{metric}_s") or 0.0)
            answered[block.variant].append((at_s, value_ms))
    if not any(answered.values()):
        return _empty(axes, "No request was answered.")
    num_drawn = 0
    for variant, style in zip(recorded.variants, STYLES, strict=True):
        points, crosses_s = thinned(sorted(answered[variant])), thinned(sorted(failed_s[variant]))
        num_drawn += len(points) + len(crosses_s)
        dots = {**style, "linestyle": "none"}
        axes.plot(*_coordinates(points), marker="o", markersize=4, label=variant, **dots)
        # Along the upper edge: they have no time.
        top = axes.get_xaxis_transform()
        axes.plot(crosses_s, [0.98] * len(crosses_s), marker="x", transform=top, **dots)
    drawn_ms = [value_ms for points in answered.values() for _, value_ms in points]
    _scale(axes.set_yscale, axes.yaxis, np.array(drawn_ms))
    label = "intended send, seconds from the block's start"
    axes.set(xlabel=label, ylabel=f"{NAMES[metric]} (ms)")
    axes.legend()
    caption = f"{num_drawn} of {len(sent)} requests, all blocks overlaid."
    return caption + (" Crosses at the top are failed requests." if any(failed_s.values()) else "")


Series = tuple[str, Sequence[Point], Sequence[tuple[Point, str]]]
"""A variant, its front from left to right, and all its points with the names of their runs."""


def front(axes: Any, series: Sequence[Series]) -> str:
    """Throughput against interactivity, of baseline and candidate."""
    axes.set_title("throughput against interactivity")
    positions = [position for _, _, dots in series for position, _ in dots]
    if not positions:
        return _empty(axes, "Too many requests failed.")
    for (variant, on_front, dots), style in zip(series, STYLES, strict=True):
        axes.plot(*_coordinates(on_front), label=variant, **style)
        points = [position for position, _ in dots]
        axes.plot(*_coordinates(points), marker="o", **{**style, "linestyle": "none"})
    across, up = _coordinates(positions)
    _scale(axes.set_xscale, axes.xaxis, np.array(across))
    _scale(axes.set_yscale, axes.yaxis, np.array(up))
    axes.set(xlabel="tokens/s per user (1 / median TPOT)", ylabel="output tokens/s, all users")
    axes.autoscale_view()  # else the limits are not known before the figure is saved
    to_axes = axes.transScale + axes.transLimits  # 0 is the left end and 1 the right
    for _, _, dots in series:
        for position, name in dots:
            # On the side where there is more room, and away from a front, which falls to the right.
            place = to_axes.transform(position)[0]
            side, offset = ("left", (6, 5)) if place < 0.5 else ("right", (-6, -11))
            axes.annotate(
                name,
                position,
                xytext=offset,
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=8,
            )
    axes.legend()
    return FRONT_CAPTION


def thinned(points: Sequence[Item]) -> list[Item]:
    """At most MAX_POINTS of them, evenly picked, ends included."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (MAX_POINTS - 1))] for number in range(MAX_POINTS)]


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [across for across, _ in points], [up for _, up in points]


def _scale(set_scale: Callable[[str], None], axis: Any, drawn: Any) -> None:
    """A logarithmic scale, with ticks in plain digits, where values span more than tenfold."""
    low, high = drawn.min(), drawn.max()
    if low <= 0 or high / low <= 10:
        return
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _empty(axes: Any, why: str) -> str:
    """A chart without values says so; its caption too."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, horizontalalignment="center")
    return why
